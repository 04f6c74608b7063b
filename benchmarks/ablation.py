"""What does each part of the method add, at equal cost and after an equal recovery?

    python benchmarks/ablation.py --data DATA             # about three hours on one core
    python benchmarks/ablation.py --data DATA --tiny      # the same rows from a few images, to try the script

ResNet-20 on CIFAR-10 at half of the multiply-adds. Every row is `idap.compress` with its defaults but for one setting,
and layers go unasked (against="nothing") where nothing else is said, as was the default when most rows were measured,
without training in between; then the same recovery for all, 5,000 images twice, without the average of weights. 2,000
test images decide, also of the best state of the recovery; the others are reported on. Three seeds draw the calibration
images and those of the recovery, and their order. Rows already in the results are not measured again.

Questions, each with the defaults as the row to compare with:
    stages         filters only and layers only, against both; layers only stops at the first block below the target
    against        both stages, but a layer goes only where filters that save as much would lose more: the default now
    order          of the stages; "interleaved" needs a criterion that scores blocks, so the orders are compared with
                   the criterion "relative" too
    growth         alpha, how the share that a step removes grows from a small one; from the default one (rows without
                   rho_0, one seed) there are too few steps for it to matter
    first_share    rho_0, the share that the first step removes
    schedule       growing steps, steps of equal cost, and one-shot
    replacement    of what stage 2 removes: the identity, or a projection that is fitted
    rebalance      with and without corrections in closed form
    criterion      one criterion for both levels: "paper" and "relative"; the default takes "relative" for blocks only
    distillation   with and without the original as teacher in the recovery
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench import Bench, Protocol, cifar_bench, ours
from benchmarks.harness import RESULTS, Rows
from benchmarks.subjects import add_data_argument
from idap import Recovery
from idap.compress.config import FilterStage, LayerStage

SHARE = 1 / 2
KEYS = ("question", "setting", "seed")
DEFAULT = "defaults"
"""The row that all others differ from by one setting."""
RECOVERY = Recovery(epochs=2, lr=0.01, distil=0.9, temperature=8.0, average=False)
FULL = Protocol(device="cpu", train=5000, recovery=RECOVERY)
TINY = Protocol(device="cpu", train=128, val=64, calibration=128, batch=64, recovery=FULL.recovery)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What differs from the defaults.

    Attributes:
        config: settings of `Config`.
        filters: settings of stage 1.
        layers: settings of stage 2.
        recovery: settings of the recovery.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    filters: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)
    recovery: Mapping[str, Any] = field(default_factory=dict)

    def measure(self, bench: Bench, rows: Rows) -> dict[str, Any]:
        """One row."""
        layers = LayerStage(**{"against": "nothing", **self.layers})
        stages = {"filters": FilterStage(**self.filters), "layers": layers}
        recovery = replace(bench.protocol.recovery, **self.recovery)
        mine = bench.under(replace(bench.protocol, recovery=recovery))
        return mine.row(SHARE, ours(**stages, **self.config), rows)


RELATIVE = {"criterion": "relative"}
QUESTIONS: Mapping[str, Mapping[str, Variant]] = {
    DEFAULT: {DEFAULT: Variant()},
    "stages": {
        "filters only": Variant(layers={"removals": 0}),
        "layers only": Variant(filters={"steps": 0}, layers={"removals": 1000}),
    },
    "against": {"filters": Variant(layers={"against": "filters"})},
    "order": {
        "layers-filters": Variant(config={"order": "layers-filters"}),
        "filters-layers, relative": Variant(config={"order": "filters-layers", **RELATIVE}),
        "layers-filters, relative": Variant(config={"order": "layers-filters", **RELATIVE}),
        "interleaved, relative": Variant(config={"order": "interleaved", **RELATIVE}),
    },
    "growth": {
        f"alpha = {growth:g}, rho_0 = 0.025": Variant(filters={"growth": growth, "first_share": 0.025})
        for growth in (0.0, 3.0)
    },
    "first_share": {f"rho_0 = {share:g}": Variant(filters={"first_share": share}) for share in (0.025, 0.05, 0.2)},
    "schedule": {name: Variant(filters={"schedule": name}) for name in ("even", "one-shot")},
    "replacement": {"projection": Variant(layers={"replacement": "projection"})},
    "rebalance": {"no corrections": Variant(config={"rebalance": None})},
    "criterion": {name: Variant(config={"criterion": name}) for name in ("paper", "relative")},
    "distillation": {"labels only": Variant(recovery={"distil": 0.0})},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--questions", nargs="*", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a few images, one seed, results thrown away")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.json" if options.tiny else RESULTS / "ablation.json"
        run(options, options.results or path)


def run(options: argparse.Namespace, path: Path) -> None:
    """Measure what is missing, all questions of one seed before the next seed."""
    protocol = TINY if options.tiny else FULL
    about = {
        "question": "What does each part of the method add, at equal cost and after an equal recovery?",
        "network": "resnet20",
        "macs": SHARE,
        "protocol": asdict(protocol),
        "memory": "peak_gib is the most resident memory of the whole process (VmHWM, set back before each part)",
    }
    rows = Rows(path, KEYS, about)
    for seed in options.seeds[:1] if options.tiny else options.seeds:
        bench = cifar_bench("resnet20", options.data, protocol, seed)
        if options.tiny:
            bench.subject = replace(bench.subject, test=bench.subject.test[:1])
        for question in options.questions:
            for setting, variant in QUESTIONS[question].items():
                key = {"question": question, "setting": setting, "seed": seed}
                rows.measure(key, lambda v=variant, b=bench: v.measure(b, rows))


if __name__ == "__main__":
    main()
