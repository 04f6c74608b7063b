"""Tasks (data, loss and metric), training, distillation and evaluation; independent of pruning."""
