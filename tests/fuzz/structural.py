"""Mutators that know the structure of an input: plain data, the JSON text of it, its bytes, and the file that holds it.

Every mutator changes its argument in place or returns the changed value, and says in a few words what it did.
"""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CANARY = "idap_fuzz_canary"
"""Part of every text that would do harm if somebody executed it."""


class Raw(str):
    """JSON text that is written as it stands; it need not be valid."""

    __slots__ = ()


class Pairs(list):  # type: ignore[type-arg]
    """The pairs of a JSON object, in which a key may come twice."""


HARM = (
    f"__import__('os').system('touch {CANARY}')",
    f"exec(open('{CANARY}', 'w').write('x'))",
    f"<img src=x onerror={CANARY}()>",
    f"../../{CANARY}",
    f"/tmp/{CANARY}",
    f"x); open('{CANARY}', 'w'); (",
    f"v0, open('{CANARY}', 'w'))",
    f"x\n    open('{CANARY}', 'w')",
    f"python:{CANARY}.py:build",
    "[red]markup[/red] [/nothing]",
    "%s %n {0} {x.__class__}",
    "\x1b]0;title\x07\x1b[2J",
)
STRINGS = ("", "0", "x" * 10_000, "\0", "é", "\ud800", "١", "true", "nan", "a.b..c", "self", "None", "cuda:7", *HARM)
NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 7, 64, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 71_748_523_458_560),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, -1.5, float("nan"), float("inf"), float("-inf")),
)
RAWS = tuple(
    Raw(text)
    for text in (
        *("9" * 5000, "1e999", "-1e-999", "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "[" * 100_000),
        *(
            "NaN",
            "-Infinity",
            "+1",
            "0x10",
            "'a'",
            "tru",
            "",
            '"\\ud800"',
            '"\\u0000"',
            '"\t"',
            '"\ud800"',
            "1.",
            "/* */ 1",
        ),
    )
)


def odd_value(dice: random.Random) -> Any:
    """A value that few readers expect."""
    match dice.randrange(8):
        case 0 | 1:
            return dice.choice(NUMBERS)
        case 2 | 3:
            return dice.choice(STRINGS)
        case 4:
            return dice.choice(RAWS)
        case 5:
            return dice.choice((None, True, False))
        case 6:
            return [dice.choice((0, "x", None, 1.5, [], {})) for _ in range(dice.choice((0, 1, 2, 3, 5)))]
        case _:
            return {dice.choice(("", "a", "0", "\ud800")): dice.choice((0, "x", None, []))}


def same_type_value(value: Any, dice: random.Random) -> Any:
    """Another value of the same type, so that checks of types let it pass."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return dice.choice((value + 1, value - 1, -value, 0, 2 * value, value + 2**32, 2**62, 10**30, -1))
    if isinstance(value, float):
        return dice.choice((value * 1.5, -value, 0.0, float("nan"), float("inf"), 1e-320, 1e300))
    if isinstance(value, str):
        return dice.choice((*STRINGS, value + "x", value[:-1], value.upper(), f" {value}"))
    if isinstance(value, list):
        return dice.choice(([], value * 2, value[::-1], value[:-1], value * 2000 if len(value) < 5 else value[1:]))
    return {} if isinstance(value, dict) else odd_value(dice)


def other_type_value(value: Any, dice: random.Random) -> Any:
    """The same value as another type."""
    return dice.choice((str(value), [value], {"x": value}, float(value) if isinstance(value, int) else 1, None))


def spot(data: Any, dice: random.Random) -> tuple[list[Any], Any, Any]:
    """A random place in nested data: the path, what holds it, and its key; deep and shallow ones are equally likely."""
    path: list[Any] = []
    holder, key, value = None, None, data
    while isinstance(value, dict | list) and value and PAIRS not in value and not (path and dice.random() < 0.25):
        holder = value
        key = dice.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = value[key]
        path.append(key)
    return path, holder, key


def mutate(data: Any, dice: random.Random, others: Sequence[Any] = ()) -> tuple[Any, str]:
    """Change one place of nested data.

    Args:
        data: dicts, lists and plain values; it may be changed.
        dice: decides.
        others: other valid data, of which parts are taken.

    Returns:
        The changed data, and what was done.
    """
    path, holder, key = spot(data, dice)
    if holder is None:
        return odd_value(dice), "all of it replaced"
    where = ".".join(map(str, path))
    ways: list[Callable[[], str]] = [
        lambda: _put(holder, key, odd_value(dice)),
        lambda: _put(holder, key, same_type_value(holder[key], dice)),
        lambda: _put(holder, key, same_type_value(holder[key], dice)),
        lambda: _put(holder, key, other_type_value(holder[key], dice)),
        lambda: _delete(holder, key),
        lambda: _splice(data, holder, key, dice),
        lambda: _add(holder, key, dice),
        lambda: _swap(holder, key, dice),
    ]
    if others:
        ways.append(lambda: _splice(dice.choice(others), holder, key, dice))
    did = dice.choice(ways)()
    return data, f"{where}: {did}"


def abbreviate(value: Any, most: int = 80) -> str:
    """A value for a report."""
    text = ascii(value)
    return text if len(text) <= most else f"{text[: most - 12]}… ({len(text)})"


def _put(holder: Any, key: Any, value: Any) -> str:
    before, holder[key] = holder[key], value
    return f"{abbreviate(before, 40)} -> {abbreviate(value)}"


def _delete(holder: Any, key: Any) -> str:
    before = holder[key]
    del holder[key]
    return f"deleted {abbreviate(before, 40)}"


def _splice(source: Any, holder: Any, key: Any, dice: random.Random) -> str:
    path, inner, name = spot(source, dice)
    value = copy.deepcopy(inner[name] if inner is not None else source)
    return f"{_put(holder, key, value)} (from {'.'.join(map(str, path))})"


def _add(holder: Any, key: Any, dice: random.Random) -> str:
    value = odd_value(dice)
    if isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]) if dice.random() < 0.5 else value)
        return f"inserted {abbreviate(holder[key])}"
    name = dice.choice((*STRINGS, f"{key}x", f"{key}.0"))
    holder[name] = value
    return f"added {abbreviate(name, 40)}: {abbreviate(value)}"


def _swap(holder: Any, key: Any, dice: random.Random) -> str:
    if isinstance(holder, dict) and dice.random() < 0.5:
        name = dice.choice(list(holder))
        holder[f"{name} " if name == key else key], holder[name] = holder[name], holder[key]
        return f"swapped with {abbreviate(name, 40)}"
    if isinstance(holder, dict):
        pairs = Pairs([*holder.items(), (key, odd_value(dice))])
        holder.clear()
        holder[PAIRS] = pairs
        return f"key twice, then {abbreviate(pairs[-1][1])}"
    other = dice.randrange(len(holder))
    holder[key], holder[other] = holder[other], holder[key]
    return f"swapped with item {other}"


PAIRS = Raw("\0pairs")
"""The only key of a dict that stands for its `Pairs`."""


def json_text(data: Any) -> str:
    """Data as JSON text, with what JSON can't say written as it stands."""
    if isinstance(data, Raw):
        return str(data)
    if isinstance(data, dict):
        pairs = data[PAIRS] if PAIRS in data else data.items()
        return "{" + ", ".join(f"{json.dumps(str(name))}: {json_text(value)}" for name, value in pairs) + "}"
    if isinstance(data, list | tuple):
        return "[" + ", ".join(map(json_text, data)) + "]"
    return json.dumps(data)


def json_bytes(data: Any) -> bytes:
    """The same as bytes; a lone surrogate is written as an escape."""
    return json_text(data).encode("utf-8", "surrogatepass")


def mutate_bytes(content: bytes, dice: random.Random, other: bytes = b"") -> tuple[bytes, str]:
    """Change bytes without regard to what they mean."""
    data = bytearray(content)
    place = dice.randrange(len(data) + 1)
    match dice.choice(("flip", "flip", "flips", "cut", "drop", "insert", "repeat", "splice", "zero", "empty")):
        case "flip" if data:
            place, bit = dice.randrange(len(data)), dice.randrange(8)
            data[place] ^= 1 << bit
            return bytes(data), f"bit {bit} of byte {place} of {len(data)} flipped"
        case "flips" if data:
            places = [dice.randrange(len(data)) for _ in range(dice.randrange(2, 9))]
            for each in places:
                data[each] = dice.randrange(256)
            return bytes(data), f"bytes {places} of {len(data)} made random"
        case "cut":
            return bytes(data[:place]), f"{len(data)} bytes cut to {place}"
        case "drop":
            end = min(len(data), place + dice.randrange(1, 9))
            return bytes(data[:place] + data[end:]), f"bytes {place} to {end} of {len(data)} dropped"
        case "insert":
            more = dice.randbytes(dice.randrange(1, 9))
            return bytes(data[:place] + more + data[place:]), f"{more!r} inserted at {place} of {len(data)}"
        case "repeat":
            return bytes(data[:place] + data), f"the first {place} bytes repeated"
        case "splice" if other:
            start = dice.randrange(len(other))
            return bytes(data[:place]) + other[start:], f"{place} bytes, then those of another file from {start} on"
        case "zero":
            end = min(len(data), place + dice.choice((1, 8, 64)))
            data[place:end] = bytes(end - place)
            return bytes(data), f"bytes {place} to {end} of {len(data)} set to 0"
        case _:
            return dice.choice((b"", b"\0", b"\n", b"null", b"{}", b"[]", b"\xff\xfe", b"\xef\xbb\xbf{}")), "replaced"


def mutate_place(file: Path, dice: random.Random, outside: Path, *, pipes: bool = True) -> str:
    """Put something else in the place of a file.

    Args:
        file: that is there.
        dice: decides.
        outside: a folder beside the input, whose files nobody may read or write.
        pipes: whether a pipe may take the place, which blocks whoever reads it.
    """
    content = file.read_bytes()
    ways = ("missing", "missing", "folder", "dangling", "circle", "outside", "null", "parent")
    way = dice.choice((*ways, "pipe") if pipes else ways)
    file.unlink()
    match way:
        case "folder":
            file.mkdir()
            if dice.random() < 0.5:
                (file / file.name).write_bytes(content)
        case "dangling":
            file.symlink_to(file.with_name("nothing"))
        case "circle":
            file.symlink_to(file.name)
        case "outside":
            target = outside / file.name
            target.write_bytes(content)
            file.symlink_to(target)
        case "null":
            file.symlink_to("/dev/null")
        case "pipe":
            os.mkfifo(file)
        case "parent":
            folder = file.parent
            for each in sorted(folder.iterdir()):
                shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
            folder.rmdir()
            folder.write_bytes(content)
    return f"{file.name}: {'is missing' if way == 'missing' else f'replaced ({way})'}"
