"""`idap apply`: cut a checkpoint on disk as a plan says, tensor by tensor."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from idap.cli.failure import Outcome
from idap.cli.options import Checkpoint, Debug, Json, PlanFile, Quiet, ShardSize, SmallFolder, Verbose
from idap.cli.tables import change, short
from idap.errors import ConfigError

if TYPE_CHECKING:
    from idap.saving.stream import Applied

EXAMPLES = ("idap apply runs/resnet/model/plan.json --checkpoint original/ --out small/ --max-shard-size 2GB",)
DOCUMENT = {
    "folder": "where the result is",
    "files": "names of the files with weights",
    "tensors": "number of tensors in these files",
    "dropped": "names of the tensors that were removed",
    "size": "`before` and `after`: bytes of the weights",
    "subnormal": "tensor -> subnormal numbers that were written as zeros",
    "copied": "other files that were copied",
    "left_out": "other files that were not copied",
}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def apply_command(
    plan: PlanFile,
    *,
    checkpoint: Checkpoint,
    out: SmallFolder,
    max_shard_size: ShardSize = "5GB",
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cut a checkpoint on disk as a plan says, without building the model.

    Files are read and written a piece of a tensor at a time, so a model of any size fits into memory.
    Load the result with idap.load and a freshly built original. Layers that the plan removes become stand-ins without
    weights; the others keep their names and numbers, so nothing is renumbered. Small files beside the weights
    (config.json, tokenizer) are copied as they are and describe the original. A run that was stopped leaves no
    half-written file: run the same command again.
    """
    outcome = Outcome(command="idap apply", where=str(plan), as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    outcome.stopped = f"{out} is not complete; run the same command again."
    with outcome.report():
        size = _bytes(max_shard_size)
        from idap.saving.stream import apply_to_checkpoint  # noqa: PLC0415 - torch is slow to import

        applied = apply_to_checkpoint(plan, checkpoint, out, max_shard_size=size, progress=outcome.progress())
        outcome.document = applied.to_json()
        if not (as_json or quiet):
            _show(outcome.console, applied)


def _bytes(text: str) -> int:
    """A size such as 5GB, 500MB or 1e9.

    >>> _bytes("1.5 GB")
    1500000000
    """
    number = text.strip().rstrip("BKMGTIbkmgti")
    unit = text.strip()[len(number) :].upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise ConfigError(f"--max-shard-size {text!r} is not a size; write 5GB, 500MB or a number of bytes.") from error
    if size < 1:
        raise ConfigError(f"--max-shard-size {text!r} is less than a byte; write 5GB, 500MB or a number of bytes.")
    return size


def _show(console: Console, applied: "Applied") -> None:
    before, after = applied.size
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("weights", short(before, "B"), short(after, "B"), change(before, after))
    table.add_row("tensors", str(applied.tensors + len(applied.dropped)), str(applied.tensors), "")
    console.print(table)
    if applied.subnormal:
        count = sum(applied.subnormal.values())
        console.print(f"{count} subnormal numbers in {len(applied.subnormal)} tensors were written as zeros.")
    if applied.left_out:
        console.print(f"Not copied: {', '.join(applied.left_out)}.", markup=False, soft_wrap=not console.is_terminal)
    files = applied.files[0] if len(applied.files) == 1 else f"{len(applied.files)} files"
    console.print(f"The weights are in {applied.folder} ({files}).", markup=False, soft_wrap=not console.is_terminal)
