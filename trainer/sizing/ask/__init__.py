"""Questions that people type, and their answers as text."""
