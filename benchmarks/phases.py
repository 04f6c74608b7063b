"""Where does the time of a compression go?

    python benchmarks/phases.py --data DATA        # about ten minutes on one core

ResNet-20 on CIFAR-10 to half of its multiply-adds by `idap.compress` with its defaults, and the seconds that the run
itself counted by kind of work (`Result.seconds`): without recovery, and with one after each accepted change, from 5,000
or 20,000 training images. "work of our own" is all but training, judging on validation data and the refit of layers:
tracing, measuring, choosing, cutting, proving and the records. A task takes 2,000 test images to decide. Rows already
in the results are not measured again.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench import NONE, Protocol, cifar_bench
from benchmarks.harness import RESULTS, Rows
from benchmarks.subjects import add_data_argument
from idap import Config, Recovery, compress

KEYS = ("network", "images")
FOREIGN = ("recovery", "judging", "rebalance")
"""Kinds of work that a run of hours consists of by its nature, or that replaces training."""


def measured(data: Path, network: str, images: int) -> dict[str, Any]:
    """One row; `images` are learnt from after each change, 0: no recovery."""
    recovery = Recovery(epochs=1, lr=0.005, distil=0.9) if images else NONE
    bench = cifar_bench(network, data, Protocol(device="cpu", train=images or 1000, recovery=recovery), 0)
    config = Config(macs=0.5, max_drop=None, recovery=recovery, final=recovery, calibration_batches=4)
    with tempfile.TemporaryDirectory() as folder:
        result = compress(bench.model, bench.task, config, run_dir=Path(folder) / "run")
    whole = sum(result.seconds.values())
    own = whole - sum(result.seconds.get(kind, 0.0) for kind in FOREIGN)
    return {
        "seconds": {kind: round(spent, 1) for kind, spent in sorted(result.seconds.items(), key=lambda pair: -pair[1])},
        "own_share": round(own / whole, 4),
        "steps": len(result.steps),
        "accuracy": round(bench.accuracy(result.model), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--images", nargs="*", type=int, default=[0, 5_000, 20_000])
    parser.add_argument("--results", type=Path, default=RESULTS / "phases.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(options.results, KEYS, {"question": "Where does the time of a compression go?"})
    for images in options.images:
        key = {"network": "resnet20", "images": images}
        rows.measure(key, partial(measured, options.data, "resnet20", images))


if __name__ == "__main__":
    main()
