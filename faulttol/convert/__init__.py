"""Other formats: Hugging Face, torch's distributed checkpoint and DeepSpeed's, in and out; and models that grow."""
