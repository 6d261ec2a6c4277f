"""The configuration schema, its presets, and what crosses rooms. Imports nothing of ours."""
