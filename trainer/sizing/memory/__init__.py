"""Bytes on each rank."""
