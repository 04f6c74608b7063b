"""How much each part of a network changes the flow: streaming statistics, and formulas that make scores of them."""
