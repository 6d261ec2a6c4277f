"""Seconds of a step, from kernels and links upwards."""
