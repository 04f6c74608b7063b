"""Run some cases of one kind in this process, and tell of each on the standard output, a line of JSON each.

A line `begin` comes before a case is tried, so that whoever reads knows which one ended the process.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from idap.errors import IdapError
from tests.fuzz.cases import KINDS, SELF, Broken, Trial, describe_error, dice_of, kind_of
from tests.fuzz.watch import GROWTH, Watch, bound_memory, bound_time, peak, reset_peak


def main() -> None:
    """Run the cases that the command line names."""
    options = _options()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a case prints is no line of the record
    torch.set_num_threads(1)
    home = Path(options.folder)
    (home / "outside").mkdir(parents=True)
    os.chdir(home)
    kind = kind_of(options.kind)(home / "valid")
    watch = Watch()
    bound_memory()
    say(out, ready=True)
    for number in range(options.first, options.last):
        folder = home / "case"
        _remove(folder)
        folder.mkdir()
        trial = kind.make(number, dice_of(options.seed, options.kind, number), folder)
        say(out, begin=number, about=trial.about)
        if options.keep:
            subprocess.run(["cp", "-a", f"{folder}/.", options.keep], check=True)
        say(out, end=number, **run(trial, folder, watch))
    say(out, done=True)
    out.flush()
    os._exit(0)  # memory that a case has spoilt is no failure of the interpreter's end


def say(out: Any, **told: Any) -> None:
    """Write a line, at once."""
    out.write(json.dumps(told) + "\n")


def run(trial: Trial, folder: Path, watch: Watch) -> dict[str, Any]:
    """Try one input; gives how often it was accepted or refused, and the failures."""
    outcomes: Counter[str] = Counter()
    failures: list[tuple[str, str]] = []
    modes, began = _modes(), time.monotonic()
    bound_time()
    for name, action in trial.actions.items():
        before = reset_peak()
        outcome, failure = attempt(action, folder, watch)
        outcomes[outcome] += 1
        failures += [(name, each) for each in failure]
        grown = peak() - before
        if grown > GROWTH and name != "forward":
            failures.append((name, f"memory: grew by {grown / 2**20:.0f} MiB"))
        for change in _modes_changed(modes):
            failures.append((name, f"executed: {change}"))
    gc.collect() if outcomes["failed"] else None
    return {"outcomes": outcomes, "failures": failures, "seconds": time.monotonic() - began}


def attempt(action: Callable[[], str], folder: Path, watch: Watch) -> tuple[str, list[str]]:
    """Do one thing; gives its outcome and the failures."""
    failures = []
    try:
        with watch.on(folder):
            outcome = action()
    except IdapError:
        outcome = "refused"
    except Broken as error:
        outcome, failures = "failed", [str(error)]
    except BaseException as error:
        outcome, failures = "failed", [] if watch.found else [f"raw: {describe_error(error)}"]
    return outcome, [*failures, *watch.found]


def _modes() -> dict[str, Any]:
    """What all code in this process shares, and no input may change."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default type": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "mkldnn": torch.backends.mkldnn.enabled,
        "folder": Path.cwd(),
        "path": tuple(sys.path),
        "environment": dict(os.environ),
    }


def _modes_changed(before: dict[str, Any]) -> list[str]:
    now = _modes()
    changed = [name for name in before if before[name] != now[name]]
    before.update(now)
    return [f"changed {name} of the process" for name in changed]


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.worker")
    parser.add_argument("kind", choices=[*KINDS, SELF])
    parser.add_argument("folder")
    for name in ("seed", "first", "last"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--keep", help="copy the first input there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
