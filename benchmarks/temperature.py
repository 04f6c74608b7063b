"""Which temperature should a short recovery learn the original's logits at?

    python benchmarks/temperature.py --data DATA        # about ten minutes on one core

ResNet-20 on CIFAR-10 at 1/2.1 of its multiply-adds, cut by idap's stage 1 and by a criterion of Torch-Pruning, then
recovered from 10,000 training images twice at each temperature. The public weights know the training images by heart,
so the original is almost certain of each of them; 2,000 test images decide which state of a recovery is kept, the other
8,000 are reported on. Rows already in the results are not measured again.
"""

import argparse
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench import Bench, cifar_bench
from benchmarks.compress_cifar import METHODS, PROTOCOLS, SHARES
from benchmarks.harness import RESULTS, Rows, recover
from benchmarks.subjects import add_data_argument

KEYS = ("network", "method", "temperature", "lr", "seed")
STARTS = ("idap: filters", "torch-pruning fpgm")
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0)
LR = 0.01


@cache
def cut(bench: Bench, method: str) -> nn.Module:
    """The network without any training."""
    return METHODS[method](bench, SHARES["1/2.1"], Rows(Path("nowhere"), KEYS, {})).model


def measured(bench: Bench, method: str, temperature: float) -> dict[str, Any]:
    """One row."""
    model = cut(bench, method)
    recovery = replace(bench.protocol.recovery, lr=LR, temperature=temperature, average=False, seed=bench.seed)
    found = recover(model, bench.teacher, bench.task, recovery)
    return {
        "before": bench.accuracy(model),
        "deciding": round(100 * found.quality, 2),
        "after": bench.accuracy(found.model),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "temperature.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(options.results, KEYS, {"question": "Which temperature should a short recovery learn at?"})
    bench = cifar_bench("resnet20", options.data, PROTOCOLS["cpu"], options.seed)
    for method in STARTS:
        for temperature in TEMPERATURES:
            key = {"network": "resnet20", "method": method, "temperature": temperature, "lr": LR, "seed": options.seed}
            rows.measure(key, partial(measured, bench, method, temperature))


if __name__ == "__main__":
    main()
