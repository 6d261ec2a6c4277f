"""Checkpoints: boxes of global tensors in files that are whole or absent."""
