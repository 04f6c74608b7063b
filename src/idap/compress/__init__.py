"""The two-stage compressor: filters, then layers, within a budget that holds."""
