"""What a training step takes, beside the fastest that others make of the same shapes, in one run."""
