"""The configuration schema, its presets, and what crosses packages. Imports nothing of ours."""
