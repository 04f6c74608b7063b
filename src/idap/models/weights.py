"""Load trained weights into a model if every tensor fits, and write them."""

import difflib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from idap.errors import CheckpointError
from idap.parsing import abbreviate
from idap.saving.checksums import warn_unchecked
from idap.saving.tensors import CODES, TensorFiles, entry_of, write_tensors

# Keys under which training scripts store the tensors in a larger checkpoint.
_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")

# Prefixes that wrappers put before every name: torch.compile, DataParallel, Lightning.
_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.", "model.")


def load_weights(model: nn.Module, path: str | Path, *, of_run: bool = False) -> None:
    """Load a file of weights into a model, in place and strictly.

    Names may have the prefix of a wrapper: `module.` of DataParallel, `_orig_mod.` of torch.compile, `model.`. Tied
    tensors may be stored once. The batch counters of norms (`num_batches_tracked`) may be missing, as in older files.

    Args:
        model: the model, which is changed only if everything fits.
        path: a `.safetensors` file, or a checkpoint that `torch.load` reads with `weights_only=True`.
        of_run: whether `keep_weights` wrote the file, so that it should hold checksums.

    Warns:
        UncheckedFileWarning: `of_run`, and the file holds no checksums.

    Raises:
        CheckpointError: the file is missing, truncated or of another kind, or a tensor is missing, unexpected or of
            another shape; the message names the first of them.
    """
    path = Path(path).expanduser()
    if not _is_file(path):
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*")], n=1)
        advice = f"did you mean {path.with_name(near[0])}?" if near else "check the path."
        raise CheckpointError(f"the weights {path} do not exist; {advice}")
    wanted = {name: own for name, own in model.state_dict(keep_vars=True).items() if isinstance(own, Tensor)}
    read = _read_safetensors(path, of_run=of_run) if path.suffix == ".safetensors" else _read_checkpoint(path)
    tensors = _complete(_without_prefixes(read, wanted), wanted)
    _check(tensors, wanted, path)
    try:
        model.load_state_dict(tensors, strict=False)
    except (RuntimeError, TypeError) as error:  # raised by the model's own code for loading
        raise CheckpointError(f"the weights {path} can't be loaded: {error}") from error


def keep_weights(model: nn.Module, file: Path, notes: Mapping[str, str]) -> None:
    """Write all tensors of a model's state, tied ones under each name, so that `load_weights` reads them back.

    Args:
        model: any module.
        file: path of the file, which is written whole or not at all.
        notes: text to write beside the tensors, by key.

    Raises:
        CheckpointError: the file can't be written.
    """
    check_keepable(model)
    tensors = {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    try:
        write_tensors(file, [entry_of(name, tensor) for name, tensor in tensors.items()], notes, exact=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the weights {file}: {error}") from error


def check_keepable(model: nn.Module) -> None:
    """Check that `keep_weights` can write a model's state.

    Raises:
        CheckpointError: a tensor is of a kind that safetensors files can't hold; the message names it.
    """
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and (value.layout is not torch.strided or value.dtype not in CODES.values()):
            raise CheckpointError(
                f"{name!r} in the model's state is a tensor of {value.dtype} with {value.layout}, which safetensors "
                "files can't hold; make it an ordinary tensor."
            )


def notes_in(file: Path) -> dict[str, str]:
    """Read the notes that `keep_weights` wrote beside the tensors; empty if there are none.

    Raises:
        CheckpointError: the file is broken.
    """
    try:
        if not file.is_file():
            raise OSError("it is not a file")
        with safetensors.safe_open(file, "pt") as held:
            return dict(held.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is broken ({error}); delete it, and it is made again.") from error


def _read_safetensors(path: Path, *, of_run: bool) -> dict[str, Tensor]:
    with TensorFiles(path) as files:
        if of_run and files.unchecked:
            warn_unchecked(path)
        return {name: tensor.clone() for name, tensor in files.tensors().items()}


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, or is not a checkpoint of torch; idap runs no code from a file. In the "
            "program that wrote it, save only the weights: safetensors.torch.save_file(model.state_dict(), ...)."
        ) from error
    except Exception as error:  # a broken file can raise any exception
        raise CheckpointError(
            f"{path} is truncated or not a checkpoint of torch ({type(error).__name__}: {error}); copy or download it "
            "again."
        ) from error
    return _tensors_in(found, path)


def _tensors_in(found: Any, path: Path) -> dict[str, Tensor]:
    nested = next((key for key in _NESTED if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)), None)
    inner = found if nested is None else found[nested]
    if not isinstance(inner, Mapping) or not all(isinstance(value, Tensor) for value in inner.values()):
        keys = (
            f" with the keys {', '.join(str(key)[:60] for key in list(inner)[:6])}"
            if isinstance(inner, Mapping)
            else ""
        )
        raise CheckpointError(
            f"{path} holds {type(inner).__name__}{keys}; expected tensors by name, as model.state_dict() gives them."
        )
    for name, value in inner.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{path} holds a tensor under {abbreviate(name)}; expected names, as model.state_dict() gives them."
            )
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            kind = "quantized" if value.is_quantized else "without numbers" if value.is_meta else str(value.layout)
            raise CheckpointError(
                f"{path} holds {name!r}, which is {kind}; idap compresses models of ordinary tensors. Save them with "
                "tensor.to_dense() or tensor.dequantize()."
            )
    return dict(inner)


def _without_prefixes(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        known = any(name in wanted for name in tensors)
        if tensors and not known and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _complete(tensors: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the tensors that a file may lack: those under other names of tied tensors, and batch counters of norms."""
    given = {id(wanted[name]): tensor for name, tensor in tensors.items() if name in wanted}
    for name, own in wanted.items():
        if name not in tensors and id(own) in given:
            tensors[name] = given[id(own)]
        elif name not in tensors and name.rpartition(".")[2] == "num_batches_tracked":
            tensors[name] = own
    return tensors


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    missing = [name for name in wanted if name not in tensors]
    unexpected = sorted(name for name in tensors if name not in wanted)
    problems = []
    if missing:
        problems.append(f"lacks {missing[0]!r} of shape {tuple(wanted[missing[0]].shape)}{_more(missing)}")
    if unexpected:
        problems.append(f"holds {unexpected[0]!r}, which the model does not have{_more(unexpected)}")
    for name, tensor in tensors.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            problems.append(
                f"holds {name!r} with shape {tuple(tensor.shape)}, the model's has {tuple(wanted[name].shape)}"
            )
            break
        if name in wanted and wanted[name].is_floating_point() and not tensor.dtype.is_floating_point:
            kind = "complex numbers" if tensor.is_complex() else f"whole numbers ({tensor.dtype})"
            problems.append(f"holds {name!r} with {kind}, those of the model are {wanted[name].dtype}")
            break
        if name in wanted and tensor.is_complex() and not wanted[name].is_complex():
            problems.append(f"holds {name!r} with complex numbers, those of the model are {wanted[name].dtype}")
            break
    if problems:
        raise CheckpointError(
            f"{path} does not fit the model: it {'; it '.join(problems)}. "
            f"{_advice(tensors, wanted, missing, unexpected)}"
        )


def _advice(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], missing: Sequence[str], unexpected: Sequence[str]
) -> str:
    """Name the number of classes if only the number of outputs of the last layers differs."""
    differ = {
        (tensors[name].shape[0], own.shape[0])
        for name, own in wanted.items()
        if name in tensors and tensors[name].shape != own.shape and own.ndim and tensors[name].ndim
    }
    inner = [
        name
        for name, own in wanted.items()
        if name in tensors and (tensors[name].ndim != own.ndim or tensors[name].shape[1:] != own.shape[1:])
    ]
    if not missing and not unexpected and not inner and len(differ) == 1:
        stored, built = differ.pop()
        return (
            f"The weights are those of a model with {stored} classes, and the model has {built}: take weights for "
            f"{built} classes, or build it with model.classes = {stored} for data with {stored} classes."
        )
    return "Build the model that the weights belong to, with the same number of classes."


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise CheckpointError(f"the weights {path} can't be read: {error}") from error


def _more(names: Sequence[str]) -> str:
    return f" ({len(names) - 1} more)" if len(names) > 1 else ""
