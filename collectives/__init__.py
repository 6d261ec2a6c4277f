"""Measuring the fabric."""
