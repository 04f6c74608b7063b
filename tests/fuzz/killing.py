"""Commands of idap in forked processes, killed at a chosen moment: before an operation on a file, or by the clock."""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHANGES = {
    "os.rename": 1,
    "os.remove": 0,
    "os.mkdir": 0,
    "os.rmdir": 0,
    "os.truncate": 0,
    "os.link": 1,
    "os.symlink": 1,
}
"""Event -> which argument is the path that changes."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
SECONDS = 120
"""A command that takes longer hangs."""


@dataclass(frozen=True)
class Moment:
    """When a command is killed: before its n-th operation on a file (from 1 on), or after some seconds."""

    operation: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"operation {self.operation}" if self.operation else f"{self.seconds:.2f} s"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal), what it said, and the operations that it had done."""

    code: int
    output: str
    operations: tuple[str, ...]
    seconds: float


def run_command(words: list[str], folder: Path, moment: Moment | None = None) -> Ended:
    """Run a command in a process of its own, in a folder.

    The process is forked, so what this one has imported need not be imported again.
    """
    log, noted = folder.with_name("log"), folder.with_name("operations")
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _perform(words, folder, moment, log, noted)
    limit = moment.seconds if moment is not None and moment.seconds else SECONDS
    status = _wait(child, limit)
    if status is None:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if limit == SECONDS:
            raise TimeoutError(f"{' '.join(words)} takes more than {SECONDS} s")
    operations = tuple(noted.read_text(encoding="utf-8").splitlines()) if noted.exists() else ()
    output = log.read_text(encoding="utf-8", errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), output, operations, time.monotonic() - began)


def _wait(child: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    return None


def _perform(words: list[str], folder: Path, moment: Moment | None, log: Path, noted: Path) -> None:
    """The child: nothing returns from here."""
    code = 70
    try:
        os.chdir(folder)
        temporary = folder / "tmp"
        temporary.mkdir(exist_ok=True)
        os.environ["TMPDIR"], tempfile.tempdir = str(temporary), str(temporary)
        told = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(told, 1)
        os.dup2(told, 2)
        sys.argv = ["idap", *words]
        _count(str(folder), noted, 0 if moment is None else moment.operation)
        from idap.cli.main import run

        try:
            run()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _count(home: str, noted: Path, last: int) -> None:
    """Note every operation on a file of a folder, and kill this process before the last one."""
    notes = os.open(noted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    done = 0

    def note(what: str) -> None:
        nonlocal done
        done += 1
        os.write(notes, f"{what}\n".encode())
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, writes = args[0], isinstance(args[2], int) and args[2] & _WRITES
            if not writes or isinstance(path, int):
                return
        elif event in _CHANGES:
            path = args[_CHANGES[event]]
        else:
            return
        place = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - links are not followed
        if place.startswith(f"{home}/"):
            note(f"{event} {place.removeprefix(home)}")

    fsync: Callable[[int], None] = os.fsync

    def noted_fsync(file: int) -> None:
        note(f"fsync {os.path.basename(os.path.realpath(f'/proc/self/fd/{file}'))}")  # noqa: PTH119
        fsync(file)

    os.fsync = noted_fsync  # type: ignore[assignment]
    sys.addaudithook(hear)


def draw_moment(dice: random.Random, whole: Ended) -> Moment:
    """Mostly just before an operation on a file, where a stop can do harm; else any time."""
    if dice.random() < 0.75:
        return Moment(operation=dice.randrange(1, len(whole.operations) + 1))
    return Moment(seconds=dice.uniform(0.01, whole.seconds))


# ------------------------------------------------------------------------------------------------- what is left behind

VOLATILE = {
    "run.json": ("environment", "preparation"),
    "steps.jsonl": ("seconds", "phases", "checksum"),
    "result.json": ("seconds", "ended"),
    "measured.json": ("latency",),
}
"""File -> keys that hold times, and what command was typed."""
FOREIGN = ("tmp/.ses",)
"""Files that a library leaves in the folder for temporary files: onnxruntime's number of a session."""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and folder below a folder, without what differs from one run to the next."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name not in FOREIGN:
            found[f"{name}/" if path.is_dir() else name] = b"" if path.is_dir() else _stable(path)
    return found


def _stable(file: Path) -> bytes:
    data = file.read_bytes()
    keys = VOLATILE.get(file.name)
    if keys is None:
        return data
    lines = data.splitlines() if file.suffix == ".jsonl" else [data]
    rows = [{key: value for key, value in json.loads(line).items() if key not in keys} for line in lines]
    return json.dumps(rows, sort_keys=True).encode()


def differences(found: dict[str, bytes], expected: dict[str, bytes], inputs: dict[str, bytes]) -> list[str]:
    """What a folder holds that it should not, lacks, or holds otherwise, a line each."""
    told = []
    for name in sorted(found.keys() | expected.keys()):
        if name not in expected:
            told.append(f"left over: {name}")
        elif name not in found:
            told.append(f"missing: {name}")
        elif found[name] != expected[name]:
            told.append(f"{'input changed' if name in inputs else 'differs'}: {name}")
    return told


def empty(folder: Path) -> None:
    """Make a folder new."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
