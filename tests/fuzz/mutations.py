"""Damaged copies of JSON data and of files, drawn from a seed: what disks, editors, people and other versions do."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

_TOKEN = "\x00raw\x00"
_QUOTED = json.dumps(_TOKEN)

# What takes the place of a value, as JSON text: other types, numbers beyond reason, broken letters, deep nesting.
REPLACEMENTS: dict[str, str] = {
    "null": "null",
    "true": "true",
    "empty text": '""',
    "text": '"text"',
    "a number as text": '"3"',
    "zero": "0",
    "minus one": "-1",
    "a half": "0.5",
    "2**63": str(2**63),
    "-2**70": str(-(2**70)),
    "1e308": "1e308",
    "-1e308": "-1e308",
    "1e999": "1e999",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "thousands of digits": "9" * 5000,
    "a lone surrogate": '"a\\ud800b"',
    "an escape sequence": '"\\u001b[2J\\u0000"',
    "markup": '"<script>[bold]x[/bold]"',
    "a long text": json.dumps("x" * 100_000),
    "an empty list": "[]",
    "an empty object": "{}",
    "a list": "[1, null]",
    "an object": '{"a": 1}',
    "nested lists": "[" * 90 + "]" * 90,
    "nested objects": '{"a":' * 90 + "1" + "}" * 90,
    "lists nested far too deep": "[" * 100_000 + "]" * 100_000,
}


def mutations(data: Any, rng: Random) -> Iterator[tuple[str, str]]:
    """Change one thing in JSON data again and again, without an end.

    Args:
        data: as `json.loads` gives it; left as it is.
        rng: draws what is changed.

    Yields:
        What was changed, and the changed data as JSON text, which need not be valid JSON.
    """
    while True:
        changed = copy.deepcopy(data)
        places = list(_places(changed))
        if not places:
            name = rng.choice(list(REPLACEMENTS))
            yield f"all of it: {name}", REPLACEMENTS[name]
            continue
        path, parent, key = rng.choice(places)
        change = rng.choice([_replaced] * 6 + [_deleted, _added, _doubled, _renamed, _swapped])
        what, raw = change(parent, key, changed, rng)
        yield f"{path}: {what}", json.dumps(changed).replace(_QUOTED, raw)


def damages(content: bytes, rng: Random) -> Iterator[tuple[str, bytes]]:
    """Damage the bytes of a file again and again, without an end.

    Yields:
        What was done, and the damaged bytes.
    """
    while True:
        place = rng.randrange(len(content) + 1)
        flipped = bytearray(content or b"\0")
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        yield rng.choice(
            [
                ("empty", b""),
                (f"cut off at {place}", content[:place]),
                ("a bit flipped", bytes(flipped)),
                ("zeros from the middle on", content[:place] + b"\0" * (len(content) - place)),
                ("bytes that are no UTF-8", content[:place] + b"\xff\xfe\xf0" + content[place:]),
                ("UTF-16", content.decode("latin-1").encode("utf-16")),
                ("with a byte order mark", b"\xef\xbb\xbf" + content),
                ("twice", content + content),
                ("with text behind it", content + b"}x"),
            ]
        )


def misplacements(rng: Random) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Put something else in the place of a file again and again, without an end.

    Yields:
        What is done, and what does it to a file.
    """
    while True:
        yield rng.choice(
            [
                ("missing", Path.unlink),
                ("a folder in its place", _as_folder),
                ("a link that leads nowhere", _as_dangling_link),
                ("a link to itself", _as_circle),
                ("a pipe in its place", _as_pipe),
            ]
        )


def _places(data: Any, path: str = "$") -> Iterator[tuple[str, Any, Any]]:
    """Where a value lies: its path, what holds it, and its key or index there."""
    keys: Any = data.keys() if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield f"{path}.{key}", data, key
        yield from _places(data[key], f"{path}.{key}")


def _replaced(parent: Any, key: Any, whole: Any, rng: Random) -> tuple[str, str]:
    name = rng.choice(list(REPLACEMENTS))
    parent[key] = _TOKEN
    return name, REPLACEMENTS[name]


def _deleted(parent: Any, key: Any, whole: Any, rng: Random) -> tuple[str, str]:
    del parent[key]
    return "deleted", ""


def _added(parent: Any, key: Any, whole: Any, rng: Random) -> tuple[str, str]:
    if isinstance(parent, dict):
        parent["unknown"] = copy.deepcopy(parent[key])
    else:
        parent.append(copy.deepcopy(parent[key]))
    return "one more beside it", ""


def _doubled(parent: Any, key: Any, whole: Any, rng: Random) -> tuple[str, str]:
    if type(parent[key]) in (int, float):
        parent[key] = rng.choice([parent[key] * 2 + 1, -parent[key] - 1, parent[key] + 0.25])
        return f"the number {parent[key]}", ""
    return _replaced(parent, key, whole, rng)


def _renamed(parent: Any, key: Any, whole: Any, rng: Random) -> tuple[str, str]:
    if isinstance(parent, dict):
        other = rng.choice(["", "x", "\ud800", "a.b", f"{key}\n", "n" * 300])
        parent[other] = parent.pop(key)
        return f"renamed to {other!r:.20}", ""
    return _deleted(parent, key, whole, rng)


def _swapped(parent: Any, key: Any, whole: Any, rng: Random) -> tuple[str, str]:
    """Put a value from elsewhere in the data here."""
    path, other, there = rng.choice(list(_places(whole)))
    parent[key] = copy.deepcopy(other[there])
    return f"the value of {path}", ""


def _as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _as_dangling_link(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.parent / "nowhere")


def _as_circle(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def _as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)
