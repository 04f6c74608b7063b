"""Which criterion, which ranking and which correction keep most of a network, without any training?

    python benchmarks/criteria.py --data DATA                              # all parts; hours on two cores
    python benchmarks/criteria.py --data DATA --parts default peers        # some of them

Every row is one cut and its corrections, judged on the whole test set: subject, task, criterion, ranking, power, what
was corrected, calibration samples and seed. Rows already in the results are not measured again, so that a run that was
interrupted goes on where it was, and a second process may come from the other end (--backwards). Calibration images are
drawn from the training images by the seed.

Tasks: "macs 1/2" and "macs 1/3" leave that share of the multiply-adds ("inner": only the channels inside of residual
blocks go, which Torch-Pruning can cut too; "all": any channel); "neurons 50 %" and so on leave that share of the units.

Parts:
    default     the default settings, three seeds, 256, 512 and 1,024 images
    criteria    every criterion with every power, uniform and global
    draws       five criteria at their best power by calibration images and seed
    corrections nothing, means, norms, least squares and combinations, for a few criteria
    peers       Torch-Pruning's criteria with our corrections, uniform and global, beside the default
    depth       channels of the residual stream and blocks may go too
    repeated    one cut against several with re-measuring
    vit, llama  neurons, heads and layers of transformers
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.criteria_tables import HALF, SQUARES, THIRD
from benchmarks.harness import RESULTS, Rows
from benchmarks.subjects import Subject, add_data_argument, build
from idap.cost.count import CostModel
from idap.divergence.criteria import CRITERIA
from idap.divergence.measure import Divergence, measure_all
from idap.divergence.observe import Pass
from idap.graph.trace import trace
from idap.rebalance.run import Rebalance, rebalance_
from idap.selection.ranking import Ranking, ScoredBlock, rank_uniform, rank_units
from idap.selection.reach import reach
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from idap.training.batch import merge_batches

CORRECTIONS: Mapping[str, Rebalance | None] = {
    "none": None,
    "means": Rebalance(least_squares=False),
    "norms": Rebalance(least_squares=False, means=False, norms=True),
    SQUARES: Rebalance(),
    "least squares, no additions": Rebalance(through_additions=False),
    "least squares and norms": Rebalance(norms=True),
}
FLOOR = 1 / 16
POWERS = (0.0, 0.5, 1.0)
PEER = "torch-pruning "


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cut; the fields up to `seed` say which."""

    subject: str
    task: str
    criterion: str
    ranking: str
    power: float
    corrected: str
    cuts: int = 1
    samples: int = 512
    seed: int = 0


class Bench:
    """One subject with its structure, and the scores that were measured last."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        args, kwargs = subject.example()
        self.structure: Structure = analyze(trace(subject.model, args, kwargs), contracts=subject.contracts)
        first = next(leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor))
        self.costs = CostModel(self.structure, len(first))
        self.whole = {group.name: tuple(range(group.size)) for group in self.structure.groups}
        self._scores: dict[tuple[int, int], dict[str, Divergence]] = {}
        self._peers: dict[tuple[str, int, int], dict[str, Tensor]] = {}

    def passes(self, samples: int, seed: int, *, at_once: bool) -> list[Pass]:
        """The calibration batches of a draw; one for all samples where they fit together."""
        batches: Sequence[Any] = self.subject.calibration(samples, seed)
        whole = merge_batches(batches) if at_once else None
        run, loss = self.subject.run, self.subject.loss
        return [
            Pass(lambda model, b=batch: run(model, b), lambda outputs, b=batch: loss(outputs, b))
            for batch in ([whole] if whole is not None else batches)
        ]

    def scores(self, criterion: str, samples: int, seed: int) -> Divergence:
        """All criteria of one draw are measured together, the first time that one is asked for."""
        if criterion.startswith(PEER):
            return Divergence(criterion, self._peer(criterion.removeprefix(PEER), samples, seed), {})
        key = (samples, seed)
        if key not in self._scores:
            passes = self.passes(samples, seed, at_once=False)
            model = self.subject.model
            self._scores = {key: measure_all(model, self.structure, passes, criteria=list(CRITERIA), seed=seed)}
        return self._scores[key][criterion]

    def _peer(self, criterion: str, samples: int, seed: int) -> dict[str, Tensor]:
        from benchmarks import peers  # noqa: PLC0415 - needs torch-pruning

        key = (criterion, samples, seed)
        if key not in self._peers:
            batches = self.subject.calibration(samples, seed)
            self._peers[key] = dict(peers.importance(criterion, self.subject, self.structure, batches, seed=seed))
        return self._peers[key]

    def groups(self, task: str) -> set[str]:
        """The groups that may shrink."""
        kind = task.split(maxsplit=1)[0]
        if kind == "inner":
            return {g.name for g in self.structure.groups if g.name.endswith("conv1") and g.name != "conv1"}
        if kind in ("neurons", "heads"):
            # Of grouped-query attention the key/value heads with all their queries, not single queries of each.
            inside = [g for g in self.structure.groups if g.kind == kind and "#" not in g.name]
            stream = {g.name for g in inside if len(g.writers) > 2 and kind == "neurons"}
            return {g.name for g in inside} - stream
        return set(self.whole)

    def choose(self, row: Row, found: Divergence, keep: Mapping[str, tuple[int, ...]], share: float) -> Any:
        """What stays: exactly the target, by bisection over the ranking."""
        mine = self.groups(row.task)
        scores = {name: values.tolist() for name, values in found.units.items() if name in mine}
        floors = {group.name: max(1, int(group.size * FLOOR)) for group in self.structure.groups}
        if row.ranking == "uniform":
            ranking: Ranking = rank_uniform(scores, keep, floors=floors)
        else:
            costs = self.costs.unit_macs(keep)
            blocks = None
            if row.task.startswith("blocks"):
                blocks = {
                    block.name: ScoredBlock(found.blocks[block.name], self.costs.block_macs(block.name), block.contains)
                    for block in self.structure.blocks
                    if block.name in found.blocks
                }
            ranking = rank_units(scores, keep, costs, floors=floors, power=row.power, blocks=blocks)
        if "macs" in row.task:
            whole = self.costs.cost().macs
            return reach(ranking, lambda kept, gone: self.costs.cost(kept, gone).macs, share * whole)
        units = sum(len(self.whole[name]) for name in scores)
        return reach(ranking, lambda kept, _: float(sum(len(kept[name]) for name in scores)), share * units)

    def measure(self, row: Row) -> dict[str, Any]:
        """Cut, correct, judge."""
        setting = CORRECTIONS[row.corrected]
        start = time.perf_counter()
        if row.task.startswith("layers"):
            model, plan, choice = self._without_layers(row)
        else:
            model, plan, choice = self._cut(row)
        if setting is not None:
            passes = self.passes(row.samples, row.seed, at_once=True)
            rebalance_(model, self.subject.model, self.structure, plan, passes, setting)
        seconds = time.perf_counter() - start
        cost = self.costs.cost(*choice)
        return {
            "quality": round(self.subject.quality(model), 4),
            "macs": round(cost.macs / self.costs.cost().macs, 4),
            "parameters": round(cost.parameters / self.costs.cost().parameters, 4),
            "seconds": round(seconds, 1),
        }

    def _cut(self, row: Row) -> tuple[nn.Module, Plan, Any]:
        """Cut once, or several times with corrections and new scores in between; the last cut is left uncorrected."""
        share = share_of(row.task)
        found = self.scores(row.criterion, row.samples, row.seed)
        model, plan, keep = self.subject.model, self.structure.plan({}), self.whole
        for number in range(1, row.cuts + 1):
            choice = self.choose(row, found, keep, 1 - (1 - share) * number / row.cuts)
            keep = choice.keep
            further = self.structure.plan(keep, choice.removed)
            model, plan = apply_plan(model, further.since(plan) if number > 1 else further), further
            if number < row.cuts:
                passes = self.passes(row.samples, row.seed, at_once=True)
                rebalance_(model, self.subject.model, self.structure, plan, passes, CORRECTIONS[row.corrected])
                passes = self.passes(row.samples, row.seed, at_once=False)
                again = measure_all(model, self.structure, passes, criteria=[row.criterion], keep=keep)[row.criterion]
                found = Divergence(row.criterion, {n: s.nan_to_num(0.0) for n, s in again.units.items()}, {})
        return model, plan, (keep, choice.removed)

    def _without_layers(self, row: Row) -> tuple[nn.Module, Plan, Any]:
        """Remove the blocks of lowest divergence, measured again after each."""
        removed: tuple[str, ...] = ()
        names = {block.name for block in self.structure.blocks if block.kind == "block"}
        for _ in range(int(row.task.split()[1])):
            model = apply_plan(self.subject.model, self.structure.plan({}, removed))
            passes = self.passes(row.samples, row.seed, at_once=False)
            criterion = [row.criterion]
            found = measure_all(model, self.structure, passes, criteria=criterion, removed=removed)[row.criterion]
            scores = {name: score for name, score in found.blocks.items() if name in names}
            removed = (*removed, min(scores, key=lambda name: scores[name]))
        plan = self.structure.plan({}, removed)
        return apply_plan(self.subject.model, plan), plan, (self.whole, removed)


def share_of(task: str) -> float:
    """What a task leaves."""
    last = task.rsplit(maxsplit=1)[-1] if not task.endswith("%") else task.split()[-2] + "/100"
    above, _, below = last.partition("/")
    return float(above) / float(below)


BEST = {"criterion": "innovation", "ranking": "global", "power": 0.0, "corrected": SQUARES}


def default(subject: str) -> Iterator[Row]:
    for samples in (512, 1024, 256):
        for seed in range(3):
            for task in (HALF, THIRD):
                for power in (0.0, 1.0) if samples == 512 else (0.0,):
                    settings = {**BEST, "power": power}
                    yield Row(subject=subject, task=task, samples=samples, seed=seed, **settings)


def criteria(subject: str) -> Iterator[Row]:
    for task in (THIRD, HALF):
        for name in CRITERIA:
            for power in POWERS:
                settings = {"criterion": name, "ranking": "global", "power": power, "corrected": SQUARES}
                yield Row(subject=subject, task=task, **settings)
            settings = {"criterion": name, "ranking": "uniform", "power": 0.0, "corrected": SQUARES}
            yield Row(subject=subject, task=task, **settings)


def draws(subject: str) -> Iterator[Row]:
    best = {"innovation": 0.0, "paper": 1.0, "relative": 1.0, "taylor": 1.0, "magnitude": 0.5}
    for samples in (512, 256, 1024):
        for seed in range(3):
            for name, power in best.items():
                settings = {"criterion": name, "ranking": "global", "power": power, "corrected": SQUARES}
                for task in (HALF, THIRD):
                    yield Row(subject=subject, task=task, samples=samples, seed=seed, **settings)


def corrections(subject: str) -> Iterator[Row]:
    for task in (HALF, THIRD):
        for name, power in (("innovation", 0.0), ("relative", 0.0), ("paper", 1.0), ("magnitude", 0.0)):
            for corrected in CORRECTIONS:
                settings = {"criterion": name, "ranking": "global", "power": power, "corrected": corrected}
                yield Row(subject=subject, task=task, **settings)


def peers(subject: str) -> Iterator[Row]:
    from benchmarks.peers import CRITERIA as THEIRS  # noqa: PLC0415 - needs torch-pruning

    for task in (THIRD, HALF):
        yield Row(subject=subject, task=task, **BEST)
        for name in THEIRS:
            for ranking in ("uniform", "global"):
                settings = {"criterion": PEER + name, "ranking": ranking, "power": 0.0, "corrected": SQUARES}
                yield Row(subject=subject, task=task, **settings)


def depth(subject: str) -> Iterator[Row]:
    for share in ("1/2", "1/3"):
        for criterion, power in (("innovation", 0.0), ("innovation", 1.0), ("relative", 0.0), ("relative", 1.0)):
            settings = {"criterion": criterion, "ranking": "global", "power": power, "corrected": SQUARES}
            yield Row(subject=subject, task=f"all macs {share}", **settings)
            if criterion == "relative":
                yield Row(subject=subject, task=f"blocks macs {share}", **settings)


def repeated(subject: str) -> Iterator[Row]:
    for criterion in ("innovation", "relative"):
        for cuts in (1, 3):
            for seed in range(2):
                settings = {**BEST, "criterion": criterion, "cuts": cuts, "seed": seed}
                yield Row(subject=subject, task=THIRD, **settings)


def vit(_: str) -> Iterator[Row]:
    names = ("random", "magnitude", "taylor", "fisher", "paper", "relative", "fluctuation", "innovation", "activation")
    for task in ("neurons 50 %", "neurons 25 %", "heads 50 %", "heads 25 %"):
        for name in names:
            for corrected in ("none", "least squares"):
                settings = {"criterion": name, "ranking": "global", "power": 0.0, "corrected": corrected}
                yield Row(subject="vit", task=task, **settings)


def llama(_: str) -> Iterator[Row]:
    names = ("random", "magnitude", "taylor", "fisher", "paper", "relative", "innovation")
    for task in ("neurons 75 %", "neurons 50 %", "heads 75 %", "heads 50 %"):
        for name in names:
            for corrected in ("none", "least squares"):
                settings = {"criterion": name, "ranking": "global", "power": 0.0, "corrected": corrected}
                yield Row(subject="llama", task=task, samples=64, **settings)
    for count in (1, 2):
        for name in ("relative", "paper"):
            for corrected in ("none", "least squares"):
                settings = {"criterion": name, "ranking": "global", "power": 0.0, "corrected": corrected}
                yield Row(subject="llama", task=f"layers {count}", samples=64, **settings)


PARTS = {
    "default": default, "peers": peers, "criteria": criteria, "draws": draws, "corrections": corrections,
    "depth": depth, "repeated": repeated, "vit": vit, "llama": llama,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--subject", choices=["resnet20", "resnet56"], default="resnet56")
    parser.add_argument("--results", type=Path, default=RESULTS / "criteria.json")
    parser.add_argument("--backwards", action="store_true", help="begin with the last row of each part")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about = {"question": "Which criterion, ranking and correction keep most of a network, without any training?"}
    rows = Rows(arguments.results, [entry.name for entry in fields(Row)], about)
    benches: dict[str, Bench] = {}
    for part in arguments.parts:
        wanted = list(PARTS[part](arguments.subject))
        for row in reversed(wanted) if arguments.backwards else wanted:
            if row.subject not in benches:
                benches[row.subject] = Bench(build(row.subject, arguments.data))
            rows.measure(asdict(row), lambda r=row: benches[r.subject].measure(r))


if __name__ == "__main__":
    main()
