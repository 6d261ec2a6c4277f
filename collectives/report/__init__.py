"""Stored measurements as tables, pictures and pages."""
