"""Pure arithmetic on shapes, layouts and devices."""
