"""Data sets by name: read, split and checked."""
