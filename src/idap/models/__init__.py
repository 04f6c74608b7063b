"""Build models by name, and read and write their weights."""
