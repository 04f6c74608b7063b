"""The two stages: each step is chosen, tried and decided here."""
