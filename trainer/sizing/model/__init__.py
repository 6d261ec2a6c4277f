"""What is computed: counts of parameters and operations, shapes, layouts."""
