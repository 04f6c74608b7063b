"""The result of a compression."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from idap.errors import CheckpointError
from idap.files import write_bytes
from idap.report import numbers
from idap.report.headline import Fact, cost_fact, metric_fact
from idap.report.page import result_display
from idap.saving.card import CARD, Facts, model_card, module_of
from idap.saving.checkpoint import save
from idap.steps import Step
from idap.structure.chain import chain_plans
from idap.structure.plan import Plan


@dataclass(frozen=True, repr=False)
class Result:
    """The compressed model, and how it came about.

    Attributes:
        model: an ordinary module of the original's class, smaller, in the original's mode.
        plan: from the model that was compressed to this one.
        steps: every decision, in order.
        baseline: metric of the original on the validation data.
        metric: of the model on the validation data, measured after the last change.
        macs: multiply-adds for one sample, before and after.
        parameters: before and after.
        size: bytes of all tensors in the saved file, before and after.
        latency: as a share of the original's, measured here at the end; None if latency was not a goal.
        output_error: E‖N0(x) − N*(x)‖² / E‖N0(x)‖² on the validation data (docs/method.md#promise).
        reached: whether every goal was met.
        message: one sentence on what was reached, or which goal was not and why.
        metric_name: what the metric is.
        seconds: kind of work -> seconds that it took in all.
        base: from the original to the model that was compressed, if that was itself compressed (`idap.load`).
        build: the call that builds the original, with its module; None if the run was not told how it is built.
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
    base: Plan | None = None
    build: str | None = None

    @property
    def whole_plan(self) -> Plan:
        """The plan from the first original to the model, over every compression in between."""
        return self.plan if self.base is None else chain_plans(self.base, self.plan)

    def __repr__(self) -> str:
        return (
            f"Result(MACs {self.macs[1] / self.macs[0]:.1%}, parameters {self.parameters[1] / self.parameters[0]:.1%}, "
            f"{self.metric_name} {self.baseline:.4f} -> {self.metric:.4f}; {self.message})"
        )

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        facts = [
            cost_fact("multiply-adds", *self.macs, numbers.count),
            cost_fact("parameters", *self.parameters, numbers.count),
            cost_fact("file size", *self.size, numbers.size),
            metric_fact(self.metric_name, "validation", self.baseline, self.metric),
        ]
        if self.latency is not None:
            facts.insert(3, Fact("latency", "100 %", numbers.share(self.latency), "", self.latency))
        return result_display(
            title=type(self.model).__name__,
            reached=self.reached,
            message=self.message,
            facts=facts,
            metric=self.metric_name,
            baseline=self.baseline,
            steps=self.steps,
        )

    def save(self, folder: str | Path, *, build: str | None = None) -> dict[str, int]:
        """Write `model.safetensors` and `plan.json`, which `idap.load` reads, and `card.md` for people.

        Args:
            folder: created where needed; a model saved there before is replaced.
            build: for the card, the call that builds the original, with its module, such as
                ``torchvision.models.resnet50()``. None: the call that the run was told; without one, the card finds
                out whether the class can be built without arguments.

        Returns:
            Tensor name -> how many subnormal numbers were written as zeros, for those that have any.

        Raises:
            CheckpointError: the folder can't be written, or `build` is not a call.
        """
        plan, where = self.whole_plan, Path(folder)
        facts = Facts(
            steps=self.steps,
            metric_name=self.metric_name,
            metric=(self.baseline, self.metric),
            macs=self.macs,
            parameters=self.parameters,
            size=self.size,
            latency=self.latency,
            output_error=self.output_error,
            message=self.message,
            again=self.base is not None,
        )
        build = build if build is not None else self.build
        if build is not None:
            module_of(build)  # a wrong one is refused before anything is written
        subnormal = save(where, self.model, plan)
        card = model_card(where.as_posix(), self.model, plan, facts, subnormal=subnormal, build=build)
        try:
            write_bytes(where / CARD, card.encode())
        except OSError as error:
            raise CheckpointError(f"cannot write the card to {where}: {error}") from error
        return subnormal
