"""One trained network that is cut by some method, judged, trained again and judged again, all by the same protocol.

A script that imports more of idap than `harness`, `subjects` and this file imports one of them first.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Clock, Recovered, Remembering, Rows, cifar_task, latencies, recover, reported, timed
from benchmarks.subjects import Subject, build
from idap import Recovery
from idap.compress.config import Config, FilterStage
from idap.compress.run import compress
from idap.cost.count import Cost, CostModel
from idap.graph.trace import trace
from idap.steps import Step
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.training.evaluate import evaluate
from idap.training.task import Task

NONE = Recovery(epochs=0)
TOLERANCE = 0.01
"""Share of the target by which the cost of rows may differ."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is the same for all rows.

    Attributes:
        device: where models run.
        train: images that the recovery learns from; None: all.
        val: images by which `compress` decides, and by which the state of a recovery and its learning rate are chosen.
        calibration: images that scores and corrections are computed from.
        batch: images of a batch.
        recovery: of every row.
        rates: learning rates, each row's recovery is made with each; none: that of `recovery`.
    """

    device: str
    train: int | None
    val: int = 2000
    calibration: int = 512
    batch: int = 128
    recovery: Recovery
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Cut:
    """A model that was made smaller and not trained yet.

    Attributes:
        model: that was cut.
        plan: that did it.
        cost: of the model.
        rates: learning rates to try besides those of the protocol.
        steps: every decision, where the method takes several.
        clock: what it took, where that is not all that the method did.
    """

    model: nn.Module
    plan: Plan
    cost: Cost
    rates: tuple[float, ...] = ()
    steps: tuple[Step, ...] = ()
    clock: Clock | None = None


class Bench:
    """One network with the data of one seed.

    Args:
        subject: gives the network and the test images; it stays on the CPU.
        task: gives all other images.
        protocol: the same for all that is compared.
        seed: of calibration and training.
    """

    def __init__(self, subject: Subject, task: Task, protocol: Protocol, seed: int) -> None:
        self.subject, self.task, self.protocol, self.seed = subject, task, protocol, seed
        self.model = copy.deepcopy(subject.model).to(protocol.device)
        self.teacher = Remembering(self.model)
        self.structure = self.analysed()
        self.costs = CostModel(self.structure, 2)

    def analysed(self) -> Structure:
        """Trace and analyse the original, as every method must."""
        args, kwargs = self.subject.example()
        return analyze(trace(self.model, tuple(arg.to(self.protocol.device) for arg in args), kwargs))

    def under(self, protocol: Protocol) -> "Bench":
        """The same network and data under a protocol that differs in its recovery."""
        other = copy.copy(self)
        other.protocol = protocol
        return other

    def accuracy(self, model: nn.Module) -> float:
        """Points on all test images."""
        device = self.protocol.device
        with torch.no_grad():
            batches = [(images.to(device), labels.to(device)) for images, labels in self.subject.test]
            return self.subject.quality(model.eval(), batches)

    def original(self) -> dict[str, Any]:
        """The row of the original."""
        cost = self.costs.cost()
        return {"accuracy": self.accuracy(self.model), "macs": cost.macs, "parameters": cost.parameters}

    def trained(self) -> dict[str, Any]:
        """The row of the original after the recovery of all rows, whatever that makes of it: nothing was cut.

        How much of what the rows below lose, the training itself takes; by its learning rates.
        """
        last, tried = self.recovered(self.model, (), best=False)
        return {"accuracy": self.accuracy(last.model), "deciding": round(100 * last.quality, 2), "rates": tried}

    def row(self, share: float, method: "Method", rows: Rows) -> dict[str, Any]:
        """Cut to a share of the multiply-adds, judge, recover, judge."""
        with timed() as clock:
            cut = method(self, share, rows)
        model, whole, cost = cut.model, self.costs.cost(), cut.cost
        before = self.accuracy(model)
        known = 100 * evaluate(model, self.task)
        best, tried = self.recovered(model, cut.rates)
        sizes = {group.name: group.size for group in self.structure.groups}
        sample = self.subject.test[0][0][:1].to(self.protocol.device)
        return {
            "before": before,
            "deciding": [round(known, 2), round(100 * best.quality, 2)],
            "after": self.accuracy(best.model),
            "macs": cost.macs,
            "macs_ratio": round(whole.macs / cost.macs, 4),
            "parameters": cost.parameters,
            "parameters_ratio": round(whole.parameters / cost.parameters, 4),
            "latency_ms": latencies(self.model, best.model.eval(), sample),
            "compression": (cut.clock or clock).row(),
            "recovery": {**best.clock.row(), "rates": tried},
            "averaged": best.averaged,
            "losses": list(best.losses),
            "left": {name: len(units) for name, units in cut.plan.keep.items() if len(units) < sizes[name]},
            "removed": list(cut.plan.removed),
            "stages": stages(cut.steps),
        }

    def recovered(
        self, model: nn.Module, more: Sequence[float], *, best: bool = True
    ) -> tuple[Recovered, dict[str, list[float]]]:
        """The recovery with the learning rate that the deciding images prefer; points on these and the rest by rate."""
        own = replace(self.protocol.recovery, seed=self.seed)
        tried: dict[str, list[float]] = {}
        chosen: Recovered | None = None
        for rate in sorted({*(self.protocol.rates or (own.lr,)), *more}):
            found = recover(model, self.teacher, self.task, replace(own, lr=rate), best=best)
            tried[f"{rate:g}"] = [round(100 * found.quality, 2), self.accuracy(found.model)]
            if chosen is None or found.quality > chosen.quality:
                chosen = found
        if chosen is None:
            raise RuntimeError("a protocol without a learning rate.")
        return chosen, tried


Method = Callable[[Bench, float, Rows], Cut]


def cifar_bench(network: str, data: Path, protocol: Protocol, seed: int) -> Bench:
    """A network of `subjects` with CIFAR-10 as the protocol divides it."""
    sizes = {"train": protocol.train, "val": protocol.val, "calibration": protocol.calibration}
    task = cifar_task(data, **sizes, batch=protocol.batch, seed=seed)
    return Bench(reported(build(network, data), protocol.val), task, protocol, seed)


def stages(steps: Sequence[Step]) -> dict[str, Any]:
    """What each stage removed: units by kind, and branches and blocks by name."""
    found: dict[str, Any] = {}
    for step in steps:
        if not step.accepted:
            continue
        stage = found.setdefault(step.stage, {"steps": 0, "units": {}, "parts": []})
        stage["steps"] += 1
        for removal in step.removed:
            if removal.units:
                stage["units"][removal.kind] = stage["units"].get(removal.kind, 0) + len(removal.units)
            else:
                stage["parts"].append(removal.name)
    return found


def ours(*, inside: bool = False, bare: bool = False, **settings: Any) -> Method:
    """A method that is a call of `idap.compress`, with what differs from the defaults.

    Where the last block that went saved so much that the cost is more than 1 % below the target, one block fewer
    may go, and filters, which come to the target exactly, take what is left. Only the call that counts is timed.

    Args:
        inside: only the channels that Torch-Pruning can cut.
        bare: what stays keeps the original's weights; the corrections only helped to choose.
        settings: of `Config`.
    """

    def cut(bench: Bench, share: float, _: Rows) -> Cut:
        changed = dict(settings)
        if inside:
            outer = {group.name for group in bench.structure.groups} - set(inner(bench.structure))
            changed["filters"] = FilterStage(keep=dict.fromkeys(outer, 1.0))
        config = Config(
            macs=share,
            max_drop=None,
            recovery=NONE,
            final=NONE,
            calibration_batches=-(-bench.protocol.calibration // bench.protocol.batch),
            seed=bench.seed,
            **changed,
        )
        while True:
            with timed() as clock:
                result = compress(bench.model, bench.task, config)
            removals = sum(step.stage == "layers" and step.accepted for step in result.steps)
            exact = result.macs[1] >= (1 - TOLERANCE) * share * result.macs[0]
            if exact or not removals or not config.filters.steps:
                break
            config = replace(config, layers=replace(config.layers, removals=removals - 1))
        cost = Cost(result.macs[1], result.parameters[1])
        model = apply_plan(bench.model, result.plan) if bare else result.model
        return Cut(model, result.plan, cost, steps=result.steps, clock=clock)

    return cut


def inner(structure: Structure) -> list[str]:
    """Groups of the channels between the two convolutions of a block."""
    return [group.name for group in structure.groups if group.name.endswith("conv1") and group.name != "conv1"]
