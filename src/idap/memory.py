"""Limit the memory that one piece of work may take, pack work into that limit, and refuse what does not fit.

A piece of work states beforehand how much memory it takes, as a `Need`. This module alone knows the limit: 90 % of the
memory that is free at that moment, or the value of the environment variable IDAP_MEMORY.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from idap.errors import ConfigError, InsufficientMemoryError

VARIABLE = "IDAP_MEMORY"
"""Environment variable: bytes that one piece of work may take on a device, however much is free there."""

SHARE = 0.9
"""Share of the free memory that may be taken; the rest is for activations and for other programs."""

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for end, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


@dataclass(frozen=True)
class Need:
    """Bytes that a piece of work takes.

    Attributes:
        held: on the device of the model, while the data pass through the model.
        solving: in addition, on the same device, while the work is solved.
        on_cpu: in addition, on the CPU, at another moment than `solving`.
    """

    held: int = 0
    solving: int = 0
    on_cpu: int = 0


@dataclass(frozen=True)
class Room:
    """Bytes that may be taken.

    Attributes:
        device: where the model is, such as "cpu" or "cuda:0".
        there: bytes on that device.
        on_cpu: bytes on the CPU; if the model is on the CPU, these are the same bytes.
    """

    device: str
    there: int
    on_cpu: int

    @classmethod
    def now(cls, device: Any = "cpu") -> "Room":
        """The bytes that may be taken at this moment.

        Args:
            device: name of a device, or a torch.device.

        Raises:
            ConfigError: the environment variable is not a size.
        """
        return cls(str(device), allowed_bytes(device), allowed_bytes())

    def lacks(self, needs: Sequence[Need]) -> tuple[int, int, str] | None:
        """Find out whether pieces of work fit that hold their memory at the same time and are solved one by one.

        Returns:
            Bytes that they take, bytes that may be taken, and the device on which they do not fit; None if they fit.
        """
        held = sum(need.held for need in needs)
        shared = self.device.startswith("cpu")
        solving = max((max(need.solving, need.on_cpu * shared) for need in needs), default=0)
        if held + solving > self.there:
            return held + solving, self.there, self.device
        on_cpu = max((need.on_cpu for need in needs), default=0)
        return (on_cpu, self.on_cpu, "cpu") if on_cpu > self.on_cpu else None

    def check(self, need: Need, *, what: str, way_out: str) -> None:
        """Refuse a piece of work that does not fit.

        Args:
            need: the memory that it takes.
            what: the piece of work, such as "the second moments of group 'fc1'".
            way_out: what the user can do, other than provide more memory.

        Raises:
            InsufficientMemoryError: it takes more than may be taken.
        """
        lack = self.lacks([need])
        if lack is None:
            return
        needed, allowed, device = lack
        source = f"{VARIABLE}={os.environ[VARIABLE]}" if VARIABLE in os.environ else f"{SHARE:.0%} of what is free"
        raise InsufficientMemoryError(
            f"{what} would take {readable(needed)} of memory on {device}, and {readable(allowed)} may be taken there "
            f"({source}). {way_out} Or free memory, or set {VARIABLE} to more, such as {VARIABLE}={_round_up(needed)}."
        )


class Work(Protocol):
    """A piece of work that knows how much memory it takes."""

    @property
    def need(self) -> Need:
        """The memory that it takes, estimated before it begins."""


AnyWork = TypeVar("AnyWork", bound=Work)


def pack(works: Sequence[AnyWork], limit: int, room: Room) -> list[list[AnyWork]]:
    """Distribute work over as few rounds as its memory allows.

    Args:
        works: the pieces of work, in the order in which they are done.
        limit: most bytes that the work of a round holds while the data pass; a single piece may exceed it.
        room: the bytes that may be taken in all.

    Returns:
        The rounds; at least one, perhaps empty.
    """
    rounds: list[list[AnyWork]] = [[]]
    for work in works:
        needs = [other.need for other in (*rounds[-1], work)]
        if rounds[-1] and (sum(need.held for need in needs) > limit or room.lacks(needs)):
            rounds.append([])
        rounds[-1].append(work)
    return rounds


def allowed_bytes(device: Any = "cpu") -> int:
    """Bytes that one piece of work may take on a device at this moment.

    Args:
        device: name of a device, or a torch.device.

    Raises:
        ConfigError: the environment variable is not a size.
    """
    if VARIABLE in os.environ:
        return parse_bytes(os.environ[VARIABLE])
    return int(SHARE * free_bytes(device))


def free_bytes(device: Any = "cpu") -> int:
    """Bytes that are free on a device; of the CPU's, the share of this process if one launcher started several here."""
    if str(device).startswith("cuda"):
        import torch  # noqa: PLC0415 - slow to import, and only needed for GPUs

        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    left = [int(psutil.virtual_memory().available), *_left_in_groups(Path("/"))]
    return max(0, min(left)) // _processes_here()


def parse_bytes(text: str) -> int:
    """Parse a size of memory.

    Args:
        text: a number and, if it is not in bytes, a unit.

    Raises:
        ConfigError: the text is not a size above 0.

    Example:
        >>> parse_bytes("8GB"), parse_bytes("512 MiB"), parse_bytes("2000000000")
        (8000000000, 536870912, 2000000000)
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]{0,3})\s*", text)
    size = float(found[1]) * _UNITS[found[2].upper()] if found and found[2].upper() in _UNITS else 0.0
    if size < 1:
        raise ConfigError(
            f"{VARIABLE} must be a size of memory above 0, such as 8GB, 512MiB or 2000000000 (bytes), found "
            f"{text!r:.60}."
        )
    return int(size)


def readable(size: float) -> str:
    """A size for messages.

    >>> readable(34_359_738_368), readable(1_500)
    ('34.4 GB', '1.5 kB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size:,.0f} bytes"


def _round_up(size: int) -> str:
    return f"{-(-size // 10**9)}GB" if size > 10**9 else f"{-(-size // 10**6)}MB"


def _processes_here() -> int:
    """Number of processes that a launcher such as torchrun started on this machine."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(count)) if count.isdecimal() else 1


def _left_in_groups(root: Path) -> list[int]:
    """Bytes left below the limit of each control group of this process, where Linux has set one.

    Args:
        root: the root of the file system.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, most, used, cached = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, most, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        group = Path(path.strip("/"))
        for part in (group, *group.parents) if path.strip("/") else (Path(),):
            folder = root / base / part
            limit, usage = _number(folder / most), _number(folder / used)
            if limit is not None and usage is not None:
                found.append(limit - usage + _reclaimable(folder / "memory.stat", cached))
    return found


def _number(file: Path) -> int | None:
    """The number in a file of a control group; None if there is no such file, or no limit."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:  # the group is not visible from inside a container
        return None
    return int(text) if text.isdecimal() else None


def _reclaimable(file: Path, name: str) -> int:
    """Bytes of a control group that cache files and can be freed, since the files can be read again."""
    try:
        entries = dict(line.split(" ", 1) for line in file.read_text(encoding="utf-8").splitlines() if " " in line)
    except OSError:
        return 0
    return int(entries.get(name, "0"))
