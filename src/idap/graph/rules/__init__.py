"""How labels pass through each operator: one small rule per ATen operator, in a table that grows by rows.

A rule reads the dims of an operator's inputs, tells `Flow` which of them are the same dimension, and returns the
dims of its result. To add an operator, write a function and register its name with `@rule(...)`.
Operators that torch tags as pointwise need none. An operator that multiplies also gets a formula in
`idap.cost.count.FORMULAS`, and one that rewritten code may call gets a line in `idap/structure/code/functions.txt`.
"""

from idap.graph.rules import joining, layers, linear, normalisation, pointwise, shape
from idap.graph.rules.flow import Contraction, Flow, Pin, SizeUse, flow_of

__all__ = [
    "Contraction",
    "Flow",
    "Pin",
    "SizeUse",
    "flow_of",
    "joining",
    "layers",
    "linear",
    "normalisation",
    "pointwise",
    "shape",
]
