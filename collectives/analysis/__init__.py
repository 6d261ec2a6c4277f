"""What follows from stored measurements: fits, comparisons, verdicts."""
