"""Deciders: pure functions of plain data and a time; each answer has its reason."""
