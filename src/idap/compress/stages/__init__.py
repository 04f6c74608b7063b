"""The two stages, which choose, try and decide each step."""
