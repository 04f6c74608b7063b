"""Choose what is removed: pure functions from scores and costs to kept units, without any model."""
