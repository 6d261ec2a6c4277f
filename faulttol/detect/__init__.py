"""Detectors: pure functions from observations to verdicts."""
