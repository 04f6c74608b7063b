"""Recipes: files, sections, names of models and data, and the recipes that come with idap."""
