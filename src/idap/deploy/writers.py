"""Make, write and run programs in two formats: `torch.export` archives and ONNX."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from idap.errors import ExportError
from idap.graph.run import own_inputs
from idap.surgery.compare import batch_size, is_batched, path_keys, resize_inputs

Run = Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]]
BATCH = "batch"
_FITTING = (Tensor, type(None))
_INLINE_BYTES = 1_900_000_000
"""Larger weights are written to a separate file, since an ONNX file holds at most 2 GB."""


@dataclass(frozen=True)
class Program:
    """A model exported by torch.export.

    Attributes:
        exported: the program.
        name: class name of the model, for error messages.
        size: size of its weights in bytes.
        dynamic_shapes: the dimensions that are open.
        inputs: names of the input tensors.
        outputs: names of the tensors that the model returns, such as ``logits`` or ``0.1``; ``output`` for one alone.
        plain: type of the first other value that it returns, such as "int"; "" if it returns only tensors and None.
    """

    exported: ExportedProgram
    name: str
    size: int
    dynamic_shapes: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    plain: str


@dataclass(frozen=True)
class Check:
    """The names of inputs and outputs in a written file, and its opset."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int | None = None


def program_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, dynamic_batch: bool) -> Program:
    """Export a model with `torch.export`.

    Args:
        model: the model, in evaluation mode.
        args: positional example inputs.
        kwargs: keyword example inputs.
        dynamic_batch: whether the batch size stays open.

    Returns:
        The program.

    Raises:
        ExportError: the model doesn't run, can't be exported, or its code fixes the batch size.
    """
    shapes: Any = None
    if dynamic_batch:
        batch = batch_size(args, kwargs)
        if batch is None:
            raise ExportError(
                f"no input of {type(model).__name__} has a batch dimension; export with dynamic_batch=False."
            )
        if batch < 2:  # the exporter treats a size of 1 as constant
            args, kwargs = resize_inputs(args, kwargs, 2)
        open_shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
        dim = Dim(BATCH)
        for leaf in tree_leaves((args, kwargs)):
            if is_batched(leaf, max(batch, 2)):
                open_shapes[leaf] = {0: dim}
        shapes = open_shapes.dynamic_shapes(model, args, kwargs)
    try:
        mine, named = own_inputs(args, kwargs)
        with torch.no_grad():
            returned = model(*mine, **named)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} does not accept the example inputs: {type(error).__name__}: {error}. Pass inputs "
            "on which model(*args, **kwargs) runs."
        ) from error
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise _export_error(model, error) from error
    size = sum(tensor.nbytes for tensor in {id(t): t for t in exported.state_dict.values()}.values())
    given = zip(exported.graph_signature.user_inputs, tree_leaves((args, kwargs)), strict=True)
    return Program(
        exported,
        type(model).__name__,
        size,
        shapes,
        inputs=tuple(str(name) for name, leaf in given if isinstance(leaf, Tensor)),
        outputs=_output_names(returned),
        plain=next((type(leaf).__name__ for leaf in tree_leaves(returned) if not isinstance(leaf, _FITTING)), ""),
    )


def _output_names(returned: Any) -> tuple[str, ...]:
    leaves = [(path, leaf) for path, leaf in tree_flatten_with_path(returned)[0] if isinstance(leaf, Tensor)]
    return tuple(".".join(map(str, path_keys(path))) or "output" for path, _ in leaves)


def _export_error(model: nn.Module, error: Exception) -> ExportError:
    text, name = str(error), type(model).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    if "Constraints violated" in text:
        told = next((line for line in lines if line.startswith("- ")), lines[0]).removeprefix("- ").split(". ")[0]
        return ExportError(
            f"the batch size of {name} can't be left open: {told}. If its code fixes the size, export with "
            "dynamic_batch=False, for the size of the example. If another dimension only happens to be as large as "
            "the batch, use an example with another batch size."
        )
    reason = lines[0]
    if "register a pytree" in reason:
        reason = (
            f"{reason.split(', which')[0]}. Register that class with torch.export.register_dataclass, or return a dict"
        )
    return ExportError(f"torch.export cannot export {name}: {type(error).__name__}: {reason}")


def write_program(program: Program, file: Path, _opset: int | None = None) -> Check:
    """Write a program as an archive that `torch.export.load` reads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(program.exported, str(file))
    except OSError:
        raise
    except Exception as error:
        raise ExportError(f"the program of {program.name} can't be saved: {type(error).__name__}: {error}") from error
    return Check(program.inputs, program.outputs)


def program_runner(file: Path) -> Run:
    """Load a written program; returns a function that runs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.load(str(file)).module()

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            return [leaf for leaf in tree_leaves(module(*args, **kwargs)) if isinstance(leaf, Tensor)]

    return run


def write_onnx(program: Program, file: Path, opset: int | None = None) -> Check:
    """Write a program as ONNX; weights above 2 GB are written to a separate file beside it.

    Raises:
        ExportError: a package is missing, or the program can't be expressed in ONNX.
    """
    need_onnx()
    import onnx  # noqa: PLC0415 - optional

    if program.plain:
        raise ExportError(
            f"{program.name} returns {program.plain} beside tensors, which ONNX can't hold; wrap the model in one that "
            "returns only tensors, or export to pt2."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                program.exported,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=program.dynamic_shapes,
                input_names=program.inputs,
                output_names=[name if name not in program.inputs else f"{name}.output" for name in program.outputs],
                verbose=False,
            )
            assert made is not None
            made.save(str(file), external_data=program.size > _INLINE_BYTES)
        onnx.checker.check_model(str(file))
    except OSError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or ["no reason given"])[0]
        raise ExportError(f"torch.onnx cannot write {program.name}: {type(cause).__name__}: {reason}") from error
    graph, written = made.model.graph, made.model.opset_imports[""]
    if opset is not None and written != opset:
        raise ExportError(
            f"{program.name} can't be written with opset {opset} of ONNX, only with {written}; leave the opset out."
        )
    inputs, outputs = (tuple(str(value.name) for value in values) for values in (graph.inputs, graph.outputs))
    return Check(inputs, outputs, written)


def onnx_runner(file: Path) -> Run:
    """Load a written ONNX file into onnxruntime on the CPU; returns a function that runs it."""
    need_onnx()
    import onnxruntime  # noqa: PLC0415 - optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no other common class
        raise ExportError(
            f"onnxruntime cannot run {file.name} on the CPU, so it can't be checked: {error}. Nothing was written; "
            "export the model in float32."
        ) from error
    wanted = [each.name for each in session.get_inputs()]

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        given = [leaf.numpy() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        feed = dict(zip(wanted, given, strict=True))
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


def need_onnx() -> None:
    """Check that the optional packages for ONNX are installed.

    Raises:
        ExportError: a package is missing; the message names the first.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ExportError(f"ONNX needs the package {name}, which is missing. Run: pip install 'idap[onnx]'")
