"""Optimizers over named shards, and schedules."""
