"""What the server answers: pure functions from what was read to JSON."""
