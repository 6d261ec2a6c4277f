"""Readers of the logs that write elsewhere."""
