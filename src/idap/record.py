"""The run folder: one JSON line per decision, every file written whole or not at all.

run/
├── original.safetensors    weights of the original, where the recipe trained it first
├── run.json                settings, environment, baseline; written before any work
├── steps.jsonl             one line per decision, in order
├── divergence-before.json  of the original, part by part
├── divergence-after.json   of the result
├── latency.json            the least latency where it is a goal; what each layer takes at several widths, once needed
├── result.json             what was reached; a run that has it is finished
├── measured.json           original and result side by side, where `idap compress` measured them
├── checkpoints/            the accepted states
└── model/                  the result: model.safetensors, plan.json
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from idap.errors import RunFolderError
from idap.files import plain, unfinished, write_bytes, write_json
from idap.steps import Step

RUN, STEPS, CHECKPOINTS, MODEL = "run.json", "steps.jsonl", "checkpoints", "model"
BEFORE, AFTER = "divergence-before.json", "divergence-after.json"
RESULT, MEASURED = "result.json", "measured.json"
LATENCY = "latency.json"
ORIGINAL = "original.safetensors"


class RunFolder:
    """A folder that holds one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check(self, *, size: int = 0) -> None:
        """Make sure that a run may be written here; writes nothing.

        The weights of an original that was trained for the run may lie there already.

        Args:
            size: bytes for which there must be room.

        Raises:
            RunFolderError: the folder holds another run or other files, or is none; it can't be written, or the disk is
                full.
        """
        try:
            begun = (self.path / RUN).exists()
        except OSError as error:
            raise RunFolderError(f"{self.path} can't be the folder of a run: {error}. Choose another one.") from error
        if begun:
            raise RunFolderError(f"{self.path} already holds a run ({RUN}); choose another folder, or delete this one.")
        others = self.path.is_dir() and {each.name for each in self.path.iterdir()} - {ORIGINAL}
        if others or (self.path.exists() and not self.path.is_dir()):
            raise RunFolderError(f"{self.path} exists and is not an empty folder; choose another one for the run.")
        near = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not near.is_dir():
            raise RunFolderError(f"{near} is a file, so no run can be kept in {self.path}; choose another folder.")
        if not os.access(near, os.W_OK | os.X_OK):
            raise RunFolderError(
                f"{near} can't be written, so no run can be kept in {self.path}; choose another folder."
            )
        free = shutil.disk_usage(near).free
        if free < size:
            raise RunFolderError(
                f"the disk of {near} has room for {_bytes(free)}, and the run needs about {_bytes(size)}; "
                "make room, or choose a folder on another disk."
            )

    def reopen(self, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Go on with a run that was stopped at any moment, or begin it where it had not come to its settings yet.

        What a killed process left half-written is cleared away: unfinished files, and a last line cut short.

        Args:
            settings: of the run as it is now; all but its environment, recipe, time and calibration data must be what
                it was begun with.

        Returns:
            The decisions that were taken, in order.

        Raises:
            RunFolderError: the folder holds something else, another run, or a broken decision; or can't be written.
        """
        try:
            self._clear()
            if not (self.path / RUN).exists():
                self.open(settings)
                return []
            begun = json.loads((self.path / RUN).read_text(encoding="utf-8"))
            if not isinstance(begun, dict):
                raise ValueError(f"{RUN} holds no settings")
        except (OSError, ValueError) as error:
            raise RunFolderError(f"cannot go on with the run in {self.path}: {error}") from error
        now = json.loads(json.dumps(settings, default=plain))
        for name in sorted({*begun, *now} - {"environment", "recipe", "preparation", "calibration"}):
            if begun.get(name) != now.get(name):
                what = _difference(begun.get(name), now.get(name))
                raise RunFolderError(
                    f"{self.path} holds a run with another {name}: {what}. Go on with the settings, model and data "
                    "that it was begun with, or choose another folder."
                )
        return read_steps(self.path)

    def _clear(self) -> None:
        """Remove what a killed process left half-written."""
        if not self.path.is_dir():
            return
        for file in [*self.path.glob(".*"), *self.path.glob("*/.*"), *self.path.glob("*/*/.*")]:
            if unfinished(file.name):
                file.unlink()
        if not (self.path / RUN).exists():
            if (self.path / CHECKPOINTS).is_dir() and not any((self.path / CHECKPOINTS).iterdir()):
                (self.path / CHECKPOINTS).rmdir()
            return
        steps = self.path / STEPS
        if steps.exists():
            data = steps.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                write_bytes(steps, whole)

    def open(self, settings: Mapping[str, Any]) -> None:
        """Create the folder and note the settings.

        Raises:
            RunFolderError: the folder holds another run or other files, or can't be written.
        """
        try:
            self.check()
            (self.path / CHECKPOINTS).mkdir(parents=True)
            write_json(self.path / RUN, settings)
        except OSError as error:
            raise RunFolderError(f"cannot write the run folder {self.path}: {error}") from error

    def add(self, step: Step) -> None:
        """Append one decision; it is on the disk when this returns.

        Raises:
            RunFolderError: the folder can't be written.
        """
        line = json.dumps(asdict(step), default=plain) + "\n"
        try:
            with (self.path / STEPS).open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunFolderError(f"cannot write decision {step.index} to {self.path / STEPS}: {error}") from error

    def keep(self, name: str, data: Mapping[str, Any]) -> None:
        """Write one of the files that stand beside the decisions; one of the same name is replaced.

        Raises:
            RunFolderError: the folder can't be written.
        """
        try:
            write_json(self.path / name, data)
        except OSError as error:
            raise RunFolderError(f"cannot write {self.path / name}: {error}") from error

    def checkpoint(self, index: int) -> Path:
        """Where the state accepted at step `index` is kept."""
        return self.path / CHECKPOINTS / f"step-{index:03d}"

    @property
    def original(self) -> Path:
        """Where the weights of an original that was trained first are kept."""
        return self.path / ORIGINAL

    @property
    def latency(self) -> Path:
        """Where the latency table is kept."""
        return self.path / LATENCY

    @property
    def model(self) -> Path:
        """Where the result is kept."""
        return self.path / MODEL


def read_json(file: Path) -> Any:
    """Read one of the JSON files of a run.

    Raises:
        RunFolderError: it can't be read, or holds something else.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunFolderError(f"{file} can't be read: {error}") from error


def read_steps(folder: str | Path, *, whole: bool = True) -> list[dict[str, Any]]:
    """The decisions of a run, in order; none where it has not come to one yet.

    Args:
        folder: of the run.
        whole: expect whole lines; False leaves out a last line that is being written, or was cut short.

    Raises:
        RunFolderError: the folder holds no run, or a line is broken.
    """
    file = Path(folder) / STEPS
    if not file.exists() and (Path(folder) / RUN).exists():
        return []
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{folder} holds no run: {file} can't be read ({error})") from error
    found = []
    for number, line in enumerate((text if whole else text[: text.rfind("\n") + 1]).splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RunFolderError(f"line {number} of {file} is broken: {error}") from error
    return found


def _difference(begun: Any, now: Any) -> str:
    if isinstance(begun, dict) and isinstance(now, dict):
        for name in sorted({*begun, *now}):
            if begun.get(name) != now.get(name):
                return f"{name}, {_difference(begun.get(name), now.get(name))}"
    return f"{_short(begun)} then, {_short(now)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _bytes(count: float) -> str:
    return f"{count / 1e3:,.0f} kB" if count < 1e6 else f"{count / 1e6:,.0f} MB"
