"""Choose what goes: pure functions, scores and costs in, kept units out. Nothing here has seen a model."""
