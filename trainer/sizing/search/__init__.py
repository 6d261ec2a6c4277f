"""Which layouts are legal, and which of them is best."""
