"""Carry out a plan on a real module, and prove that the result is what was planned."""
