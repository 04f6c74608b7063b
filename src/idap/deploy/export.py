"""Write a model for use without its Python code: ONNX, torch.export or plain weights; each file is checked first.

A file is written into a folder beside its place, read back there by what will run it, and compared with the model on
inputs that it was not made with. Only then it takes its name, so a file that is there is one that agreed.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from idap.deploy.formats import Check, Program, onnx_runner, program_of, program_runner, write_onnx, write_program
from idap.errors import CheckpointError, ConfigError, ExportError
from idap.files import folder_beside
from idap.graph.run import skeleton
from idap.saving.checkpoint import unique_tensors
from idap.saving.tensors import entry_of, write_tensors
from idap.surgery.compare import Inputs, batch_size, fresh_inputs, largest_difference

TOLERANCE = 1e-4
_SUFFIX: Mapping[str, str] = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ".safetensors"}
_OTHER_BATCHES = (1, 2, 5)
_DRAWS = 2


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how it was checked.

    Attributes:
        file: where it lies.
        to: "onnx", "pt2" or "safetensors".
        bytes: its size, with that of the file of weights which ONNX puts beside models above 2 GB.
        difference: the largest difference from the model over the model's largest output, over all checks.
        batches: batch sizes at which the file was run; empty for weights, which are compared bit by bit.
        dynamic_batch: whether the file takes batches of any size.
        inputs: the file's own names of its inputs.
        outputs: the file's own names of its outputs.
        opset: of an ONNX file.
    """

    file: Path
    to: str
    bytes: int
    difference: float
    batches: tuple[int, ...] = ()
    dynamic_batch: bool = False
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    opset: int | None = None


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    file: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    to: str = "onnx",
    dynamic_batch: bool = True,
    opset: int | None = None,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a model as ONNX or as a `torch.export` program, and check what was written against the model.

    The file is run (onnxruntime on the CPU, or `torch.export.load`) on fresh random inputs like the example's, at the
    batch sizes 1, 2, 5 and the example's. On a mismatch nothing is written; a file that was there before stays.

    Args:
        model: any module that `torch.export` can export; it is left as it was and exported in evaluation mode.
        args: positional example inputs, always a tuple.
        file: ends in .onnx or .pt2; replaced if it is there.
        kwargs: keyword example inputs. Numbers, strings and None become part of the program.
        to: "onnx" (needs the extra `idap[onnx]`) or "pt2".
        dynamic_batch: whether the first dimension of all inputs that have the same size there is left open; without it
            the file takes the example's shapes alone.
        opset: of ONNX; None: what this version of torch recommends.
        tolerance: largest relative difference allowed; float16 needs about 1e-2.

    Returns:
        What was written, with the largest difference found.

    Raises:
        ExportError: a package is missing, the model can't be exported, its batch can't be left open, or the file gives
            other outputs than the model.
        ConfigError: `to` is unknown, or the file has another suffix.

    Example:
        >>> from tempfile import mkdtemp
        >>> done = export(nn.Linear(3, 2), (torch.zeros(4, 3),), Path(mkdtemp()) / "small.pt2", to="pt2")
        >>> done.batches, done.inputs, done.difference
        ((1, 2, 4, 5), ('input',), 0.0)
    """
    _check_settings(args, to, opset)
    file = _check_path(file, to)
    model, (args, kwargs) = _subject(model, args, dict(kwargs or {}), to)
    program = program_of(model, args, kwargs, dynamic_batch=dynamic_batch)
    with _write_beside(file) as beside:
        write: Callable[[Program, Path, int | None], Check] = write_onnx if to == "onnx" else write_program
        check = write(program, beside, opset)
        run = onnx_runner(beside) if to == "onnx" else program_runner(beside)
        batches, difference = _compare(model, run, (args, kwargs), file, dynamic=dynamic_batch, tolerance=tolerance)
        size = sum(each.stat().st_size for each in beside.parent.iterdir())
    return Exported(
        file=file,
        to=to,
        bytes=size,
        difference=difference,
        batches=batches,
        dynamic_batch=dynamic_batch,
        **asdict(check),
    )


def export_weights(model: nn.Module, file: str | Path) -> Exported:
    """Write a model's state as one safetensors file: tied tensors once, with checksums, no plan, no code.

    Args:
        model: any module.
        file: ends in .safetensors; replaced if it is there.

    Returns:
        What was written, after it was read back and compared bit by bit.

    Raises:
        ExportError: the state holds what is no tensor, or is read back differently.
        ConfigError: the file has another suffix.
    """
    file = _check_path(file, "safetensors")
    with _write_beside(file) as beside:
        try:
            entries = [entry_of(name, tensor.detach()) for name, tensor in unique_tensors(model).items()]
            write_tensors(beside, entries, {"format": "pt"}, exact=True)
        except CheckpointError as error:
            raise ExportError(f"{type(model).__name__} can't be written as safetensors: {error}") from error
        held = model.state_dict()
        for name, tensor in load_file(str(beside)).items():
            mine = held[name].detach().cpu()
            if mine.dtype != tensor.dtype or not torch.equal(mine.nan_to_num(), tensor.nan_to_num()):
                raise ExportError(f"tensor {name!r} is read back from {file} differently from what was written.")
        size = beside.stat().st_size
    return Exported(file=file, to="safetensors", bytes=size, difference=0.0)


def _check_settings(args: object, to: str, opset: int | None) -> None:
    if to not in ("onnx", "pt2"):
        raise ConfigError(f"a program is exported to 'onnx' or 'pt2', found {to!r}; export_weights writes safetensors.")
    if not isinstance(args, tuple):
        raise ExportError(f"example inputs must be a tuple, found {type(args).__name__}; for one input x write (x,).")
    if opset is not None and to != "onnx":
        raise ConfigError(f"an opset is a version of ONNX; leave it out for {to!r}.")


def _check_path(file: str | Path, to: str) -> Path:
    file = Path(file)
    if file.suffix != _SUFFIX[to]:
        raise ConfigError(f"{file} should end in {_SUFFIX[to]}, as it is to hold {to}.")
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; name a file in it.")
    return file


def _subject(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], to: str) -> tuple[nn.Module, Inputs]:
    """The model in evaluation mode, on the CPU where that is what will run it, and its inputs there."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ExportError(f"{type(model).__name__} is on the meta device and has no weights; load them first.")
    if to == "onnx" and any(tensor.device.type != "cpu" for tensor in tensors):
        moved: Inputs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, (args, kwargs))
        return copy.deepcopy(model).cpu().eval(), moved
    return skeleton(model).eval(), (args, kwargs)


def _compare(
    model: nn.Module, run: Any, example: Inputs, file: Path, *, dynamic: bool, tolerance: float
) -> tuple[tuple[int, ...], float]:
    """The batch sizes at which the file was run, and the largest difference."""
    own = batch_size(*example)
    batches: list[int | None] = [own]
    if dynamic and own is not None:
        batches = [*sorted({own, *_OTHER_BATCHES})]
    worst = 0.0
    for batch in batches:
        for seed in range(_DRAWS):
            inputs = fresh_inputs(model, *example, batch=batch, seed=seed)
            try:
                error, said = largest_difference(model, run, inputs)
            except Exception as failure:
                raise ExportError(
                    f"{type(model).__name__}, exported to {file.name}, does not run with a batch of {batch}: "
                    f"{type(failure).__name__}: {failure}. Nothing was written."
                ) from failure
            if not error <= tolerance:
                raise ExportError(
                    f"{type(model).__name__}, exported to {file.name}, differs from the model with a batch of {batch}: "
                    f"{said}; allowed is {tolerance:g}. Nothing was written; if the difference is rounding, pass a "
                    "larger tolerance."
                )
            worst = max(worst, error)
    return tuple(batch for batch in batches if batch is not None), worst


@contextmanager
def _write_beside(file: Path) -> Iterator[Path]:
    """A path of the same name in a new folder beside the file; what is written there takes the file's place.

    Weights that lie in a file of their own go first: the file that names them comes last.
    """
    try:
        with folder_beside(file) as folder:
            yield folder / file.name
            for written in sorted(folder.iterdir(), key=lambda each: each.name == file.name):
                written.replace(file.parent / written.name)
    except OSError as error:
        raise ExportError(f"cannot write {file}: {error}") from error
