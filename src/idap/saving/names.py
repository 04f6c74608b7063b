"""Which tensor of a checkpoint is which tensor of a plan."""

from collections.abc import Callable, Iterable, Mapping

import torch

from idap.errors import CheckpointError
from idap.saving.tensors import TensorFiles
from idap.structure.plan import Plan


def sources(plan: Plan, files: TensorFiles) -> dict[str, str]:
    """Where the tensors that a plan leaves come from.

    Args:
        plan: for the model that the checkpoint belongs to.
        files: the checkpoint. All names may have a prefix that the plan's lack, such as ``model.``, or lack one; a tied
            tensor may have any of its names, or several.

    Returns:
        Canonical name of each tensor that stays and is saved -> its name in the checkpoint, in the checkpoint's order.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape; names the first.
    """
    known = {name: name for name in plan.shapes} | dict(plan.aliases)
    rename = _renaming(plan, known, files.shapes)
    found: dict[str, str] = {}
    for key, shape in files.shapes.items():
        name = known.get(rename(key))
        if name is None or name not in plan.shapes:
            raise CheckpointError(
                f"{files.file_of(key)} holds tensor {key!r}, which the plan does not know; apply a plan to the "
                "checkpoint of the very model that it was made for"
            )
        if name in plan.unsaved or plan.gone(name):
            continue
        if shape != plan.shapes[name]:
            raise CheckpointError(
                f"tensor {key!r} in {files.file_of(key)} has shape {shape}, the plan expects {plan.shapes[name]}; "
                "apply a plan to the checkpoint of the very model that it was made for"
            )
        if name in found:
            _check_alike(files, found[name], key)
        found.setdefault(name, key)
    for name, shape in plan.shapes.items():
        if name not in found and name not in plan.unsaved and not plan.gone(name):
            raise CheckpointError(f"{files.path} lacks tensor {name!r} (expected shape {shape})")
    return found


def _renaming(plan: Plan, known: Mapping[str, str], keys: Iterable[str]) -> Callable[[str], str]:
    """How a name in the checkpoint becomes one of the plan: as it is, without a prefix, or with one more."""
    keys = list(keys)
    if any(key in known for key in keys):
        return lambda key: key
    wanted = [name for name in known if known[name] not in plan.unsaved]
    for name in wanted:
        less = {key.removesuffix(name) for key in keys if key.endswith(f".{name}")}
        more = {name.removesuffix(key) for key in keys if name.endswith(f".{key}")}
        ways: list[Callable[[str], str]] = [
            *(lambda key, prefix=prefix: key.removeprefix(prefix) for prefix in sorted(less)),
            *(lambda key, prefix=prefix: prefix + key for prefix in sorted(more)),
        ]
        if ways:
            return max(ways, key=lambda way: sum(way(key) in known for key in keys))
    return lambda key: key


def _check_alike(files: TensorFiles, first: str, second: str) -> None:
    """Copies of a tied tensor must be the same, or the model of the checkpoint does not tie them."""
    same = files.dtypes[first] == files.dtypes[second]
    pairs = zip(files.pieces(first, {}), files.pieces(second, {}), strict=True) if same else ()
    if not same or not all(torch.equal(*(p.reshape(-1).view(torch.uint8) for p in pair)) for pair in pairs):
        raise CheckpointError(
            f"tensors {first!r} and {second!r} in {files.path} differ, but are one tied tensor for the plan"
        )
