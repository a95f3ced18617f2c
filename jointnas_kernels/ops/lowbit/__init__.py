"""Products with packed low-bit weights."""
