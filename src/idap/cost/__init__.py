"""Count or measure what a model and each unit of it cost: multiply-adds, parameters, bytes, latency."""
