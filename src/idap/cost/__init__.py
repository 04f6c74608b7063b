"""What a model costs: multiply-adds, parameters, latency; for the whole, and for each unit of each group."""
