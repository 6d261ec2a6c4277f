"""Rules that a model's shape and layout should keep, and what to change."""
