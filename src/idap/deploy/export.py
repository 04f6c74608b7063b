"""Write a model for use without its Python code, as ONNX, a torch.export program or plain weights, and check the file.

A file is written into a folder beside its destination and read back there by the engine that will run it. Its outputs
are compared with those of the model on inputs that differ from the example. Only a file that agrees is moved to its
destination.
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

from idap.deploy.writers import Check, Program, onnx_runner, program_of, program_runner, write_onnx, write_program
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
    """An exported file, and the results of its check.

    Attributes:
        file: path of the file.
        to: its format: "onnx", "pt2" or "safetensors".
        bytes: its size, including the separate file of weights of ONNX models above 2 GB.
        difference: the largest difference from the model's outputs, as a share of the largest output, over all checks.
        batches: batch sizes at which the file was run; empty for weights, which are compared bit by bit.
        dynamic_batch: whether the file accepts batches of any size.
        inputs: names of the inputs in the file.
        outputs: names of the outputs in the file.
        opset: opset of an ONNX file; None for other formats.
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
    """Write a model as ONNX or as a `torch.export` program, and compare the file with the model.

    The file is run (onnxruntime on the CPU, or `torch.export.load`) on fresh random inputs like the example's, at the
    batch sizes 1, 2, 5 and the example's. If it differs, nothing is written, and a file that was there before stays.

    Args:
        model: any module that `torch.export` can export; it is not changed, and exported in evaluation mode.
        args: positional example inputs, always a tuple.
        file: path that ends in .onnx or .pt2; an existing file is replaced.
        kwargs: keyword example inputs. Numbers, strings and None become part of the program.
        to: "onnx" (needs the extra `idap[onnx]`) or "pt2".
        dynamic_batch: whether the batch size stays open: the first dimension of all inputs that have the same size
            there. If not, the file accepts only the shapes of the example.
        opset: opset of ONNX; None: the one that this version of torch recommends is used.
        tolerance: largest relative difference allowed; float16 needs about 1e-2.

    Returns:
        The exported file, with the largest difference found.

    Raises:
        ExportError: a package is missing, the model can't be exported, its batch size can't stay open, or the outputs
            of the file differ from those of the model.
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
    """Write a model's state as one safetensors file with checksums, without plan and code; each tied tensor once.

    Args:
        model: any module.
        file: path that ends in .safetensors; an existing file is replaced.

    Returns:
        The exported file, after it was read back and compared bit by bit.

    Raises:
        ExportError: the state holds something that is not a tensor, or a tensor is read back differently.
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
                raise ExportError(f"tensor {name!r} is read back from {file} with other numbers than were written.")
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
        raise ConfigError(f"{file} should end in {_SUFFIX[to]}, since its format is {to}.")
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; name a file in it.")
    return file


def _subject(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], to: str) -> tuple[nn.Module, Inputs]:
    """A copy of the model in evaluation mode and its inputs, on the CPU if the file will run there."""
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
    """Run the file and the model; returns the batch sizes, and the largest relative difference of an output."""
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
    """Give a path of the same name in a new folder beside the file, and move what is written there to its destination.

    A separate file of weights is moved first, since the other file refers to it.
    """
    try:
        with folder_beside(file) as folder:
            yield folder / file.name
            for written in sorted(folder.iterdir(), key=lambda each: each.name == file.name):
                written.replace(file.parent / written.name)
    except OSError as error:
        raise ExportError(f"cannot write {file}: {error}") from error
