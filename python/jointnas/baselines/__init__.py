"""What a found model is compared with, one file each: choices of the same space that were not searched for."""
