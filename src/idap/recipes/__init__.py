"""Recipes: the file, its sections, what it names, and those that idap brings."""
