"""What a compressed model is worth where it runs: its speed and its memory, beside the original's."""
