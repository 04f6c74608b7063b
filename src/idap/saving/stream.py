"""Apply a plan to a checkpoint on disk, tensor by tensor, without building the model."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idap.errors import CheckpointError, PlanError
from idap.files import is_leftover, remove_unfinished, write_bytes, write_json
from idap.ownership import HOLDER, LOCK, Claim, InUseError
from idap.parsing import INDEX, PLAN, WEIGHTS, inside
from idap.progress import Phase, Progress, Silent
from idap.saving.checkpoint import digest, plan_document, read_plan
from idap.saving.tensors import PLAN_DIGEST, Entry, TensorFiles, write_tensors
from idap.structure.plan import Plan


def sources(plan: Plan, files: TensorFiles) -> dict[str, str]:
    """Find the tensors in a checkpoint that a plan keeps.

    Args:
        plan: a plan for the model of the checkpoint.
        files: the checkpoint. All its names may have a prefix that those of the plan lack, such as ``model.``, or lack
            one that those of the plan have. A tied tensor may have any of its names, or several.

    Returns:
        Canonical name of each tensor that is kept and saved -> its name in the checkpoint, in the checkpoint's order.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape; the message names the first.
    """
    known = {name: name for name in plan.shapes} | dict(plan.aliases)
    rename = _rename_rule(plan, known, files.shapes)
    found: dict[str, str] = {}
    for key, shape in files.shapes.items():
        name = known.get(rename(key))
        if name is None or name not in plan.shapes:
            raise CheckpointError(
                f"{files.file_of(key)} holds tensor {key!r}, which the plan does not know; apply a plan to the "
                "checkpoint of the model that it was made for"
            )
        if name in plan.unsaved or plan.removes(name):
            continue
        if shape != plan.shapes[name]:
            raise CheckpointError(
                f"tensor {key!r} in {files.file_of(key)} has shape {shape}, the plan expects {plan.shapes[name]}; "
                "apply a plan to the checkpoint of the model that it was made for"
            )
        if name in found:
            _check_alike(files, found[name], key)
        found.setdefault(name, key)
    for name, shape in plan.shapes.items():
        if name not in found and name not in plan.unsaved and not plan.removes(name):
            raise CheckpointError(f"{files.path} lacks tensor {name!r} (expected shape {shape})")
    return found


def _rename_rule(plan: Plan, known: Mapping[str, str], keys: Iterable[str]) -> Callable[[str], str]:
    """A function from names in the checkpoint to names of the plan: it keeps them, or drops or adds a prefix."""
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
    """Refuse two copies of a tied tensor that differ, since the model of the checkpoint does not tie them."""
    same = files.dtypes[first] == files.dtypes[second]
    pairs = zip(files.pieces(first, {}), files.pieces(second, {}), strict=True) if same else ()
    if not same or not all(torch.equal(*(p.reshape(-1).view(torch.uint8) for p in pair)) for pair in pairs):
        raise CheckpointError(
            f"tensors {first!r} and {second!r} in {files.path} differ, but the plan is for a model that ties them"
        )


MARKER = ".idap-unfinished"
SMALL_FILE = 2**26
"""Most bytes of a file beside the weights that is copied."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".pkl", ".npz")


@dataclass(frozen=True, kw_only=True)
class Applied:
    """The checkpoint that `apply_to_checkpoint` wrote.

    Attributes:
        folder: folder of the checkpoint.
        files: names of the files with weights.
        tensors: number of tensors in them.
        dropped: names of the tensors that were left out: those that the plan removes, second copies of tied tensors,
            and buffers that the model does not save.
        size: bytes of the weights, before and after.
        subnormal: tensor -> number of subnormal numbers that were written as zeros.
        copied: names of the other files that were copied.
        left_out: names of the other files and folders that were not copied: weights in other formats, and large files.
    """

    folder: Path
    files: tuple[str, ...]
    tensors: int
    dropped: tuple[str, ...]
    size: tuple[int, int]
    subnormal: Mapping[str, int]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The facts as plain lists and dicts."""
        before, after = self.size
        return {**asdict(self), "folder": str(self.folder), "size": {"before": before, "after": after}}


def apply_to_checkpoint(
    plan: Plan | str | Path,
    checkpoint: str | Path,
    out: str | Path,
    *,
    max_shard_size: int = 5 * 10**9,
    progress: Progress | None = None,
) -> Applied:
    """Cut the tensors of a checkpoint on disk by a plan; `load` reads the result.

    Only a few pieces of tensors are in memory at a time. The result has the names of the plan: a common prefix of all
    names in the checkpoint is dropped or added, and tied tensors are written once. Removed blocks leave stand-ins
    without weights, so the other layers keep their numbers.

    Args:
        plan: a plan, or the file or folder that holds it.
        checkpoint: checkpoint of the original: a safetensors file, or a folder with `model.safetensors` or a sharded
            checkpoint.
        out: a new or empty folder, or one that an interrupted run left.
        max_shard_size: most bytes of one file, unless a single tensor is larger.
        progress: the listener that receives progress, tensor by tensor; None: no progress is reported.

    Returns:
        The checkpoint that was written, with the names of what was left out.

    Raises:
        CheckpointError: the checkpoint is broken or not that of the plan's original (the message names the first
            tensor), or `out` can't be written. Nothing was written unless the disk failed.
        PlanError: the plan is broken, or its code calls a function that is not allowed.
    """
    checkpoint, out, progress = Path(checkpoint), Path(out), progress or Silent()
    if max_shard_size < 1:
        raise CheckpointError(f"max_shard_size must be at least 1 byte, found {max_shard_size}")
    plan = _check_plan(plan)
    with TensorFiles(checkpoint) as files:
        found = sources(plan, files)
        shards = _shards([_entry(plan, files, name, key) for name, key in found.items()], max_shard_size)
        small, left_out = _others(checkpoint)
        after = sum(entry.nbytes for shard in shards.values() for entry in shard)
        with _claim(out, after), progress.phase("apply", len(found)) as phase:
            subnormal = _write(out, plan, shards, small, phase)
        return Applied(
            folder=out,
            files=tuple(shards),
            tensors=len(found),
            dropped=tuple(key for key in files.shapes if key not in set(found.values())),
            size=(sum(map(files.nbytes, files.shapes)), after),
            subnormal=subnormal,
            copied=tuple(file.name for file in small),
            left_out=left_out,
        )


def _check_plan(plan: Plan | str | Path) -> Plan:
    if not isinstance(plan, Plan):
        path = Path(plan)
        plan = read_plan(path) if path.is_dir() else read_plan(path.parent, path.name)
    plan.check_slots()
    if plan.projections:
        raise PlanError(
            f"the plan replaces module {min(plan.projections)!r} by a projection, whose weights were fitted to data "
            "and are in no checkpoint of the original; save the compressed model instead"
        )
    for program in plan.programs.values():
        program.check()
    return plan


def _entry(plan: Plan, files: TensorFiles, name: str, key: str) -> Entry:
    pieces = partial(files.pieces, key, plan.tensors.get(name, {}))
    return Entry(name, files.dtypes[key], plan.shape_after(name), pieces)


def _shards(entries: Sequence[Entry], largest: int) -> dict[str, list[Entry]]:
    """File name -> its tensors, in the order of the checkpoint."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > largest:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}


def _others(checkpoint: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The small files beside the weights, which are copied, and the names of the files and folders that are not."""
    small, left_out = [], []
    for path in sorted(checkpoint.iterdir()) if checkpoint.is_dir() else []:
        name = path.name
        if name.startswith(".") or name.endswith((".safetensors", ".index.json")) or name == PLAN:
            continue
        file = path if path.is_dir() else inside(checkpoint, name, "the checkpoint")
        if file.is_file() and file.stat().st_size <= SMALL_FILE and not name.endswith(_WEIGHTS):
            small.append(file)
        else:
            left_out.append(name)
    return small, tuple(left_out)


@contextmanager
def _claim(out: Path, size: int) -> Iterator[None]:
    """Hold a folder for this process, and mark it as unfinished; what an earlier run left in it is deleted."""
    claim = Claim(out)
    try:
        _check_free(out, size)  # before anything is written into a folder of somebody else
        claim.acquire()
        try:
            _check_free(out, size)  # another process may have finished in the meantime
            # It is empty, so it can't be incomplete: a process that is killed here leaves only the marker.
            (out / MARKER).touch()
            for path in out.iterdir():
                if is_leftover(path.name):
                    remove_unfinished(path)
                elif path.name.endswith(".safetensors") or path.name in (INDEX, PLAN):
                    path.unlink()
            yield
        finally:
            claim.release()
        (out / MARKER).unlink(missing_ok=True)  # last: until here, the same command may run again after a kill
    except InUseError as error:
        raise CheckpointError(
            f"{out} is in use by {error}: only one process may write there. Wait until it has ended, or choose another "
            "folder."
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint to {out}: {error}") from error


def _check_free(out: Path, size: int) -> None:
    """Check that a folder is new, empty or unfinished, and that its disk has room."""
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if MARKER not in names and (others := [name for name in names if name not in (LOCK, HOLDER)]):
        raise CheckpointError(f"{out} holds other files ({others[0]}); choose another folder, or delete this one")
    home = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(home).free
    if free < size:
        raise CheckpointError(f"the compressed checkpoint takes {size} bytes, but {home} has only {free} free")


def _write(
    out: Path, plan: Plan, shards: Mapping[str, Sequence[Entry]], small: Sequence[Path], phase: Phase
) -> dict[str, int]:
    """Write all files, in an order in which an interruption does no harm."""
    subnormal: dict[str, int] = {}
    metadata = {"format": "pt", PLAN_DIGEST: digest(plan)}
    for file in small:
        write_bytes(out / file.name, file.read_bytes())
    write_json(out / PLAN, plan_document(plan))
    for name, shard in shards.items():
        told = [replace(entry, pieces=partial(_report_pieces, entry, phase)) for entry in shard]
        subnormal |= write_tensors(out / name, told, metadata)
    if len(shards) > 1:
        size = sum(entry.nbytes for shard in shards.values() for entry in shard)
        places = {entry.name: name for name, shard in shards.items() for entry in shard}
        write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    return subnormal


def _report_pieces(entry: Entry, phase: Phase) -> Iterator[Tensor]:
    yield from entry.pieces()
    phase.advance(entry.name)
