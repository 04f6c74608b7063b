"""What may be removed from a model: groups of coupled units, residual branches and blocks, and plans to remove them."""
