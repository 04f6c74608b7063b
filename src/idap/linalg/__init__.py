"""The mathematics: functions of tensors and numbers, which know neither graphs nor modules."""
