"""Checkpoints in the memory of nodes: they outlive ranks, and the loss of a node."""
