"""Cut a net, correct what stays, and see how far it is from the original."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from idap.divergence.observe import Pass
from idap.graph.trace import trace
from idap.rebalance.run import Correction, Rebalance, rebalance_
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from tests.nets import randomised

Keep = Mapping[str, Sequence[int]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build_net(make: Any, seed: int = 0) -> nn.Module:
    """A net in eval mode with weights that hide nothing."""
    torch.manual_seed(seed)
    return randomised(make(), seed).eval()


def structure_of(model: nn.Module, *shape: int) -> Structure:
    dtype = next(model.parameters()).dtype
    return analyze(trace(model, (normal(*shape).to(dtype),)))


def passes(*batches: Tensor) -> list[Pass]:
    return [Pass(lambda m, batch=batch: m(batch)) for batch in batches]


def without(structure: Structure, name: str, *units: int) -> Keep:
    """All units of a group but these."""
    return {name: [unit for unit in range(structure.group(name).size) if unit not in units]}


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).double()


def error(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    """Relative error of the outputs."""
    wanted = outputs(original, x)
    return float((outputs(model, x) - wanted).norm() / wanted.norm())


class Cut:
    """A net before a cut, after it, and after the correction."""

    def __init__(
        self, model: nn.Module, structure: Structure, keep: Keep, x: Tensor, *, removed: Sequence[str] = (),
        setting: Rebalance | None = None, batches: int = 1,
    ) -> None:  # fmt: skip
        self.model, self.structure = model, structure
        self.plan: Plan = structure.plan(keep, removed)
        self.plain = apply_plan(model, self.plan)
        self.small = apply_plan(model, self.plan)
        self.corrections: list[Correction] = rebalance_(
            self.small, model, structure, self.plan, passes(*x.chunk(batches)), setting
        )

    def errors(self, x: Tensor) -> tuple[float, float]:
        """Before the correction and after it."""
        return error(self.plain, self.model, x), error(self.small, self.model, x)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Bit for bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
