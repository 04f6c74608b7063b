"""Hand out cases to worker processes, and note which of them fail, kill their worker, or don't come to an end."""

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BATCH = 250
"""Cases of one worker: as many as make its start cheap."""
LOOK_SECONDS, LONGEST = 20, 600
"""After how many silent seconds a worker is looked at: it hangs if it computed nothing, or is silent for too long."""


@dataclass(frozen=True)
class Failure:
    """One promise that one input broke.

    Attributes:
        kind: of the input.
        number: of the case.
        action: what was tried.
        what: begins with the kind of failure, such as "raw:" or "crash:".
        about: how the input was made.
    """

    kind: str
    number: int
    action: str
    what: str
    about: str

    @property
    def signature(self) -> str:
        """The same for failures that have one cause: without numbers and quoted parts, except lines of code."""
        place = re.search(r" at (\S+:\d+ in [\w<>]+)", self.what)
        text = (self.what.partition(" at ")[0] if place else self.what).splitlines()[0]
        text = re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|0x[0-9a-f]+|\d+", "_", text)[:90]
        return f"{self.kind}/{self.action} {text}{f' at {place[1]}' if place else ''}"


@dataclass
class Report:
    """What came of some cases."""

    cases: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    heard: Callable[[Failure], None] | None = None

    def fail(self, failures: Sequence[Failure]) -> None:
        """Note failures."""
        for failure in failures:
            if self.heard is not None and all(failure.signature != each.signature for each in self.failures):
                self.heard(failure)
            self.failures.append(failure)

    def add(self, kind: str, outcomes: dict[str, int]) -> None:
        """Count a case that has come to its end."""
        self.cases[kind] += 1
        self.outcomes.setdefault(kind, Counter()).update(outcomes)

    def grouped(self) -> dict[str, list[Failure]]:
        """Failures by cause, the most frequent first; of each the shortest first."""
        found: dict[str, list[Failure]] = {}
        for failure in self.failures:
            found.setdefault(failure.signature, []).append(failure)
        for group in found.values():
            group.sort(key=lambda failure: (len(failure.about), failure.number))
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def run_cases(
    kinds: Sequence[str],
    numbers: range,
    seed: int,
    *,
    processes: int = 2,
    heard: Callable[[Failure], None] | None = None,
) -> Report:
    """Run cases of several kinds.

    Args:
        kinds: of `tests.fuzz.cases.KINDS`.
        numbers: of the cases of each kind.
        seed: of all.
        processes: workers at a time.
        heard: is told of the first failure of each cause, as soon as it is found.
    """
    report, lock = Report(heard=heard), threading.Lock()
    pieces = [(kind, numbers[start : start + BATCH]) for start in range(0, len(numbers), BATCH) for kind in kinds]

    def work(piece: tuple[str, range]) -> None:
        for told in _batch(*piece, seed):
            with lock:
                told(report)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(work, pieces))
    return report


def _batch(kind: str, numbers: range, seed: int) -> Iterator[Callable[[Report], None]]:
    """Run cases in one worker after the other, each beginning behind the case that ended the one before."""
    first = numbers.start
    while first < numbers.stop:
        ended = None
        for line in _worker(kind, range(first, numbers.stop), seed):
            if "begin" in line:
                ended = line
            elif "end" in line:
                about, number, ended = ended["about"] if ended else "", line["end"], None
                failures = [Failure(kind, number, name, what, about) for name, what in line["failures"]]
                first = number + 1
                yield _note(kind, line["outcomes"], failures)
            elif "died" in line:
                if ended is None:
                    raise RuntimeError(f"the worker for {kind} {first} to {numbers.stop} failed: {line['died']}")
                number = ended["begin"]
                first = number + 1
                failure = Failure(kind, number, "case", line["died"], ended["about"])
                yield _note(kind, {"failed": 1}, [failure])
        if ended is None and first < numbers.stop:
            raise RuntimeError(f"the worker for {kind} {first} to {numbers.stop} stopped early")


def _note(kind: str, outcomes: dict[str, int], failures: list[Failure]) -> Callable[[Report], None]:
    def note(report: Report) -> None:
        report.add(kind, outcomes)
        report.fail(failures)

    return note


def _worker(kind: str, numbers: range, seed: int, *extra: str) -> Iterator[dict[str, Any]]:
    """The lines of one worker; the last one says how it died, if it did."""
    folder = tempfile.mkdtemp(prefix=f"idap-fuzz-{kind}-")
    words = [kind, folder + "/work", "--seed", str(seed), "--first", str(numbers.start), "--last", str(numbers.stop)]
    errors = Path(folder, "errors")
    with errors.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", *words, *extra],
            **{"stdout": subprocess.PIPE, "stderr": log, "cwd": ROOT, "env": environment()},
        )
    try:
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True)
        reader.start()
        yield from _messages(process, lines, errors)
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def _messages(process: Any, lines: "queue.Queue[str | None]", errors: Path) -> Iterator[dict[str, Any]]:
    done, silent, spent = False, 0, 0.0
    while True:
        try:
            line = lines.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            silent, before, spent = silent + LOOK_SECONDS, spent, _processor_time(process.pid)
            if spent - before < LOOK_SECONDS / 100 or silent > LONGEST:
                yield {"died": f"hang: silent for {silent} seconds, {spent:.0f} s of processor time in all"}
                return
            continue
        if line is None:
            break
        found = json.loads(line)
        done, silent = "done" in found, 0
        yield found
    code = process.wait()
    if not done:
        yield {"died": _death(code, errors)}


def _processor_time(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _death(code: int, errors: Path) -> str:
    if code == -signal.SIGXCPU:
        return "hang: more seconds of processor time than a case may take"
    if code < 0:
        return f"crash: {signal.Signals(-code).name}"
    tail = errors.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
    return f"crash: exit code {code}: {tail}"


def _pump(stream: Any, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line.decode("utf-8", "replace"))
    lines.put(None)


def environment() -> dict[str, str]:
    """The environment of a worker: it finds the tests, writes no bytecode, and asks no server."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0", "PYTHONFAULTHANDLER": ""}
    return os.environ | {"PYTHONPATH": path} | settings | offline


def run_one(kind: str, number: int, seed: int, keep: Path | None = None) -> Report:
    """Run a single case, and keep its input."""
    extra = () if keep is None else ("--keep", str(keep.absolute()))
    report = Report()
    about = ""
    for line in _worker(kind, range(number, number + 1), seed, *extra):
        about = line.get("about", about)
        if "end" in line:
            report.add(kind, line["outcomes"])
            report.failures += [Failure(kind, number, name, what, about) for name, what in line["failures"]]
        elif "died" in line:
            report.add(kind, {"failed": 1})
            report.failures.append(Failure(kind, number, "case", line["died"], about))
    return report
