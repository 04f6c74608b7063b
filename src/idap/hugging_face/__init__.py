"""Folders of transformers: written, loaded, and proved to hold the cut model."""
