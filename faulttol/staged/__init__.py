"""Saves in two stages: a copy in host memory, which training waits for, and the write, which it does not."""
