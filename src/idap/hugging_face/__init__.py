"""Save and load folders of transformers, and verify that they hold the compressed model."""
