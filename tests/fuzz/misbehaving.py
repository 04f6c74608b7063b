"""Cases that break every promise on purpose: a fuzzer that does not find these finds nothing."""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from idap.errors import ConfigError
from tests.fuzz.cases import Broken, Trial


def fine() -> str:
    return "equal"


def refused() -> str:
    raise ConfigError("this is wrong")


def raw() -> str:
    raise KeyError("boo")


def changed() -> str:
    raise Broken("changed: another tensor")


def crashes() -> str:
    signal.raise_signal(signal.SIGSEGV)
    return "equal"


def spins() -> str:
    while True:
        pass


def writes_elsewhere() -> str:
    Path("../elsewhere").write_text("x")
    return "equal"


def removes_elsewhere() -> str:
    Path("../../elsewhere").unlink()
    return "equal"


def runs_a_program() -> str:
    subprocess.run(["true"], check=True)
    return "equal"


def hides_what_it_did() -> str:
    try:
        os.system("true")
    except Exception:
        return "equal"
    return "equal"


def grows() -> str:
    bytes(bytearray(b"x") * (1200 * 2**20))
    return "equal"


def changes_modes() -> str:
    torch.set_default_dtype(torch.float64)
    return "equal"


def runs_foreign_code() -> str:
    compile("def body(self, v0):\n    return v0.__class__", "<rewritten, 1 steps>", "exec")
    return "equal"


CASES: tuple[tuple[Callable[[], str], str], ...] = (
    (fine, ""),
    (refused, ""),
    (raw, "raw: KeyError"),
    (changed, "changed: another tensor"),
    (crashes, "crash: SIGSEGV"),
    (fine, ""),
    (spins, "hang: "),
    (writes_elsewhere, "written: opens"),
    (removes_elsewhere, "written: os.remove"),
    (runs_a_program, "executed: subprocess.Popen"),
    (hides_what_it_did, "executed: os.system"),
    (grows, "memory: grew by"),
    (changes_modes, "executed: changed default type"),
    (runs_foreign_code, "executed: generated source holds .__class__"),
    (fine, ""),
)
"""What each case does, and how the failure begins that must be found; "" for none."""


class Misbehaving:
    """Makes these cases."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def make(self, number: int, dice: random.Random, folder: Path) -> Trial:
        action = CASES[number][0]
        return Trial(action.__name__, {"act": action})
