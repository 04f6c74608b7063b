"""Finds the parts of a data set (train, validation and test) by their usual names, and checks settings."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from idap.errors import ConfigError, TaskError

T = TypeVar("T")

PARTS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test",),
}
"""Part -> its names, for folders, for files and in a column."""

PACKED = (".gz",)


def check_path(path: str | Path, what: str) -> Path:
    """Check that a path exists.

    Args:
        path: path of a data set.
        what: what is expected there, for the error.

    Returns:
        The path, with `~` expanded.

    Raises:
        TaskError: it does not exist; the error suggests the most similar name.
    """
    path = Path(path).expanduser()
    if path.exists():
        return path
    beside = [other.name for other in path.parent.glob("*")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    if near:
        advice = f"did you mean {path.with_name(near[0])}?"
    elif path.parent.is_dir():
        advice = f"{path.parent} holds {_few(sorted(beside)) or 'nothing'}."
    else:
        advice = f"there is no folder {path.parent} either."
    raise TaskError(f"{path} does not exist, expected {what}; {advice}")


def parts_in(folder: Path, wanted: Callable[[Path], bool], what: str) -> dict[str, Path]:
    """Find the parts of a data set in its folder.

    Args:
        folder: the folder that holds them.
        wanted: whether a path can be a part.
        what: what a part is, for the error.

    Returns:
        Part -> path: "train", and "val" and "test" if they exist.

    Raises:
        TaskError: there is no train part, or two that could be the same part.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        part = find_part(_stem(path)) if wanted(path) else None
        if part is not None and part in found:
            raise TaskError(f"{folder} holds both {found[part].name} and {path.name}, which are both {part}; keep one.")
        if part is not None:
            found[part] = path
    if "train" not in found:
        holds = _few(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise TaskError(f"{folder} has no train part, expected {what} named train beside val and test; it has {holds}.")
    return found


def find_part(name: str) -> str | None:
    """Find the part that has a name; None if no part has it.

    Example:
        >>> find_part("Validation"), find_part("extra")
        ('val', None)
    """
    return next((part for part, names in PARTS.items() if name.strip().lower() in names), None)


def split_off(count: int, share: float, seed: int, what: str) -> tuple[list[int], list[int], str]:
    """Choose the training samples that become validation data, if there is none.

    Args:
        count: number of training samples.
        share: share of them that becomes validation data, between 0 and 1.
        seed: seed of the choice.
        what: what the samples are, in the plural.

    Returns:
        Indices of the samples that stay in train, indices of those for val, both in order, and a note that says so.

    Raises:
        ConfigError: the share leaves nothing on one side.
    """
    taken = round(check_share("val_share", share) * count)
    if not 0 < taken < count:
        raise ConfigError(f"val_share is {share:g} of {count} training {what}, which leaves none for train or for val.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    note = (
        f"there is no validation data: {taken:,} of the {count:,} training {what}, drawn with seed {seed}, are used "
        "for validation and not for training"
    )
    return sorted(order[taken:]), sorted(order[:taken]), note


def with_val(
    parts: Mapping[str, Sequence[T]], share: float, seed: int, what: str
) -> tuple[dict[str, Sequence[T]], tuple[str, ...]]:
    """Split val off train if there is none, and return the parts and a note; arguments as for `split_off`.

    Example:
        >>> parts, notes = with_val({"train": ["a", "b", "c", "d"]}, 0.25, 0, "rows")
        >>> len(parts["train"]), len(parts["val"]), len(notes)
        (3, 1, 1)
    """
    if "val" in parts:
        return dict(parts), ()
    train = parts["train"]
    rest, chosen, note = split_off(len(train), share, seed, what)
    return {**parts, "train": [train[place] for place in rest], "val": [train[place] for place in chosen]}, (note,)


def check_share(name: str, share: float) -> float:
    """Refuse a share that is not between 0 and 1.

    Raises:
        ConfigError: it is not.
    """
    if not 0 < share < 1:
        raise ConfigError(f"{name} must lie between 0 and 1, got {share:g}.")
    return share


def check_count(name: str, count: int, least: int = 1) -> int:
    """Refuse a number that is too small.

    Raises:
        ConfigError: it is below `least`.
    """
    if count < least:
        raise ConfigError(f"{name} must be {least} or more, got {count}.")
    return count


def check_colours(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse scales that are not one number for each of red, green and blue.

    Raises:
        ConfigError: they are not.
    """
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ConfigError(f"{name} has {len(values)} numbers, expected 3: of red, green and blue.")
    if min(std) <= 0:
        raise ConfigError(f"std must be above 0, got {list(std)}.")


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
