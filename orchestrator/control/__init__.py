"""The controller, its runs, and the seam to what runs a gang."""
