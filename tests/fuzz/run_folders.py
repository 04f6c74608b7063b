"""Run folders of finished and unfinished runs, with changed files and lines."""

import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from idap.cli.failure import state_of as told_state
from idap.compress.result import Result
from idap.compress.run import compress
from idap.recipes.runs import model_folder, recipe_of_run
from idap.record import CHECKPOINTS, MODEL, RESULT, RUN, STEPS
from idap.report.comparing import compare_page
from idap.report.page import run_page
from idap.report.reading import read_run
from tests.compress.tiny import config, task, train_net
from tests.fuzz import structural
from tests.fuzz.cases import CHECKED_RUNS, Broken, Trial, command, first_difference, state_of
from tests.report.runs import write_run

SETTINGS = {"max_drop": 0.03, "macs": 0.4}
RECIPE = {"model": {"build": "idap:digits_vit"}, "data": {"name": "digits"}, "goals": {"macs": 0.4, "max_drop": 0.03}}
HOSTILE_MARKUP = "<img src=x onerror="


class Runs:
    """Makes run folders: real ones of a tiny network, and made-up ones with all that a report can show."""

    def __init__(self, home: Path) -> None:
        self.net = train_net()
        self.finished, self.stopped = home / "finished", home / "stopped"
        self.undisturbed = self._resumed(self.finished)
        shutil.copytree(self.finished, self.stopped)
        steps = (self.stopped / STEPS).read_text().splitlines(keepends=True)
        (self.stopped / STEPS).write_text("".join(steps[:-2]))
        for each in (RESULT, "divergence-after.json"):
            (self.stopped / each).unlink()
        shutil.rmtree(self.stopped / MODEL)
        self.shown = write_run(home / "shown")
        self.texts = {
            file.name: file.read_bytes() for folder in (self.finished, self.shown) for file in folder.glob("*.json*")
        }

    def _resumed(self, folder: Path) -> Result:
        return compress(self.net, task(), config(**SETTINGS), run_dir=folder, resume=True, recipe=RECIPE)

    def make(self, number: int, dice: random.Random, folder: Path) -> Trial:
        source = dice.choice((self.finished, self.stopped, self.shown, self.shown))
        run = folder / "run"
        shutil.copytree(source, run)
        told = [self._change(run, dice, folder.parent / "outside") for _ in range(dice.choice((1, 1, 1, 2)))]
        actions: dict[str, Callable[[], str]] = {
            "report": partial(self._report, run),
            "compare": partial(self._compare, run),
            "recipe": partial(_recipe, run),
            "state": partial(_state, run),
        }
        if dice.random() < 0.1:
            actions["idap report"] = partial(command, "report", str(run))
            actions["idap compare"] = partial(command, "compare", str(run), str(self.shown))
        if (source == self.finished and dice.random() < 0.5) or (source == self.stopped and dice.random() < 0.2):
            actions["resume"] = partial(self._resume, run)
        return Trial(f"{source.name}: {'; '.join(told)}", actions)

    def _change(self, run: Path, dice: random.Random, outside: Path) -> str:
        files = [file for file in sorted(run.glob("*.json*")) if file.is_file() and not file.is_symlink()]
        if not files:
            return "nothing is left"
        file = dice.choice([*files, *(each for each in files if each.name in (RUN, STEPS) for _ in range(2))])
        way = dice.random()
        if way < 0.7:
            did = self._change_data(file, dice)
        elif way < 0.85:
            content, did = structural.mutate_bytes(file.read_bytes(), dice, dice.choice(list(self.texts.values())))
            file.write_bytes(content)
        elif way < 0.92:
            return structural.mutate_place(file, dice, outside)
        else:
            return _change_folder(run, dice)
        return f"{file.name}: {did}"

    def _change_data(self, file: Path, dice: random.Random) -> str:
        """Change a value in the file, of a file of lines in one line; or change the lines."""
        others = [json.loads(text.splitlines()[0] if b"}\n{" in text else text) for text in self.texts.values()]
        if file.name != STEPS:
            try:
                data: Any = json.loads(file.read_text(encoding="utf-8", errors="replace"))
            except (ValueError, RecursionError):
                return "broken already"
            data, did = structural.mutate(data, dice, others)
            file.write_bytes(structural.json_bytes(data))
            return did
        lines = file.read_bytes().splitlines()
        place = dice.randrange(len(lines)) if lines else 0
        way = (
            dice.choice(("value", "value", "value", "value", "drop", "twice", "swap", "blank", "end")) if lines else ""
        )
        match way:
            case "value":
                try:
                    data, did = structural.mutate(json.loads(lines[place]), dice, others)
                except (ValueError, RecursionError):
                    return "broken already"
                lines[place] = structural.json_bytes(data)
                did = f"line {place}: {did}"
            case "drop":
                del lines[place]
                did = f"line {place} dropped"
            case "twice":
                lines.insert(place, lines[place])
                did = f"line {place} twice"
            case "swap":
                lines[place], lines[-1] = lines[-1], lines[place]
                did = f"line {place} swapped with the last"
            case "blank":
                lines.insert(place, dice.choice((b"", b" ", b"null", b"[]", b"3", b"\xe2\x80\xa8", b"\x0b", b"{}")))
                did = f"line {place} inserted: {lines[place]!r}"
            case _:
                file.write_bytes(b"\n".join(lines)[:-1])
                return "the last line cut short"
        file.write_bytes(b"".join(line + b"\n" for line in lines))
        return did

    def _report(self, run: Path) -> str:
        _check_page(str(run_page(read_run(run))))
        return "accepted"

    def _compare(self, run: Path) -> str:
        _check_page(str(compare_page([read_run(run), read_run(self.finished)])))
        return "accepted"

    def _resume(self, run: Path) -> str:
        result = self._resumed(run)
        same = result.plan == self.undisturbed.plan and result.metric == self.undisturbed.metric
        if same and not first_difference(state_of(result.model), state_of(self.undisturbed.model)):
            return "equal"
        if CHECKED_RUNS:
            raise Broken("changed: the folder was changed, and the run went on to another result")
        return "changed"


def _check_page(text: str) -> None:
    if HOSTILE_MARKUP in text:
        raise Broken("executed: text of the run is markup in the page")


def _recipe(run: Path) -> str:
    recipe = recipe_of_run(run)
    recipe.config()
    recipe.training()
    recipe.table()
    return "accepted"


def _state(run: Path) -> str:
    """What an interrupted command says of the folder; it may not fail itself."""
    told_state(run)
    model_folder(run)
    return "accepted"


def _change_folder(run: Path, dice: random.Random) -> str:
    """Change what lies beside the files of the record."""
    states = sorted(each for each in (run / CHECKPOINTS).glob("*") if each.is_dir() and any(each.iterdir()))
    match dice.choice(("state", "state", "file", "model", "all", "temporary")):
        case "state" if states:
            state = dice.choice(states)
            shutil.rmtree(state)
            return f"{state.name} is missing"
        case "file" if states:
            file = dice.choice(sorted(dice.choice(states).iterdir()))
            content, did = structural.mutate_bytes(file.read_bytes(), dice)
            file.write_bytes(content)
            return f"{file.parent.name}/{file.name}: {did}"
        case "model" if (run / MODEL).is_dir():
            shutil.rmtree(run / MODEL)
            (run / MODEL).write_text("x")
            return "model is a file"
        case "all":
            shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
            if dice.random() < 0.5:
                (run / CHECKPOINTS).write_text("x")
            return "no checkpoints"
        case _:
            (run / f".run.json.{'a' * 32}").mkdir(exist_ok=True)
            return "a folder that is named like an unfinished file"
