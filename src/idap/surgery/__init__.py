"""Apply a plan to a module, and verify that the cut model computes what was planned."""
