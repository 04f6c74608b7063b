"""Which run folders were made here: by this user, on this machine, in this place, with a recipe that nobody changed.

A run notes who began it and where. Everybody can write that into a folder, so it is sealed: with a keyed hash (HMAC)
over these facts and the recipe, whose key is a random number in a file that only this user can read. Commands that run
the code which the recipe of a run names ask first where the seal is missing or does not fit.
"""

import getpass
import hashlib
import hmac
import json
import os
import platform
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idap.files import plain

FACTS = ("user", "host", "run_dir", "folder")
"""What is noted of a place: who, on which machine, the run folder, and the working folder."""
KEY_BYTES = 32


class NoKeyError(Exception):
    """The key can't be used; the message says why."""


def sealed_place(run_dir: Path, recipe: Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    """Note where a run begins, and seal that together with its recipe.

    The key is made where there is none yet.

    Args:
        run_dir: folder of the run.
        recipe: of the run; without one there is no code to run, and nothing to seal.

    Returns:
        `FACTS` by name, with a "seal" that is None where there is none; and why there is none, "" where there is one or
        none is needed.
    """
    place = _place(run_dir)
    if recipe is None:
        return {**place, "seal": None}, ""
    try:
        return {**place, "seal": _seal(_key(make=True), place, recipe)}, ""
    except NoKeyError as error:
        return {**place, "seal": None}, str(error)


def foreign_signs(run_dir: Path, settings: Mapping[str, Any], *, folder_matters: bool) -> list[str]:
    """Say what speaks against that a run was made here.

    Args:
        run_dir: folder of the run.
        settings: that it noted when it began.
        folder_matters: whether the working folder must be that of the beginning too: modules are looked for there.

    Returns:
        Parts of a sentence, safe to print; none for a run that was made here.
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
    return ["it says that it was made here, but its seal does not fit: somebody changed its recipe, or wrote it all"]


def printable(text: str, longest: int = 200) -> str:
    r"""Text of unknown origin, so that it can't do anything to a terminal, nor fill it.

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
    """Where the key of this user lies: `$XDG_STATE_HOME/idap/key`, or `~/.local/state/idap/key`.

    Raises:
        NoKeyError: the user has no home.
    """
    state = Path(os.environ.get("XDG_STATE_HOME") or "")
    if not state.is_absolute():
        try:
            state = Path.home() / ".local" / "state"
        except RuntimeError as error:
            raise NoKeyError("you have no home folder for a key; set XDG_STATE_HOME to a folder of yours") from error
    return state / "idap" / "key"


def _key(*, make: bool) -> bytes:
    file = key_file()
    try:
        if make and not file.exists():
            _make_key(file)
        found = file.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size != KEY_BYTES:
            raise NoKeyError(f"{file} is no key of idap; delete it, and the next run makes another")
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o077):
            raise NoKeyError(f"the key {file} is not yours alone; delete it, and the next run makes another")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise NoKeyError(f"there is no key {file} here") from error
    except OSError as error:
        raise NoKeyError(f"the key {file} can't be used: {error}") from error


def _make_key(file: Path) -> None:
    """Make the key; where several processes begin at once, the first one's stays."""
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
