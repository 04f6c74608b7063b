"""Ownership of run folders: one process at a time works on each, and only one made here may name code to run."""

import getpass
import hashlib
import hmac
import json
import os
import platform
import secrets
import socket
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from idap.files import plain

LOCK, HOLDER = ".idap-lock", ".idap-holder.json"
_ATTEMPTS = 5


class InUseError(Exception):
    """A folder is already claimed; the message says by whom, as far as that is known."""


class Claim:
    """Holds a folder for one process, and within the process for one `Claim`.

    Args:
        folder: the folder to claim; it need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: FileLock | None = None
        self._made: list[Path] = []

    def acquire(self, *, new: bool = False) -> bool:
        """Claim the folder until `release`; it is made if it does not exist.

        Args:
            new: require that it does not exist.

        Returns:
            Whether this call claimed it; False if this object already holds it.

        Raises:
            InUseError: another process holds it, or another object of this process does.
            FileExistsError: `new`, and it exists.
            OSError: the folder can't be made or written.
        """
        if self._lock is not None:
            return False
        try:
            for attempt in count(1):
                try:
                    self._make(new=new and attempt == 1)
                    self._lock = self._acquire()
                    break
                except FileNotFoundError:  # the previous holder has just removed its lock, and perhaps the folder
                    if attempt == _ATTEMPTS:
                        raise
            self._sign()
        except BaseException:
            self.release()
            self._remove_made()
            raise
        return True

    def release(self) -> None:
        """Give up the claim, if there is one; a folder that was made for it and is empty is removed."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        for name in (HOLDER, LOCK):
            with suppress(OSError):  # Windows keeps a file that is locked; it does no harm
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
            except FileExistsError:  # another process made it, if it is a folder
                if (new and folder == self._folder) or not folder.is_dir():
                    raise
            else:
                self._made.append(folder)

    def _acquire(self) -> FileLock:
        lock = FileLock(self._folder / LOCK, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise InUseError(_holder(self._folder / HOLDER)) from error
        if not (self._folder / LOCK).exists():  # the previous holder removed it just before it was locked
            lock.release()
            raise FileNotFoundError(f"{self._folder / LOCK} was removed")
        return lock

    def _sign(self) -> None:
        """Write down who holds the folder, for the message to processes that are refused."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
        (self._folder / HOLDER).unlink(missing_ok=True)  # left by a process that was killed, whatever it is
        with (self._folder / HOLDER).open("x", encoding="utf-8") as file:
            file.write(json.dumps(who) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # it is not empty any more
                folder.rmdir()
        self._made.clear()


def _holder(file: Path) -> str:
    """Who holds a folder, as far as that is known."""
    try:
        if not file.is_file():
            return "another process"
        found: Any = json.loads(file.read_text(encoding="utf-8")[:1000])
        return f"process {found['pid']:d} on {found['host']:s} since {found['since']:s}"
    except (OSError, ValueError, TypeError, KeyError):  # it is being written at this moment
        return "another process"


FACTS = ("user", "host", "run_dir", "folder")
"""What is recorded of a place: the user, the machine, the run folder and the working folder."""
KEY_BYTES = 32


class NoKeyError(Exception):
    """The key can't be used; the message says why."""


def seal_place(run_dir: Path, recipe: Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    """Describe the place where a run begins, and seal that together with its recipe.

    The user's key is made if there is none yet.

    Args:
        run_dir: folder of the run.
        recipe: of the run; None: the run names no code, so nothing is sealed.

    Returns:
        `FACTS` by name, with the "seal" (None if there is none); and the reason why it can't be sealed, "" if it is
        sealed or need not be.
    """
    place = _place(run_dir)
    if recipe is None:
        return {**place, "seal": None}, ""
    try:
        return {**place, "seal": _seal(_key(make=True), place, recipe)}, ""
    except NoKeyError as error:
        return {**place, "seal": None}, str(error)


def foreign_signs(run_dir: Path, settings: Mapping[str, Any], *, folder_matters: bool) -> list[str]:
    """List the signs that a run was not made here.

    Args:
        run_dir: folder of the run.
        settings: what the run wrote when it began.
        folder_matters: whether the run must also have begun in this working folder, from which modules are imported.

    Returns:
        Clauses that are safe to print; none for a run that was made here.
    """
    noted, now = settings.get("environment"), _place(run_dir)
    if not isinstance(noted, Mapping) or not all(isinstance(noted.get(name), str) for name in FACTS):
        return ["it does not say where it was made"]
    said = {
        "user": "it was made by user {}, and you are {}",
        "host": "it was made on the machine {}, and this is {}",
        "run_dir": "it was made in {}, and is now {}",
        "folder": "it was begun in the working folder {}, and this is {}",
    }
    asked = [name for name in FACTS if folder_matters or name != "folder"]
    signs = [said[name].format(printable(noted[name]), now[name]) for name in asked if noted[name] != now[name]]
    if signs:
        return signs
    try:
        seal = _seal(_key(make=False), {name: noted[name] for name in FACTS}, settings.get("recipe"))
    except NoKeyError as error:
        return [f"whether it was made here can't be told: {error}"]
    if hmac.compare_digest(seal.encode(), str(noted.get("seal")).encode()):
        return []
    return ["it says that it was made here, but its seal does not fit: its recipe was changed, or all of it is forged"]


def printable(text: str, longest: int = 200) -> str:
    r"""Text of unknown origin, escaped and shortened so that it can neither control nor fill a terminal.

    >>> printable("bob\x1b[2J")
    'bob\\x1b[2J'
    """
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:longest])
    return f"{shown}..." if len(text) > longest else shown


def _place(run_dir: Path) -> dict[str, str]:
    return {"user": _user(), "host": platform.node(), "run_dir": str(run_dir.resolve()), "folder": str(Path.cwd())}


def _user() -> str:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container in which the user has a number and no name
        return f"uid {os.getuid()}" if hasattr(os, "getuid") else "unknown"


def _seal(key: bytes, place: Mapping[str, str], recipe: Any) -> str:
    text = json.dumps({"place": dict(place), "recipe": recipe}, sort_keys=True, default=plain)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def key_file() -> Path:
    """The path of this user's key: `$XDG_STATE_HOME/idap/key`, or `~/.local/state/idap/key`.

    Raises:
        NoKeyError: the user has no home folder.
    """
    state = Path(os.environ.get("XDG_STATE_HOME") or "")
    if not state.is_absolute():
        try:
            state = Path.home() / ".local" / "state"
        except RuntimeError as error:
            raise NoKeyError("you have no home folder for a key; set XDG_STATE_HOME to a folder of your own") from error
    return state / "idap" / "key"


def _key(*, make: bool) -> bytes:
    file = key_file()
    try:
        if make and not file.exists():
            _make_key(file)
        found = file.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size != KEY_BYTES:
            raise NoKeyError(f"{file} is not a key of idap; delete it, and the next run makes another")
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o077):
            raise NoKeyError(
                f"the key {file} is not private: another user owns it or may read it; delete it, and the next run "
                "makes another"
            )
        return file.read_bytes()
    except FileNotFoundError as error:
        raise NoKeyError(f"there is no key {file} here") from error
    except OSError as error:
        raise NoKeyError(f"the key {file} can't be used: {error}") from error


def _make_key(file: Path) -> None:
    """Make the key; if several processes make one at the same time, the first one's is kept."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=file.parent, prefix=".key.")  # nobody else can read it
    try:
        with os.fdopen(number, "wb") as out:
            out.write(secrets.token_bytes(KEY_BYTES))
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(name, file)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            Path(name).replace(file)
    finally:
        Path(name).unlink(missing_ok=True)
