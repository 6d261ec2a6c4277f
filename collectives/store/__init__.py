"""What is kept of a measurement, and where."""
