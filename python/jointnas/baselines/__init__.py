"""What a joint search is compared with, one method a file, on the same supernet, data, table and budget (`methods`)."""
