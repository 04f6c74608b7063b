"""The mathematics of a cut: functions of tensors and numbers alone, without graphs and modules."""
