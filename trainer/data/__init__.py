"""Text to tokens to samples."""
