"""Files of adapters that other programs write and read, a format a file; table.py lists them."""
