"""What machines without a GPU can show of the kernels beside their results."""
