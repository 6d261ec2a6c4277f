"""Engines: what makes a training step of a model and a layout."""
