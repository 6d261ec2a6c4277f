"""What the commands of `python -m faulttol` do: each gives plain data, and lines for a person."""
