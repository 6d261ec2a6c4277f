"""Observing, judging, saving and restoring."""
