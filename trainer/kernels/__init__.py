"""Kernels in Triton for what torch does in several passes over memory, each with torch operators that it stands for."""
