"""Run folders as `compress` writes them, made in no time: three blocks with a group each, in a stream."""

from pathlib import Path

from idap.record import AFTER, BEFORE, MEASURED, RESULT, RunFolder
from idap.steps import Curve, Removal, Step

BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
HOSTILE = '<script>window.broken = true</script>"><img src=x onerror=alert(1)>'


def settings(*, prefix: str = "", **changes):
    """What is written before any decision; `prefix` begins every name of the network."""
    groups = {f"{prefix}stem": {"kind": "channels", "size": 16, "stream": True}}
    groups |= {f"{prefix}{name}.fc": {"kind": "neurons", "size": 20, "stream": False} for name in BLOCKS}
    blocks = {f"{prefix}{b}": {"kind": "block", "contains": [], "groups": [f"{prefix}{b}.fc"]} for b in BLOCKS}
    written = {
        "model": "mine.Net",
        "fingerprint": "f" * 64,
        "config": {"macs": 0.5, "max_drop": 0.01, "latency": None, "recovery": {"epochs": 1.0, "lr": 0.02}},
        "task": {"metric": "accuracy", "higher_is_better": True, "worst": 0.96},
        "baseline": {"metric": 0.97, "macs": 2_000_000, "parameters": 40_000, "size": 161_000},
        "environment": {
            "idap": "0.1.0",
            "python": "3.11.7",
            "torch": "2.13.0",
            "platform": "Linux",
            "device": "cpu",
            "threads": 2,
            "processes": 1,
            "begun": "2026-01-02T03:04:05+00:00",
            "folder": "/home/me/my nets",
            "command": ["/usr/bin/idap", "compress", "my net.toml"],
        },
        "groups": groups,
        "blocks": blocks,
        "preparation": {"structure": 0.5, "other": 0.1},
        "recipe": {"model": {"build": "python:mine.py:Net"}, "data": {"name": "digits"}},
    }
    return written | changes


def decision(index, macs, metric, *removed, stage="filters", accepted=True, prefix="", curve=True):
    """One decision; `removed` are group names with the units that went, or names of blocks."""
    return Step(
        index=index,
        stage=stage,
        removed=tuple(_removal(prefix, *each) if isinstance(each, tuple) else _block(prefix, each) for each in removed),
        macs=round(2_000_000 * macs),
        parameters=round(40_000 * macs),
        metric=metric,
        accepted=accepted,
        reason="within the budget" if accepted else "outside the budget; next step 5.0% of the units",
        error=1e-7,
        seconds=3.0 + index,
        shares={"macs": macs, "parameters": macs, "size": macs + 0.01},
        phases={"measurement": 1.0, "cut": 0.2, "recovery": 1.8 + index},
        curve=Curve(
            title=f"{stage} {index}: recovery",
            steps=40,
            losses=(0.5, 0.3, 0.25),
            metrics=((0, 0.9), (20, 0.95), (40, metric)),
        )
        if curve
        else None,
    )


def _removal(prefix, name, units, left):
    scores = tuple(0.001 * (unit + 1) for unit in range(units))
    return Removal(
        name=f"{prefix}{name}",
        kind="neurons",
        units=tuple(range(units)),
        left=left,
        divergence=(scores[0], scores[-1]),
        scores=scores,
        ranks=tuple(range(units)),
        cost=1000.0,
    )


def _block(prefix, name):
    return Removal(name=f"{prefix}{name}", kind="block", units=(), left=0, divergence=(0.25, 0.25), scores=(0.25,))


def steps(prefix=""):
    """Two steps of filters that are kept, one that is not, a block, and the last recovery."""
    return [
        decision(0, 0.8, 0.968, ("blocks.0.fc", 8, 12), ("blocks.1.fc", 4, 16), prefix=prefix),
        decision(1, 0.55, 0.93, ("blocks.0.fc", 6, 6), accepted=False, prefix=prefix),
        decision(2, 0.7, 0.965, ("blocks.0.fc", 3, 9), prefix=prefix),
        decision(3, 0.48, 0.962, "blocks.1", stage="layers", prefix=prefix),
        decision(4, 0.48, 0.966, stage="final", prefix=prefix),
    ]


def profile(scale=1.0, *, prefix="", without=()):
    names = ["stem", *(f"{block}.fc" for block in BLOCKS)]
    units = {
        f"{prefix}{name}": {"low": 1e-4 * scale, "mean": 0.01 * scale * (place + 1), "high": 0.2 * scale}
        for place, name in enumerate(names)
        if name not in without
    }
    blocks = {f"{prefix}{name}": 0.3 * scale for name in BLOCKS if f"{name}.fc" not in without}
    return {"criterion": "innovation", "units": units, "blocks": blocks, "unmeasured": []}


REACHED = {
    "reached": True,
    "message": "every goal was reached",
    "metric": 0.966,
    "macs": 960_000,
    "parameters": 19_200,
    "size": 78_890,
    "latency": None,
    "output_error": 0.02,
    "removed": ["blocks.1"],
    "seconds": {"structure": 0.5, "other": 0.1, "measurement": 6.0, "cut": 1.0, "recovery": 19.0, "judging": 0.4},
    "ended": "2026-01-02T03:05:05+00:00",
}
MEASUREMENT = {
    "parameters": {"before": 40_000, "after": 19_200},
    "macs": {"before": 2_000_000, "after": 960_000},
    "metric_name": "accuracy",
    "val": {"before": 0.97, "after": 0.966},
    "test": {"before": 0.965, "after": 0.96},
    "latency": {"before": 0.004, "after": 0.0025},
    "batch": 64,
}


def write_run(folder: Path, *, finished: bool = True, prefix: str = "", decided=None, **changes) -> Path:
    """Write a run; unfinished, it has its first decisions only."""
    run = RunFolder(folder)
    run.open(settings(prefix=prefix, **changes))
    run.keep(BEFORE, profile(prefix=prefix))
    for step in steps(prefix) if decided is None else decided:
        run.add(step)
    if finished:
        run.keep(AFTER, profile(2.0, prefix=prefix, without=("blocks.1.fc",)))
        run.keep(RESULT, REACHED | {"removed": [f"{prefix}blocks.1"]})
        run.keep(MEASURED, MEASUREMENT)
    return folder
