"""Is a node fit to serve: its memory, its devices, its arithmetic and its way to others, as plain data."""
