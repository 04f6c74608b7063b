"""How well does each criterion know what really happens when a unit or a block goes?

    python benchmarks/truth.py --data DATA

For 200 units drawn at random over all groups, and for every block: the change of the loss on 1,024 training images when
it alone is removed, and the Spearman correlation of that change with each criterion's score, by number of calibration
images and seed. Once as it is, and once with the means put into the biases behind it ("compensated"): what would be
lost beyond a constant. Removal is by masking: the traced graph of the original runs with zeros, or with the block's
entry in place of its exit, which every cut is proved to equal. What the results hold already is not measured again.
"""

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.subjects import Subject, add_data_argument, build  # noqa: E402 - makes torchvision importable
from idap.divergence.criteria import CRITERIA  # noqa: E402
from idap.divergence.measure import Divergence, measure_all  # noqa: E402
from idap.divergence.observe import Pass  # noqa: E402
from idap.graph.trace import trace  # noqa: E402
from idap.rebalance.run import Rebalance, rebalance_  # noqa: E402
from idap.structure.analysis import Structure, analyze  # noqa: E402
from idap.surgery.apply import apply_plan  # noqa: E402
from idap.training.batch import merge_batches  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "truth.json"
UNITS, JUDGED, JUDGED_SEED = 200, 1024, 99
MEANS = Rebalance(least_squares=False, rows=4096)


def passes(subject: Subject, batches: Sequence[Any]) -> list[Pass]:
    return [
        Pass(lambda model, b=batch: subject.run(model, b), lambda outputs, b=batch: subject.loss(outputs, b))
        for batch in batches
    ]


@torch.no_grad()
def loss_of(subject: Subject, model: Any, batches: Sequence[Any]) -> float:
    losses = [float(subject.loss(subject.run(model, batch), batch)) * len(batch[0]) for batch in batches]
    return sum(losses) / sum(len(batch[0]) for batch in batches)


def changes(subject: Subject, structure: Structure, batches: Sequence[Any]) -> dict[str, Any]:
    """The change of the loss for drawn units and for every block, plain and compensated."""
    draw = np.random.default_rng(0)
    every = [(group.name, unit) for group in structure.groups for unit in range(group.size)]
    chosen = [every[place] for place in sorted(draw.choice(len(every), min(UNITS, len(every)), replace=False))]
    base = loss_of(subject, subject.model, batches)
    whole = merge_batches(subject.calibration(256, 7))
    plans = {
        f"{name} {unit}": structure.plan({name: [u for u in range(structure.group(name).size) if u != unit]})
        for name, unit in chosen
    } | {block.name: structure.plan({}, (block.name,)) for block in structure.blocks}
    found: dict[str, dict[str, float]] = {"plain": {}, "compensated": {}}
    for number, (part, plan) in enumerate(plans.items()):
        model = apply_plan(subject.model, plan)
        found["plain"][part] = loss_of(subject, model, batches) - base
        rebalance_(model, subject.model, structure, plan, passes(subject, [whole]), MEANS)
        found["compensated"][part] = loss_of(subject, model, batches) - base
        print(f"{number + 1}/{len(plans)} {part}", found["plain"][part], found["compensated"][part], flush=True)
    return {"base": base, "units": [list(pair) for pair in chosen], **found}


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (one, other)]
    return round(float(np.corrcoef(*ranks)[0, 1]), 3)


def correlations(truth: Mapping[str, Any], scores: Divergence, structure: Structure) -> dict[str, float | None]:
    rows: dict[str, float | None] = {}
    units = [(name, int(unit)) for name, unit in truth["units"] if name in scores.units]
    blocks = [block.name for block in structure.blocks if block.name in scores.blocks]
    for kind in ("plain", "compensated"):
        said = [float(scores.units[name][unit]) for name, unit in units]
        true = [truth[kind][f"{name} {unit}"] for name, unit in units]
        rows[f"units {kind}"] = spearman(said, true) if len(units) > 2 else None
        said, true = [scores.blocks[name] for name in blocks], [truth[kind][name] for name in blocks]
        rows[f"blocks {kind}"] = spearman(said, true) if len(blocks) > 2 else None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--subject", default="resnet20")
    parser.add_argument("--samples", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    subject = build(arguments.subject, arguments.data)
    args, kwargs = subject.example()
    structure = analyze(trace(subject.model, args, kwargs), contracts=subject.contracts)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known = found.get(arguments.subject, {})
    truth = known.get("truth") or changes(subject, structure, subject.calibration(JUDGED, JUDGED_SEED))
    rows = known.get("correlations", [])
    for samples in arguments.samples:
        for seed in range(arguments.seeds):
            if any((row["samples"], row["seed"]) == (samples, seed) for row in rows):
                continue
            look = passes(subject, subject.calibration(samples, seed))
            measured = measure_all(subject.model, structure, look, criteria=list(CRITERIA), seed=seed)
            for name, scores in measured.items():
                row = {"criterion": name, "samples": samples, "seed": seed, **correlations(truth, scores, structure)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    found[arguments.subject] = {
        "command": f"python benchmarks/truth.py --data DATA --subject {arguments.subject}",
        "versions": {"python": platform.python_version(), "torch": version("torch"), "numpy": version("numpy")},
        "judged": f"{JUDGED} training images drawn with seed {JUDGED_SEED}",
        "truth": truth,
        "correlations": rows,
    }
    RESULTS.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
