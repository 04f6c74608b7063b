"""Export compressed models, and measure their speed and memory beside the original."""
