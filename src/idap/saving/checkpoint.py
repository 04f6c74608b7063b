"""Save a compressed model, and load it into a freshly built original without tracing.

folder/
├── model.safetensors   the small tensors; tied tensors once
└── plan.json           format, versions, fingerprint of the original, and the plan
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from idap.errors import CheckpointError
from idap.record import write_bytes, write_json
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan

FORMAT = 1
WEIGHTS, PLAN = "model.safetensors", "plan.json"
PLAN_DIGEST = "idap_plan"


def save(folder: str | Path, model: nn.Module, plan: Plan) -> None:
    """Save a compressed model; each file is written whole or not at all, the plan last.

    Args:
        folder: created where needed; a model saved there before is replaced.
        model: the compressed model.
        plan: the plan that leads from the original to it.

    Raises:
        CheckpointError: the folder can't be written, or the model's state holds something that is no tensor.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _owned(model).items()}
    described = plan.to_json()
    description = {
        "format": FORMAT,
        "fingerprint": fingerprint(plan.shapes),
        "versions": {
            "torch": str(torch.__version__),
            "safetensors": str(safetensors.__version__),
            "python": platform.python_version(),
        },
        "plan": described,
    }
    try:
        weights = save_safetensors(_apart(tensors), metadata={"format": "pt", PLAN_DIGEST: _digest(described)})
        write_bytes(folder / WEIGHTS, weights)
        write_json(folder / PLAN, description)
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {folder}: {error}") from error


def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """Load a compressed model. Nothing is traced and no data is needed.

    Args:
        folder: written by `save`.
        model: a freshly built original; it is left as it is.

    Returns:
        A module of the same class as `model`, small, in eval mode if `model` is.

    Raises:
        CheckpointError: a file is missing, truncated or not what `save` writes, or the tensors don't match the plan.
        PlanError: the plan does not fit `model`; names the first tensor, its shape and the shape expected.
    """
    plan, file = read_plan(folder), Path(folder) / WEIGHTS
    tensors, made_for = _read_weights(file)
    small = apply_plan(model, plan)
    _check(small, tensors, file)
    if made_for not in ("", _digest(plan.to_json())):
        raise CheckpointError(
            f"{file} was not saved with the {PLAN} beside it: one of the two was changed or replaced; copy both again"
        )
    small.load_state_dict(_with_aliases(small, tensors), strict=False, assign=False)
    return small


def read_plan(folder: str | Path) -> Plan:
    """Read the plan of a saved model.

    Raises:
        CheckpointError: it is missing, broken or of another format.
    """
    file = Path(folder) / PLAN
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no compressed model: {file} is missing") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is broken: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else description
        raise CheckpointError(f"{file} has format {found!r}, this version of idap reads format {FORMAT}")
    plan = Plan.from_json(description.get("plan", {}))
    if description.get("fingerprint") != fingerprint(plan.shapes):
        raise CheckpointError(f"{file} was changed after it was written: its fingerprint does not match its shapes")
    return plan


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A short name for an architecture: a hash of its tensors' names and shapes."""
    text = json.dumps(sorted((name, list(shape)) for name, shape in shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(described: Mapping[str, Any]) -> str:
    """A short name for a plan, which the weights carry so that the two can't be mixed up."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _owned(model: nn.Module) -> dict[str, Tensor]:
    """Every saved tensor once, under its first name."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name!r} in the model's state is {type(tensor).__name__}, not a tensor, and can't be saved without "
                "pickle; let get_extra_state return a tensor, or keep it out of the state"
            )
        if first.setdefault(id(tensor), name) == name:
            found[name] = tensor
    return found


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, none of which shares memory with another."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def _with_aliases(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first: dict[int, str] = {}
    return {name: tensors[first.setdefault(id(t), name)] for name, t in model.state_dict(keep_vars=True).items()}


def _read_weights(file: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file, and the digest of the plan they were made for, "" where it names none."""
    try:
        data = file.read_bytes()
        tensors: dict[str, Tensor] = load_safetensors(data)
    except FileNotFoundError as error:
        raise CheckpointError(f"the compressed model has no weights: {file} is missing") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is truncated or no safetensors file ({error}); copy or download it again"
        ) from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__", {}).get(PLAN_DIGEST, "")


def _check(model: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    wanted: dict[str, Any] = _owned(model)
    for name, tensor in wanted.items():
        if name not in tensors:
            raise CheckpointError(f"{file} lacks tensor {name!r} (expected shape {tuple(tensor.shape)})")
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"tensor {name!r} in {file} has shape {tuple(tensors[name].shape)}, the plan makes it "
                f"{tuple(tensor.shape)}; plan and weights don't belong together"
            )
        if tensors[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"tensor {name!r} in {file} is {tensors[name].dtype}, the model's is {tensor.dtype}; bring the model "
                f"to the dtype it was compressed in first: model.to({tensors[name].dtype})"
            )
    extra = sorted(set(tensors) - set(wanted))
    if extra:
        raise CheckpointError(f"{file} holds tensor {extra[0]!r}, which the model does not have")
