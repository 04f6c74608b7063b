"""At equal measured latency, does the latency table keep more of a network than counting multiply-adds does?

    python benchmarks/equal_latency.py --data DATA [--networks resnet56 vit resnet50 ...] [--batches 1 16]

CIFAR-10 networks with public weights (resnet20, resnet56, vit) are compressed by `idap.compress` without training, in
one shot of stage 1, to a few shares of their latency: once with units counted in multiply-adds and any width ("macs"),
once with all that a goal of latency brings ("table": score per second as well, widths at the steps, whichever loses
least). Kept is the accuracy on test images that decide nothing. Networks for ImageNet have no weights at hand: ranked
by the L2 norm per multiply-add ("macs"), per second ("table"), or per second with widths at the steps ("steps"), kept
is the share of all norms that is left. All cuts and the original take turns in one process in the end, so that the
latencies compare; what is kept at one and the same latency is read off parallel lines, one through the cuts of each
way. Rows already in the results are not measured again. It needs a core for itself.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench import NONE, Bench, Protocol, cifar_bench
from benchmarks.harness import RESULTS, Rows
from benchmarks.latency import RANKINGS, Subject, example, has_images, networks
from benchmarks.rows import vit_bench
from benchmarks.subjects import add_data_argument
from idap import Config, FilterStage, LayerStage, compress, measure_latency
from idap.compress.latency_table import latency_share
from idap.selection.reach import cost_at_latency

KEYS = ("network", "batch", "share")
REAL = ("resnet20", "resnet56", "vit")
AROUND = (0.9, 1.0, 1.1)
"""Each way cuts to the wanted latency times these."""
SECONDS, FEWEST, MOST = 60.0, 15, 400
"""How long all cuts of a row take turns in the end, and how many passes of each there are at least and at most."""
Kept = tuple[nn.Module, float]


def by_accuracy(bench: Bench, batch: int, share: float, which: str) -> Kept:
    """Compress a network with weights, and judge it."""
    filters = FilterStage(schedule="one-shot", multiples={"*": 1} if which == "macs" else {})
    config = Config(
        latency=share,
        latency_batch=batch,
        max_drop=None,
        cost="macs" if which == "macs" else "latency",
        filters=filters,
        layers=LayerStage(removals=0),
        recovery=NONE,
        calibration_batches=4,
    )
    result = compress(bench.model, bench.task, config)
    return result.model.eval(), bench.accuracy(result.model)


def by_norm(subject: Subject, batch: int, seconds: float, share: float, which: str) -> Kept:
    """Cut a network without weights down to a measured latency."""
    ranking, steps = subject.ranking(None if which == "macs" else subject.table(batch, seconds))
    if which != "steps":
        steps = {}
    inputs = example(subject.name, batch)
    cuts: dict[float, tuple[nn.Module, float]] = {}

    def latency_at(macs: float) -> float:
        small, _, kept = subject.cut(ranking, steps, macs)
        cuts[macs] = small, kept
        return latency_share(subject.model, small, inputs, seconds=2.0)

    return cuts[cost_at_latency(latency_at, (1.0, 1.0), share, least=0.05)]


def row(
    original: nn.Module, inputs: Any, share: float, ways: Sequence[str], cut: Callable[[float, str], Kept], base: float
) -> dict[str, Any]:
    """All cuts, timed in turn with the original, and what each way keeps at the wanted share of the latency."""
    found = {(way, around): cut(share * around, way) for way in ways for around in AROUND}
    models = {"original": original, **{f"{way} {around}": model for (way, around), (model, _) in found.items()}}
    once = measure_latency(models, *inputs, repeats=3, warmup=1)
    repeats = int(min(MOST, max(FEWEST, SECONDS / sum(each.median for each in once.values()))))
    times = measure_latency(models, *inputs, repeats=repeats, warmup=3)
    whole = times["original"].median
    lines: dict[str, list[list[float]]] = {}
    for (way, around), (_, kept) in found.items():
        lines.setdefault(way, []).append([round(times[f"{way} {around}"].median / whole, 4), round(kept, 4)])
    return {
        "original": round(base, 4),
        "original_ms": round(1000 * whole, 3),
        "repeats": repeats,
        "kept": {way: round(kept, 4) for way, kept in at(lines, share).items()},
        "latency_and_kept": lines,
    }


def at(lines: Mapping[str, Sequence[Sequence[float]]], latency: float) -> dict[str, float]:
    """What each way keeps at one latency: parallel lines through the points, of latency and what is kept, of each."""
    points = {way: np.asarray(line) for way, line in lines.items()}
    middle = {way: line.mean(0) for way, line in points.items()}
    apart = np.concatenate([line - middle[way] for way, line in points.items()])
    slope = float((apart[:, 0] * apart[:, 1]).sum() / (apart[:, 0] ** 2).sum())
    return {way: float(kept + slope * (latency - mean)) for way, (mean, kept) in middle.items()}


def real(name: str, data: Path, batch: int, share: float) -> dict[str, Any]:
    """The row of a network with weights."""
    protocol = Protocol(device="cpu", train=1000, recovery=NONE)
    bench = vit_bench(data, 0) if name == "vit" else cifar_bench(name, data, protocol, 0)
    inputs = ((torch.randn(batch, 3, 32, 32),), {})
    found = row(bench.model, inputs, share, RANKINGS, partial(by_accuracy, bench, batch), bench.accuracy(bench.model))
    return {"measure": "accuracy", **found}


def random(name: str, build: Callable[[], nn.Module], batch: int, share: float, seconds: float) -> dict[str, Any]:
    """The row of a network without weights."""
    subject = Subject.of(name, build)
    cut = partial(by_norm, subject, batch, seconds)
    found = row(subject.model, example(name, batch), share, (*RANKINGS, "steps"), cut, 1.0)
    return {"measure": "share of the norms", "channels_last": has_images(name), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--networks", nargs="*", default=None)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--share", type=float, default=0.6, help="of the latency")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table-seconds", type=float, default=0.3)
    parser.add_argument("--results", type=Path, default=RESULTS / "equal_latency.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = {"question": "At equal measured latency, does the latency table keep more than counting multiply-adds?"}
    rows = Rows(options.results, KEYS, about)
    for name in options.networks or [*REAL, *networks()]:
        for batch in options.batches:
            key = {"network": name, "batch": batch, "share": options.share}
            if name in REAL:
                rows.measure(key, partial(real, name, options.data, batch, options.share))
            else:
                build = networks()[name]
                rows.measure(key, partial(random, name, build, batch, options.share, options.table_seconds))


if __name__ == "__main__":
    main()
