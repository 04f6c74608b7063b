"""How long does a user wait for a command that does little?

    python benchmarks/start.py                # the last row needs the extra vision

Each command runs several times in a process of its own, as a user starts it. Wall-clock time is what one waits, and
grows with whatever else the machine does; processor time, of all threads, does not. The load is noted beside them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "start.json"
CODE = """
import sys
sys.path[:0] = [{source!r}, {operators!r}]
import vision_operators  # what `make` installs where torchvision stands beside a CPU build of torch
sys.meta_path.insert(0, vision_operators.BeforeTorchvision())
from idap.cli.main import run
run()
"""
ROWS = (
    ("idap --help", 0.4, 15),
    ("idap compress --help", None, 15),
    ("idap list models timm resnet", None, 15),
    ("idap inspect idap:digits_vit", None, 5),
    ("idap inspect torchvision:resnet50", 8.0, 5),
)


def started(words: list[str]) -> tuple[float, float]:
    """Run once; gives seconds of wall-clock time and of the processor."""
    code = CODE.format(source=str(ROOT / "src"), operators=str(ROOT / "tests" / "conformance"))
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def measure(command: str, bar: float | None, repeats: int) -> dict[str, Any]:
    words = command.split()[1:]
    started(words)  # the first one reads files that the system has not in memory yet
    times = [started(words) for _ in range(repeats)]
    wall, processor = ([round(each, 3) for each in column] for column in zip(*times, strict=True))
    return {
        "command": command,
        "bar_s": bar,
        "wall_s": statistics.median(wall),
        "least_wall_s": min(wall),
        "processor_s": statistics.median(processor),
        "load": round(os.getloadavg()[0], 2),
        "wall": wall,
        "processor": processor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", metavar="TEXT", help="measure the commands with this text again")
    asked = parser.parse_args()
    out = asked.out
    kept = {row["command"]: row for row in json.loads(out.read_text())["rows"]} if asked.only else {}
    rows = []
    for command, bar, repeats in ROWS:
        again = asked.only in command or command not in kept
        rows.append(measure(command, bar, repeats) if again else kept[command])
        print({name: value for name, value in rows[-1].items() if not isinstance(value, list)})
    packages = ("torch", "torchvision", "typer", "rich", "numpy")
    found = {
        "command": "python benchmarks/start.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "rows": rows,
    }
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
