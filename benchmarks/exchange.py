"""Does it pay to measure what each group's cut really costs, and to divide the cut among the groups by that?

    python benchmarks/exchange.py --data DATA                       # ResNet-20, about ten minutes a seed on one core
    python benchmarks/exchange.py --data DATA --subject resnet56

The default ranks units of all groups by `innovation`, which sees one layer at a time. Here every group is cut alone to
3/4, 1/2 and 1/4 of its channels, in the order of `innovation`, and the divergence of the outputs from the original's is
measured on images that nothing was fitted on: before anything is corrected (how sensitive what follows is), or after
the whole network was rebalanced (what its cut really costs). Between two such points units share the cost in the
proportion of their `innovation`; units of all groups are then ranked by that cost. No training; accuracy on the whole
test set. Rows already in the results are not measured again.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.criteria import Bench, Row, share_of
from benchmarks.criteria_tables import HALF, SQUARES, THIRD
from benchmarks.harness import RESULTS, Rows
from benchmarks.subjects import add_data_argument, build
from idap.divergence.measure import Divergence
from idap.divergence.observe import Pass
from idap.rebalance.run import Rebalance, rebalance_
from idap.surgery.apply import apply_plan
from idap.training.batch import merge_batches

KEYS = ("subject", "task", "divided by", "power", "seed")
INNOVATION = "innovation"
WAYS = {"error before corrections": False, "error after rebalancing": True}
LEVELS = (0.75, 0.5, 0.25)
SAMPLES, FITTED, HELD, HELD_SEED, TEMPERATURE = 512, 256, 256, 55, 4.0


class Exchange:
    """One network, the images of one seed, and the cost of each group's cut, measured when it is asked for."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.seed = bench, seed
        self.innovation = bench.scores(INNOVATION, SAMPLES, seed).units
        subject = bench.subject
        fitted = merge_batches(subject.calibration(FITTED, seed))
        self._pass = Pass(lambda model: subject.run(model, fitted), lambda outputs: subject.loss(outputs, fitted))
        self._held = merge_batches(subject.calibration(HELD, HELD_SEED))
        with torch.no_grad():
            self._wanted = subject.run(subject.model, self._held)
        self._known: dict[str, tuple[dict[str, Tensor], float]] = {}

    def scores(self, way: str) -> tuple[Mapping[str, Tensor], float]:
        """Scores of the units, and the seconds of processor time that they took beyond `innovation`."""
        if way == INNOVATION:
            return self.innovation, 0.0
        if way not in self._known:
            start = time.process_time()
            mine = self.bench.groups(HALF)
            found = {name: self._of(name, corrected=WAYS[way]) for name in self.innovation if name in mine}
            self._known[way] = found, time.process_time() - start
        return self._known[way]

    def _of(self, name: str, *, corrected: bool) -> Tensor:
        """The cost of each unit of a group, from the errors at the levels."""
        known = self.innovation[name].double()
        order = known.argsort(descending=True)
        scores, above, before = torch.zeros_like(known), len(order), 0.0
        for level in LEVELS:
            kept = max(1, round(level * len(order)))
            error = max(before, self._error(name, order[:kept], corrected=corrected))
            gone = order[kept:above]
            slope = (error - before) / float(known[gone].sum().clamp_min(1e-12))
            scores[gone] = known[gone] * slope
            above, before = kept, error
        scores[order[:above]] = known[order[:above]] * slope
        # Among units of a group the order is that of innovation, so costs may only grow along it.
        scores[order] = scores[order].flip(0).cummax(0).values.flip(0)
        print(name, corrected, round(before, 4), flush=True)
        return scores

    def _error(self, name: str, kept: Tensor, *, corrected: bool) -> float:
        """Divergence of the outputs when one group alone is cut."""
        subject, structure = self.bench.subject, self.bench.structure
        plan = structure.plan({name: sorted(kept.tolist())})
        model = apply_plan(subject.model, plan)
        if corrected:
            rebalance_(model, subject.model, structure, plan, [self._pass], Rebalance())
        with torch.no_grad():
            given = subject.run(model.eval(), self._held)
        ours, theirs = (F.log_softmax(logits / TEMPERATURE, 1) for logits in (given, self._wanted))
        return float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True)) * TEMPERATURE**2

    def row(self, task: str, way: str, power: float) -> dict[str, Any]:
        """Rank, cut, rebalance, judge."""
        units, seconds = self.scores(way)
        bench = self.bench
        name = bench.subject.name
        row = Row(subject=name, task=task, criterion=way, ranking="global", power=power, corrected=SQUARES)
        choice = bench.choose(row, Divergence(way, dict(units), {}), bench.whole, share_of(task))
        plan = bench.structure.plan(choice.keep)
        model = apply_plan(bench.subject.model, plan)
        passes = bench.passes(SAMPLES, self.seed, at_once=True)
        rebalance_(model, bench.subject.model, bench.structure, plan, passes, Rebalance())
        return {
            "quality": round(bench.subject.quality(model), 4),
            "macs": round(bench.costs.cost(choice.keep).macs / bench.costs.cost().macs, 4),
            "more_s": round(seconds, 1),
            "left": {name: len(choice.keep[name]) for name in sorted(bench.groups(task))},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--subject", choices=["resnet20", "resnet56"], default="resnet20")
    parser.add_argument("--ways", nargs="*", choices=[INNOVATION, *WAYS], default=[INNOVATION, *WAYS], metavar="WAY")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS / "exchange.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = {"question": "Does it pay to divide a cut among groups by what each group's cut really costs?"}
    rows = Rows(options.results, KEYS, about)
    bench = Bench(build(options.subject, options.data))
    for seed in options.seeds:
        exchange = Exchange(bench, seed)
        for way in options.ways:
            for power in (0.0,) if way == INNOVATION else (1.0, 0.5):
                for task in (HALF, THIRD):
                    key = dict(zip(KEYS, (options.subject, task, way, power, seed), strict=True))
                    rows.measure(key, partial(exchange.row, task, way, power))


if __name__ == "__main__":
    main()
