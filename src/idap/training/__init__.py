"""Data, loss and metric of a purpose; training, distillation and evaluation. Knows nothing of pruning."""
