"""What saving and loading cost beside DeepSpeed and torch's distributed checkpoint, each measured in one run."""
