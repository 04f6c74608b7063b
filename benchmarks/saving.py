"""How long does it take to save and to load a compressed network?

    python benchmarks/saving.py [--networks resnet50]

Each network loses every second unit of every group. Saving writes `model.safetensors` and `plan.json`; loading reads
them into a freshly built original, in memory or on the meta device, whose building is timed apart. Medians of a few
times, with files that the system has in its cache. Rows already in the results are not measured again.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import RESULTS, Rows
from benchmarks.latency import example, networks
from idap import analyze, apply_plan, load, trace
from idap.saving.checkpoint import save

KEYS = ("network",)
TIMES = 7


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    found = call()
    return time.perf_counter() - begun, found


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def row(name: str, build: Callable[[], nn.Module]) -> dict[str, Any]:
    """Save and load a network a few times."""
    model = build().eval()
    structure = analyze(trace(model, *example(name, 2)))
    plan = structure.plan({group.name: range(0, group.size, 2) for group in structure.groups})
    small = apply_plan(model, plan)
    spent: dict[str, list[float]] = {kind: [] for kind in ("save", "build", "load", "build_meta", "load_meta")}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(TIMES):
            seconds, _ = timed(lambda: save(Path(folder) / "small", small, plan))
            spent["save"].append(seconds)
            for kind, make in (("", build), ("_meta", partial(on_meta, build))):
                seconds, fresh = timed(make)
                spent[f"build{kind}"].append(seconds)
                seconds, loaded = timed(partial(load, Path(folder) / "small", fresh))
                spent[f"load{kind}"].append(seconds)
                held = dict(loaded.state_dict())
                assert all(torch.equal(held[key], value) for key, value in small.state_dict().items())
        size = (Path(folder) / "small" / "model.safetensors").stat().st_size
    medians = {f"{kind}_s": round(statistics.median(each), 3) for kind, each in spent.items()}
    together = statistics.median(a + b for a, b in zip(spent["save"], spent["load"], strict=True))
    return {**medians, "save_and_load_s": round(together, 3), "megabytes": round(size / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=["resnet50"])
    parser.add_argument("--results", type=Path, default=RESULTS / "saving.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(options.results, KEYS, {"question": "How long does it take to save and to load a compressed network?"})
    for name in options.networks:
        rows.measure({"network": name}, partial(row, name, networks()[name]))


if __name__ == "__main__":
    main()
