"""Kill every command that writes at random moments, run it again, and compare with what an undisturbed one wrote.

`python -m tests.fuzz.kills --kills 60`: the result must be equal byte for byte (but for times), nothing may be left
over that the command made on its way, and the inputs must be as they were.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch

import idap
from tests.cli.commands.test_commands import QUICK, SCRIPT
from tests.fuzz.killing import Ended, Moment, contents, differences, draw_moment, empty, run_command
from tests.fuzz.known import cause_of
from tests.fuzz.pool import ROOT

GOALS = ["--max-drop", "none", "--macs", "60%", *QUICK, "--set", "train.epochs=1", "--set", "layers.removals=1"]
COMPRESS = ["compress", "--model", "python:mine.py:build_model", "--task", "python:mine.py:task", *GOALS]


@dataclass(frozen=True)
class Scenario:
    """A command that writes.

    Attributes:
        name: for people.
        words: of the command.
        again: of the command that goes on after a kill.
        prepare: writes the inputs into a new folder.
        outputs: names of files whose bytes may differ between two undisturbed runs, with what compares them.
    """

    name: str
    words: list[str]
    again: list[str]
    prepare: Callable[[Path], None]
    outputs: tuple[str, ...] = ()


@dataclass
class Trials:
    """What came of all kills: how many hit, and what was wrong afterwards."""

    killed: Counter[str] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Stage:
    """Prepares inputs once, and performs scenarios always in one and the same folder, since paths are written down."""

    def __init__(self, home: Path) -> None:
        self.home, self.folder = home, home / "stage" / "folder"
        self.made: dict[str, Path] = {}
        self.scenarios = {each.name: each for each in self._scenarios()}
        self._run(self.scenarios["compress"])
        shutil.copytree(self.folder / "run", home / "run")
        self._stop(home / "stopped")

    def _scenarios(self) -> list[Scenario]:
        resumed = [*COMPRESS, "--run-dir", "run", "--quiet", "--resume"]
        apply = ["apply", "plan.json", "--checkpoint", "big", "--out", "small", "--max-shard-size", "300B", "--quiet"]
        new = ["recipe", "new", "--data", "digits", "--out", "mine.toml"]
        return [
            Scenario("compress", [*COMPRESS, "--run-dir", "run", "--quiet"], resumed, _script),
            self._same("resume", ["resume", "run", "--quiet"], self._stopped),
            self._same("apply", apply, self._checkpoint),
            self._same("export onnx", ["export", "run", "--out", "net.onnx", "--quiet"], self._finished),
            self._same("export pt2", ["export", "run", "--to", "pt2", "--out", "net.pt2", "--quiet"], self._finished),
            self._same(
                "export safetensors",
                ["export", "run", "--to", "safetensors", "--out", "net.safetensors", "--quiet"],
                self._finished,
            ),
            self._same("report", ["report", "run", "--quiet"], self._finished),
            self._same("compare", ["compare", "run", "run2", "--html", "both.html", "--quiet"], self._two),
            self._same("recipe new", new, _script),
        ]

    def _same(self, name: str, words: list[str], prepare: Callable[[Path], None]) -> Scenario:
        return Scenario(name, words, words, prepare)

    def _stopped(self, folder: Path) -> None:
        _script(folder)
        shutil.copytree(self.home / "stopped", folder / "run")

    def _finished(self, folder: Path) -> None:
        _script(folder)
        shutil.copytree(self.home / "run", folder / "run")

    def _two(self, folder: Path) -> None:
        self._finished(folder)
        shutil.copytree(self.home / "run", folder / "run2")

    def _checkpoint(self, folder: Path) -> None:
        shutil.copy(self.home / "run" / "model" / "plan.json", folder / "plan.json")
        plan = json.loads((folder / "plan.json").read_text())["plan"]
        torch.manual_seed(0)
        state = {name: torch.randn(shape) for name, shape in plan["shapes"].items()}
        (folder / "big").mkdir()
        safetensors.torch.save_file(state, folder / "big" / "model.safetensors")
        (folder / "big" / "config.json").write_text("{}")

    def _stop(self, place: Path) -> None:
        """A run that was killed in its middle."""
        scenario = self.scenarios["compress"]
        _start(self.folder, scenario)
        whole = self.undisturbed[scenario.name][0]
        places = [number for number, what in enumerate(whole.operations, 1) if "steps.jsonl" in what]
        run_command(scenario.words, self.folder, Moment(operation=places[len(places) // 2]))
        shutil.copytree(self.folder / "run", place)

    undisturbed: dict[str, tuple[Ended, dict[str, bytes], dict[str, bytes]]]

    def _run(self, scenario: Scenario) -> None:
        """Note what a scenario leaves that nobody disturbs."""
        if not hasattr(self, "undisturbed"):
            self.undisturbed = {}
        inputs = _start(self.folder, scenario)
        ended = run_command(scenario.words, self.folder)
        if ended.code:
            raise RuntimeError(f"idap {' '.join(scenario.words)} ends with code {ended.code}: {ended.output[-2000:]}")
        self.undisturbed[scenario.name] = ended, contents(self.folder), inputs

    def check_repeatable(self, name: str) -> list[str]:
        """What differs between two undisturbed runs: nothing could be said about those that were killed."""
        self._run(self.scenarios[name])
        first = self.undisturbed[name][1]
        self._run(self.scenarios[name])
        return differences(self.undisturbed[name][1], first, {})

    def kill(self, name: str, moment: Moment) -> tuple[bool, list[str]]:
        """Kill a command, run it again; whether the kill came before its end, and what is wrong afterwards."""
        scenario = self.scenarios[name]
        if name not in self.undisturbed:
            self._run(scenario)
        _, expected, inputs = self.undisturbed[name]
        _start(self.folder, scenario)
        first = run_command(scenario.words, self.folder, moment)
        between = contents_names(self.folder)
        told = [] if first.code in (0, -9) else [f"ends with code {first.code}: {_flat(first.output)[:400]}"]
        if first.code == 0 and name in ("compress", "recipe new"):
            left = differences(contents(self.folder), expected, inputs)
            return False, [f"{name}, not killed: {each}" for each in left]
        again = run_command(scenario.again, self.folder)
        done = name == "recipe new" and again.code == 2 and "mine.toml" in between
        if name == "apply" and first.code == 0:
            done = again.code == 2
        if again.code and not done:
            told.append(f"run again it ends with code {again.code}: {_flat(again.output)[:400]}")
        else:
            told += differences(contents(self.folder), expected, inputs)
        last = first.operations[-1] if first.operations else "nothing"
        return first.code == -9, [f"{name}, killed at {moment} ({last}): {each}" for each in told]


def _flat(output: str) -> str:
    """What was printed, without frames and line breaks."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", output)


def contents_names(folder: Path) -> set[str]:
    """The names of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _script(folder: Path) -> None:
    (folder / "mine.py").write_text(SCRIPT)


def _start(folder: Path, scenario: Scenario) -> dict[str, bytes]:
    """The inputs of a scenario, in a new folder."""
    empty(folder)
    scenario.prepare(folder)
    return contents(folder)


def perform(kills: int, seed: int, names: list[str] | None = None) -> Trials:
    """Kill the commands in turn; the same seed gives the same moments, but for those in time."""
    if ROOT / "src" not in Path(idap.__file__).parents:
        raise RuntimeError(f"idap is that of {Path(idap.__file__).parent}, not of {ROOT}; run with PYTHONPATH=src")
    torch.set_num_threads(1)  # a process that was forked has none of the other threads
    _warm()
    trials = Trials()
    with tempfile.TemporaryDirectory(prefix="idap-kills-") as home:
        stage = Stage(Path(home).resolve())
        chosen = names or list(stage.scenarios)
        for name in chosen:
            trials.problems += [f"{name}, undisturbed twice: {each}" for each in stage.check_repeatable(name)]
        sys.stdout.writelines(f"{each}\n" for each in trials.problems)
        for number in range(kills):
            name = chosen[number % len(chosen)]
            moment = draw_moment(random.Random(f"{seed}/kills/{number}"), stage.undisturbed[name][0])
            hit, told = stage.kill(name, moment)
            (trials.killed if hit else trials.late)[name] += 1
            for each in told:
                sys.stdout.write(f"kill {number}: {each}\n")
                trials.problems.append(each)
    return trials


def _warm() -> None:
    """Import what the commands import, so that kills come in the middle of the work."""


def main() -> int:
    """Run what the command line says; 1 if something was wrong after a kill."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="names of commands")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.monotonic()
    trials = perform(options.kills, options.seed, options.only)
    sys.stdout.write(
        f"{sum(trials.killed.values())} kills ({dict(trials.killed)}), {sum(trials.late.values())} too late, "
        f"{len(trials.problems)} problems, {time.monotonic() - began:.0f} s\n"
    )
    if options.json is not None:
        told = {"killed": dict(trials.killed), "late": dict(trials.late), "problems": trials.problems}
        options.json.write_text(json.dumps(told, indent=1))
    return 1 if any(not cause_of(each) for each in trials.problems) else 0


if __name__ == "__main__":
    sys.exit(main())
