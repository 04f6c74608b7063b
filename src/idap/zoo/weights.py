"""Read trained weights into a model: every tensor must fit, or nothing changes."""

import difflib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from idap.errors import CheckpointError
from idap.files import write_bytes

# Names under which training scripts keep the tensors within a larger checkpoint.
_NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")

# What wrappers put before every name: torch.compile, DataParallel, Lightning.
_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.", "model.")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file of weights into a model, in place and strictly.

    Names may carry the prefix of a wrapper: `module.` of DataParallel, `_orig_mod.` of torch.compile, `model.`. Tied
    tensors may be stored once. Counters of batches that a norm has seen may be missing, older files do not have them.

    Args:
        model: changed only if everything fits.
        path: a `.safetensors` file, or a checkpoint that `torch.load` reads with `weights_only=True`.

    Raises:
        CheckpointError: the file is missing, truncated or of another kind, or a tensor is missing, unexpected or has
            another shape; names the first of them.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*")], n=1)
        advice = f"did you mean {path.with_name(near[0])}?" if near else "check the path."
        raise CheckpointError(f"the weights {path} do not exist; {advice}")
    wanted = model.state_dict(keep_vars=True)
    read = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    tensors = _completed(_without_prefixes(read, wanted), wanted)
    _check(tensors, wanted, path)
    model.load_state_dict(tensors)


def keep_weights(model: nn.Module, file: Path, notes: Mapping[str, str]) -> None:
    """Write all tensors of a model's state, each as one of its own, so that `load_weights` reads them back.

    Args:
        model: any module.
        file: appears whole or not at all.
        notes: to write beside the tensors.

    Raises:
        CheckpointError: it can't be written.
    """
    state = model.state_dict()
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    try:
        write_bytes(file, save_safetensors(tensors, metadata=dict(notes)))
    except OSError as error:
        raise CheckpointError(f"cannot write the weights {file}: {error}") from error


def notes_in(file: Path) -> dict[str, str]:
    """What `keep_weights` noted beside the tensors; nothing where there is nothing.

    Raises:
        CheckpointError: the file is broken.
    """
    try:
        with safetensors.safe_open(file, "pt") as held:
            return dict(held.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is broken ({error}); delete it to have it made again.") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_safetensors(path.read_bytes())
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({error}); copy or download it again."
        ) from error
    return tensors


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, or is no checkpoint of torch; idap runs no code from a file. In the "
            "program that wrote it, save the weights alone: safetensors.torch.save_file(model.state_dict(), ...)."
        ) from error
    except Exception as error:  # of broken bytes, torch raises whatever the first wrong one leads to
        raise CheckpointError(
            f"{path} is truncated or no checkpoint of torch ({type(error).__name__}: {error}); copy or download it "
            "again."
        ) from error
    return _tensors_in(found, path)


def _tensors_in(found: Any, path: Path) -> dict[str, Tensor]:
    nested = next((key for key in _NESTED if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)), None)
    inner = found if nested is None else found[nested]
    if not isinstance(inner, Mapping) or not all(isinstance(value, Tensor) for value in inner.values()):
        keys = f" with the keys {', '.join(map(str, list(inner)[:6]))}" if isinstance(inner, Mapping) else ""
        raise CheckpointError(
            f"{path} holds {type(inner).__name__}{keys}; expected tensors by name, as model.state_dict() gives them."
        )
    for name, tensor in inner.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path} holds a tensor named {name!r:.60}; expected names as text.")
        if tensor.layout is not torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else tensor.layout
            raise CheckpointError(
                f"{path} holds {name!r} as a tensor that is {kind}; expected dense tensors of plain numbers: save "
                "tensor.to_dense() or tensor.dequantize()."
            )
    return dict(inner)


def _without_prefixes(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        known = any(name in wanted for name in tensors)
        if tensors and not known and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _completed(tensors: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add what a file may leave out: other names of tied tensors, and counters of norms."""
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
    if problems:
        raise CheckpointError(
            f"{path} does not fit the model: it {'; it '.join(problems)}. "
            f"{_advice(tensors, wanted, missing, unexpected)}"
        )


def _advice(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], missing: Sequence[str], unexpected: Sequence[str]
) -> str:
    """Name the number of classes where nothing else differs: the last layers have other numbers of outputs."""
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
            f"{built} classes, or build it with model.classes = {stored} for data of {stored}."
        )
    return "Build the model that the weights belong to, with the same number of classes."


def _more(names: Sequence[str]) -> str:
    return f" ({len(names) - 1} more)" if len(names) > 1 else ""
