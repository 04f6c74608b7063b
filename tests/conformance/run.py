"""Examine every architecture and write down what was found: `make conformance`."""

import argparse
import fnmatch
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARK = "ROW "
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"


BATCH = 8
"""How many architectures one process examines: a new one each time would mostly import, one for all would swell."""

LIMIT_S = 1800
"""How long a batch may take."""

PEER_LIMIT_S = 60
"""Seconds of processor time that Torch-Pruning may take for one model; it does not come to an end for some."""


def examine_here(names: list[str], *, peer: bool) -> None:
    """Examine some architectures in this process and print one JSON line for each."""
    warnings.simplefilter("ignore")
    import torch

    from tests.conformance.catalogue import case
    from tests.conformance.proofs import Row, examine, peer_result

    torch.set_num_threads(1)
    for name in names:
        start = time.perf_counter()
        # Processor time, so that what else the machine does makes no difference.
        limited = partial(processor_time_at_most, PEER_LIMIT_S)
        row = asdict(Row(name, peer=peer_result(case(name), limited)) if peer else examine(case(name)))
        sys.stdout.write(MARK + json.dumps(row | {"seconds": round(time.perf_counter() - start, 1)}) + "\n")
        sys.stdout.flush()


def examine_apart(names: list[str], done: Callable[[dict[str, Any]], None], *, peer: bool) -> None:
    """Examine some architectures in a process of their own; one that dies takes only its own row with it."""
    while names:
        command = [sys.executable, "-m", "tests.conformance.run", "--here", *(["--peer"] if peer else []), *names]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
                                 env=environment)  # fmt: skip
        timer = threading.Timer(LIMIT_S, child.kill)
        timer.start()
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(MARK):
                done(json.loads(line.removeprefix(MARK)))
                names = names[1:]
        timer.cancel()
        if child.wait() and names:
            from tests.conformance.proofs import Row

            late = {-signal.SIGKILL: f"no end within {LIMIT_S} s", -signal.SIGXCPU: f"no end within {PEER_LIMIT_S} s"}
            why = late.get(child.returncode, f"ends with code {child.returncode}")
            done(asdict(Row(names[0], peer=why) if peer else Row(names[0], failure=why)) | {"seconds": 0.0})
            names = names[1:]


def processor_time_at_most(seconds: int) -> None:
    """Let this process end once it has used so many more seconds of processor time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def versions() -> dict[str, str]:
    """What the results were found with."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "timm", "transformers", "diffusers", "torch-pruning", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    """Examine what is asked for, keep the other rows of the results, and write them anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="patterns such as timm:* or *swin*; all by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--missing", action="store_true", help="only what the results lack or what failed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--peer", action="store_true", help="what Torch-Pruning does with them, and nothing else")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        examine_here(arguments.names, peer=arguments.peer)
        return
    from tests.conformance.catalogue import CASES

    kept = json.loads(arguments.results.read_text())["models"] if arguments.results.exists() else []
    rows = {row["model"]: row for row in kept}
    wanted = [c.name for c in CASES if any(fnmatch.fnmatch(c.name, p) for p in arguments.names or ["*"])]
    if arguments.missing:
        wanted = [name for name in wanted if name not in rows or _lacking(rows[name], peer=arguments.peer)]
    lock = threading.Lock()
    finished = 0

    def done(row: dict[str, Any]) -> None:
        nonlocal finished
        with lock:
            finished += 1
            old = rows.get(row["model"], {})
            # Each kind of run keeps what the other found.
            rows[row["model"]] = (
                {**row, **old, "peer": row["peer"]} if arguments.peer else {**row, "peer": old.get("peer", "")}
            )
            told = f"{row['model']}: {row['peer']}" if arguments.peer else summary(row)
            sys.stdout.write(f"[{finished}/{len(wanted)}] {told}\n")
            sys.stdout.flush()
            _write(arguments.results, [rows[c.name] for c in CASES if c.name in rows])

    with ThreadPoolExecutor(arguments.workers) as pool:
        size = 1 if arguments.peer else BATCH
        batches = [wanted[start : start + size] for start in range(0, len(wanted), size)]
        for result in [pool.submit(examine_apart, batch, done, peer=arguments.peer) for batch in batches]:
            result.result()


def _lacking(row: dict[str, Any], *, peer: bool) -> bool:
    return not row["peer"] if peer else bool(row["failure"]) or not row["nodes"]


def summary(row: dict[str, Any]) -> str:
    """One line about one architecture."""
    if row["failure"]:
        return f"{row['model']}: FAILED {row['failure']}"
    numbers = " ".join(
        f"{name}={row[name]:.0e}" if row[name] is not None else f"{name}=-" for name in ("permuted", "cut", "single")
    )
    return (
        f"{row['model']}: export {row['export_s']:.1f} s, analysis {row['analysis_s']:.2f} s, {row['groups']} groups, "
        f"{row['prunable']:.0%} prunable, {row['removed']:.0%} removed, {numbers} rolled={row['rolled_caught']} "
        f"blocks {row['blocks_exact']}/{row['blocks']} sets={row['sets_exact']} {row['rewritten'] or ''}"
    )


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    command = "python -m tests.conformance.run " + " ".join(sys.argv[1:])
    text = json.dumps({"command": command.strip(), "seed": 0, "versions": versions(), "models": rows}, indent=1)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
