"""Watch what happens while an input is read: nothing may be executed, nothing written outside of one folder.

Python raises audit events for all of this. What would do harm is stopped as well as noted.
"""

import ast
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.structural import CANARY

_FORBIDDEN = (
    *("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "os.startfile"),
    *("pty.", "socket.", "urllib.", "http.", "ftplib.", "smtplib.", "telnetlib.", "webbrowser."),
    *("ctypes.dlopen", "ctypes.call_function", "ctypes.string_at", "ctypes.cdata", "ctypes.dlsym"),
    *("pickle.find_class", "os.chdir", "sys.setprofile", "sys.settrace"),
)
"""How the names of events begin that no reader of a file has a reason to raise."""

_HARMLESS = ("socket.gethostname",)
"""Events of these kinds that harm nobody: who holds a folder is written down with the name of the machine."""

_PATHS = {
    **dict.fromkeys(("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime"), (0,)),
    **dict.fromkeys(("os.rename", "os.link", "shutil.move", "shutil.copyfile", "shutil.copytree"), (0, 1)),
    **{"os.symlink": (1,), "shutil.rmtree": (0,), "shutil.chown": (0,), "os.mkfifo": (0,)},
}
"""Event -> which of its arguments are paths that change."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
GROWTH = 2**30
"""Bytes by which memory may grow while an input is read."""
ADDRESSES = 6 * 2**30
"""Bytes of address space that are left to a worker after it was set up."""
SECONDS = 10
"""Seconds of processor time that one input may take."""


class Stopped(Exception):  # noqa: N818 - it stops what must not happen
    """Raised in the place of an operation that must not happen."""


class Watch:
    """Notes what must not happen while it is on; there is one for each process, since audit hooks can't be removed."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._home: str | None = None
        tempfile.gettempdir()  # tries where it may write, once
        torch.rsqrt(torch.ones(1, device="meta"))  # loads what computes shapes, and makes folders of torch's own
        sys.addaudithook(self._hear)

    @contextmanager
    def on(self, home: Path) -> Iterator[None]:
        """Watch; `home` is the only folder in which files may change."""
        self.found.clear()
        self._home = os.path.realpath(home)
        try:
            yield
        finally:
            self._home = None

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        home = self._home
        if home is None:
            return
        self._home = None  # what the check itself does is not heard
        try:
            told = self._judge(event, args, home)
        finally:
            self._home = home
        if told:
            self.found.append(told)
            raise Stopped(told)

    def _judge(self, event: str, args: tuple[Any, ...], home: str) -> str:
        if event.startswith(_FORBIDDEN) and event not in _HARMLESS:
            return f"executed: {event} {args!r:.120}"
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = _real(args[0], -1, followed=True)
            if CANARY in path:
                return f"written: opens {path}"
            writes = isinstance(args[2], int) and args[2] & _WRITES
            return f"written: opens {path} to write" if writes and not _inside(path, home) else ""
        if event in _PATHS:
            place = next((arg for arg in reversed(args) if isinstance(arg, int)), -1)
            for number in _PATHS[event]:
                path = _real(args[number], place, followed=False)
                if not _inside(path, home):
                    return f"written: {event} {path}"
        if event == "compile":
            return _judge_source(args[0], args[1])
        if event == "exec":
            name = getattr(args[0], "co_filename", "")
            return f"executed: code of {name}" if CANARY in name or _inside(str(name), home) else ""
        return f"executed: import {args[0]}" if event == "import" and CANARY in str(args[0]) else ""


def _real(path: Any, place: int, *, followed: bool) -> str:
    """Where a path leads: what is opened is where a link leads to, what is removed is the link itself."""
    found = Path(f"/proc/self/fd/{path}" if isinstance(path, int) else os.fsdecode(path))
    if place >= 0 and not found.is_absolute():
        found = Path(f"/proc/self/fd/{place}") / found
    if followed:
        return os.path.realpath(found)
    return f"{os.path.realpath(found.parent)}/{found.name}"


def _inside(path: str, home: str) -> bool:
    return path.startswith(f"{home}/") or path == home or path.startswith(("/dev/null", "/proc/"))


def _judge_source(source: Any, filename: Any) -> str:
    text = source.decode("utf-8", "replace") if isinstance(source, bytes) else str(source or "")
    if CANARY in text and not str(filename).startswith("<rewritten"):
        return f"executed: compiles {text[:120]!r}"
    return foreign_code(text) if str(filename).startswith("<rewritten") else ""


_NAMES = re.compile(
    r"v\d+|f\d+|self|allowance|dict|device|kind|result|torch|calc|check|device_of|type_of|tensor_of|slice|float|getattr|body"
)
_NODES = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.Return, ast.Expr, ast.Call, ast.keyword),
    *(ast.Name, ast.Load, ast.Store, ast.Attribute, ast.Constant, ast.Subscript, ast.Tuple, ast.List, ast.Dict),
    *(ast.IfExp, ast.UnaryOp, ast.USub),
)


def foreign_code(source: str) -> str:
    """What generated source does that it may not: it calls torch, modules and tensors, and nothing else.

    >>> foreign_code("def body(self, v0):\\n    v1 = self.fc(v0)\\n    return v1")
    ''
    >>> foreign_code("def body(self, v0):\\n    return v0.__class__")
    'executed: generated source holds .__class__'
    >>> foreign_code("def body(self, v0):\\n    import os")
    'executed: generated source holds Import'
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""  # it can't be compiled either
    if len(tree.body) != 1:
        return "executed: generated source is more than one function"
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            return f"executed: generated source holds {type(node).__name__}"
        if isinstance(node, ast.Name) and not _NAMES.fullmatch(node.id):
            return f"executed: generated source names {node.id}"
        if isinstance(node, ast.Attribute) and node.attr.startswith("__") and node.attr not in _OPERATORS:
            return f"executed: generated source holds .{node.attr}"
    return ""


_OPERATORS = {
    f"__{side}{name}__"
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "div", "getitem"),
        *("setitem", "neg", "invert", "abs", "pos", "eq", "ne", "lt", "le", "gt", "ge", "lshift", "rshift", "get"),
    )
    for side in ("", "r", "i")
}


def peak() -> int:
    """Most bytes that the process has held since `reset_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status does not say VmHWM")


def reset_peak() -> int:
    """Begin to measure anew; what is held now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def bound_memory() -> None:
    """Let allocations fail beyond a bound, for the rest of the process."""
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))


def bound_time() -> None:
    """Let the process be killed (SIGXCPU) if it takes too much processor time from now on."""
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(spent.ru_utime + spent.ru_stime) + 1 + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
