"""Process groups and what is exchanged in them."""
