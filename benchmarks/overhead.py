"""What does measuring cost beside the forward passes that it needs?

    python benchmarks/overhead.py                # needs the extra vision

ResNet-50 at 224 and ViT-S/16, random weights: the plain forward passes over some batches against the same passes with
all forward criteria measured together, alternating in one process; then `innovation` over as many batches as make 512
images. Peak memory is that of a process of its own for each way. Processor time of one thread, so that other processes
on the machine hardly matter.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "overhead.json"
sys.path.insert(0, str(ROOT))

from tests.conformance import vision_operators  # noqa: E402 - the project's own environments only

vision_operators.make_importable()

from idap.divergence.measure import measure_all  # noqa: E402
from idap.divergence.observe import Pass  # noqa: E402
from idap.graph.trace import trace  # noqa: E402
from idap.structure.analysis import analyze  # noqa: E402

FORWARD = ("relative", "fluctuation", "paper", "share", "activation")
BATCH, BATCHES, REPEATS = 8, 8, 5
AGAIN = 8
"""So many times the same batches make 512 images."""


def network(name: str) -> torch.nn.Module:
    import timm  # noqa: PLC0415

    return timm.create_model({"resnet50": "resnet50", "vit_s_16": "vit_small_patch16_224"}[name]).eval()


def run(name: str, way: str, repeats: int) -> dict[str, Any]:
    """Time one way, or both by turns, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batches = network(name), [torch.randn(BATCH, 3, 224, 224) for _ in range(BATCHES)]
    structure = analyze(trace(model, (batches[0][:2],)))
    passes = [Pass(lambda m, b=batch: m(b)) for batch in batches]

    def plain() -> None:
        with torch.no_grad():
            for each in passes:
                each.run(model)

    ways = {
        "plain": plain,
        "forward": lambda: measure_all(model, structure, passes, criteria=FORWARD),
        "innovation": lambda: measure_all(model, structure, passes * AGAIN, criteria=["innovation"]),
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):  # the first one warms up
        for each in ("plain", "forward") if way == "pairs" else (way,):
            start = time.process_time()
            ways[each]()
            if repeat or not repeats:
                seconds.setdefault(each, []).append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_gib": round(peak / 2**20, 3), "before_gib": round(before / 2**20, 3)}


def apart(name: str, way: str, repeats: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--here", name, way, str(repeats)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forward", action="store_true", help="only the forward criteria; keep the other numbers")
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        name, way, repeats = arguments.here
        print(json.dumps(run(name, way, int(repeats))))
        return
    rows: list[dict[str, Any]] = []
    kept = json.loads(RESULTS.read_text())["rows"] if arguments.forward else []
    before = {row["model"]: row for row in kept}
    for name in ("resnet50", "vit_s_16"):
        pairs = apart(name, "pairs", REPEATS)["seconds"]
        ways = ("plain", "forward") if arguments.forward else ("plain", "forward", "innovation")
        alone = {way: apart(name, way, 0) for way in ways}
        ratios = [f / p for f, p in zip(pairs["forward"], pairs["plain"], strict=True)]
        plain = statistics.median(pairs["plain"])
        per_512 = plain * AGAIN
        rows.append(
            {
                "model": name,
                "images": BATCH * BATCHES,
                "plain_s": round(plain, 3),
                "forward_criteria": list(FORWARD),
                "forward_ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "peak_gib": {way: found["peak_gib"] for way, found in alone.items()},
                "peak_ratio": round(alone["forward"]["peak_gib"] / alone["plain"]["peak_gib"], 3),
            }
        )
        if arguments.forward:
            old = before[name]
            rows[-1] |= {key: old[key] for key in ("innovation_s", "innovation_to_plain_512")}
            rows[-1]["peak_gib"]["innovation"] = old["peak_gib"]["innovation"]
        else:
            seconds = alone["innovation"]["seconds"]["innovation"][0]
            rows[-1] |= {"innovation_s": round(seconds, 1), "innovation_to_plain_512": round(seconds / per_512, 2)}
        print(rows[-1], flush=True)
    packages = ("torch", "timm", "numpy")
    document = {
        "command": "python benchmarks/overhead.py",
        "machine": f"{platform.machine()}, 1 thread, processor time",
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        "seed": 0,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
