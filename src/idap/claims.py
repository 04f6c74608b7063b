"""Folders on which one process works at a time: a lock of the operating system, which ends with its process."""

import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK, HOLDER = ".idap-lock", ".idap-holder.json"
_ATTEMPTS = 5


class InUseError(Exception):
    """A folder is claimed already; says by whom, as far as that is known."""


class Claim:
    """Holds a folder for one process, and within it for one user.

    Args:
        folder: that is claimed, which may be yet to be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: FileLock | None = None
        self._made: list[Path] = []

    def acquire(self, *, new: bool = False) -> bool:
        """Claim the folder until `release`; it is made where it does not exist.

        Args:
            new: expect that it does not exist.

        Returns:
            Whether it was claimed now; False where this object holds it already.

        Raises:
            InUseError: another process holds it, or this one does elsewhere.
            FileExistsError: `new`, and it exists.
            OSError: the folder can't be made or written.
        """
        if self._lock is not None:
            return False
        try:
            for attempt in count(1):
                try:
                    self._make(new=new and attempt == 1)
                    self._lock = self._locked()
                    break
                except FileNotFoundError:  # the last holder has just removed its lock, and perhaps the folder
                    if attempt == _ATTEMPTS:
                        raise
            self._sign()
        except BaseException:
            self.release()
            self._remove_made()
            raise
        return True

    def release(self) -> None:
        """Give up the claim, if there is one; a folder that was made for it and is empty goes again."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        for name in (HOLDER, LOCK):
            with suppress(OSError):  # on Windows a file that is locked stays; it does no harm
                (self._folder / name).unlink(missing_ok=True)
        lock.release()
        self._remove_made()

    def _make(self, *, new: bool) -> None:
        missing = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        if new and not missing:
            raise FileExistsError(f"{self._folder} exists")
        for folder in reversed(missing):
            try:
                folder.mkdir()
            except FileExistsError:  # of another process, if it is a folder
                if (new and folder == self._folder) or not folder.is_dir():
                    raise
            else:
                self._made.append(folder)

    def _locked(self) -> FileLock:
        lock = FileLock(self._folder / LOCK, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise InUseError(_holder(self._folder / HOLDER)) from error
        if not (self._folder / LOCK).exists():  # its last holder removed it just before it was locked
            lock.release()
            raise FileNotFoundError(f"{self._folder / LOCK} was removed")
        return lock

    def _sign(self) -> None:
        """Note who holds the folder, for those who are refused."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        (self._folder / HOLDER).unlink(missing_ok=True)  # whatever it is: of a process that was killed
        with (self._folder / HOLDER).open("x", encoding="utf-8") as file:
            file.write(json.dumps(who) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # something lies in it by now
                folder.rmdir()
        self._made.clear()


def _holder(file: Path) -> str:
    """Who holds a folder, as far as it is known."""
    try:
        if not file.is_file():
            return "another process"
        found: Any = json.loads(file.read_text(encoding="utf-8")[:1000])
        return f"process {found['pid']:d} on {found['host']:s} since {found['since']:s}"
    except (OSError, ValueError, TypeError, KeyError):  # it is just being written
        return "another process"
