"""Correct what stays after a cut, in closed form, so that the flow continues as before (docs/method.md#rebalancing)."""
