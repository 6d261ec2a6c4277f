"""One rank's training program, and sizing."""
