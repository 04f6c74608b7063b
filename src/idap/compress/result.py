"""What a compression returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from idap.record import Step
from idap.saving.checkpoint import save
from idap.structure.plan import Plan


@dataclass(frozen=True, repr=False)
class Result:
    """A smaller model, and how it came about.

    Attributes:
        model: an ordinary module of the original's class, smaller, in the original's mode.
        plan: from the original to the model.
        steps: every decision, in order.
        baseline: metric of the original on the validation data.
        metric: of the model on the validation data, measured after the last change.
        macs: multiply-adds for one sample, before and after.
        parameters: before and after.
        size: bytes of all tensors in the saved file, before and after.
        latency: as a share of the original's, measured here at the end; None where it was no goal.
        output_error: E‖N0(x) − N*(x)‖² / E‖N0(x)‖² on the validation data (method.md 3.5).
        reached: whether every goal was met.
        message: one sentence on what was reached, or which goal was not and why.
        metric_name: what the metric is.
        seconds: kind of work -> seconds that it took in all.
    """

    model: nn.Module
    plan: Plan
    steps: tuple[Step, ...]
    baseline: float
    metric: float
    macs: tuple[int, int]
    parameters: tuple[int, int]
    size: tuple[int, int]
    latency: float | None
    output_error: float
    reached: bool
    message: str
    metric_name: str = "metric"
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Result(MACs {self.macs[1] / self.macs[0]:.1%}, parameters {self.parameters[1] / self.parameters[0]:.1%}, "
            f"{self.metric_name} {self.baseline:.4f} -> {self.metric:.4f}; {self.message})"
        )

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `plan.json`; `idap.load` reads them.

        Raises:
            CheckpointError: the folder can't be written.
        """
        save(folder, self.model, self.plan)
