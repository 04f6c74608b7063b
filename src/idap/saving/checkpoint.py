"""Save a compressed model, load it without tracing, and attach the plan that led to it."""

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from idap.cost.count import tensor_bytes
from idap.errors import CheckpointError, PlanError
from idap.files import write_json
from idap.parsing import LARGEST_PLAN, PLAN, WEIGHTS, abbreviate, read_json
from idap.saving.checksums import warn_unchecked
from idap.saving.tensors import PLAN_DIGEST, TensorFiles, entry_of, without_subnormals, write_tensors
from idap.structure.chain import chain_plans, check_follows
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan, exchange_

_NAME = "_idap_plan"


def origin(model: nn.Module) -> Plan | None:
    """Get the plan that led from the original to a model that `load` or `compress` returned.

    The plan is an attribute of the model: copies of the model have it, its state dict does not.

    Returns:
        The plan; None for other models.
    """
    found = vars(model).get(_NAME)
    return found if isinstance(found, Plan) else None


def remember_(model: nn.Module, plan: Plan) -> None:
    """Attach to a model the plan that led to it from its original."""
    vars(model)[_NAME] = plan


def forget_(model: nn.Module) -> None:
    """Remove the plan from a model, so that it counts as an original, such as after its head was replaced."""
    vars(model).pop(_NAME, None)


def check_origin(model: nn.Module, plan: Plan) -> Plan | None:
    """Get the plan attached to a model, after checking that another plan for the model can follow it.

    Args:
        model: a model to compress.
        plan: any plan for it.

    Returns:
        The plan; None if the model has none.

    Raises:
        PlanError: the model was changed since it was loaded; the message names the first tensor.
    """
    found = origin(model)
    try:
        if found is not None:
            check_follows(found, plan)
    except PlanError as error:
        raise PlanError(
            f"the model was made by idap.load or compress and changed since: {error}. If the changed model is to count "
            "as the original, call idap.saving.checkpoint.forget_(model) first; plan.json is then relative to it."
        ) from error
    return found


FORMAT = 1


def save(folder: str | Path, model: nn.Module, plan: Plan, *, exact: bool = False) -> dict[str, int]:
    """Save a compressed model; each file is written whole or not at all, the plan last.

    Args:
        folder: folder for the model, created if needed; a model saved there before is replaced.
        model: the compressed model; not changed.
        plan: the plan that leads from the original to it.
        exact: whether every number is written as it is. If not, subnormal numbers are written as zeros: they change no
            result, but make convolutions slow on x86.

    Returns:
        Tensor name -> number of subnormal numbers that were written as zeros, for tensors that have any.

    Raises:
        CheckpointError: the folder can't be written, or the model's state holds something that is not a tensor.
    """
    folder = Path(folder)
    entries = [entry_of(name, tensor.detach()) for name, tensor in unique_tensors(model).items()]
    described = plan_document(plan)
    try:
        metadata = {"format": "pt", PLAN_DIGEST: digest(plan)}
        subnormal = write_tensors(folder / WEIGHTS, entries, metadata, exact=exact)
        write_json(folder / PLAN, described)
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {folder}: {error}") from error
    return subnormal


def load(folder: str | Path, model: nn.Module) -> nn.Module:
    """Load a compressed model. Nothing is traced and no data is needed.

    Args:
        folder: folder written by `save`, `Result.save` or `apply_to_checkpoint`.
        model: a freshly built original; not changed. On the meta device it takes no memory: then only the tensors of
            the compressed model are allocated, on the CPU.

    Returns:
        The compressed model, of the same class as `model`, in eval mode if `model` is. Its plan is attached to it; if
        it is compressed again, it is saved with one plan from the same original.

    Raises:
        CheckpointError: a file is missing, truncated or not what `save` writes, a tensor is not what was written (its
            checksum does not match), the tensors don't match the plan, or a model on the meta device has tensors that
            are not saved.
        PlanError: the plan does not fit `model`; the message names the first tensor, its shape and the shape expected.

    Warns:
        UncheckedFileWarning: a file was written without checksums, so damage can't be found.
    """
    plan, checked = _read_plan(Path(folder) / PLAN)
    with TensorFiles(Path(folder)) as files:
        small = apply_plan(model, plan)
        _check(small, files)
        if files.digests - {"", digest(plan)}:
            raise CheckpointError(
                f"{_place(files)} was not saved with the {PLAN} beside it: one of the two was changed or replaced; "
                "copy both again"
            )
        _materialise_(small)
        small.load_state_dict(_with_aliases(small, files.tensors()), strict=False, assign=False)
        if not checked or files.unchecked:
            warn_unchecked(files.unchecked[0] if files.unchecked else Path(folder) / PLAN)
    before = origin(model)
    remember_(small, plan if before is None else chain_plans(before, plan))
    return small


def read_plan(folder: str | Path, name: str = PLAN) -> Plan:
    """Read the plan of a saved model.

    Args:
        folder: folder of the model.
        name: name of the file with the plan.

    Raises:
        CheckpointError: the file is missing, broken, damaged or of another format.

    Warns:
        UncheckedFileWarning: the file was written without a checksum.
    """
    plan, checked = _read_plan(Path(folder) / name)
    if not checked:
        warn_unchecked(Path(folder) / name)
    return plan


def _read_plan(file: Path) -> tuple[Plan, bool]:
    """Read a plan, and say whether the file has a checksum, which is then compared."""
    try:
        description = read_json(file, largest=LARGEST_PLAN)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} holds no compressed model: {file} is missing") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else description
        raise CheckpointError(f"{file} has format {abbreviate(found)}, this version of idap reads format {FORMAT}")
    try:
        plan = Plan.from_json(description.get("plan", {}))
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from error
    if description.get("fingerprint") != fingerprint(plan.shapes):
        raise CheckpointError(f"{file} was changed after it was written: its fingerprint does not match its shapes")
    if "digest" in description and description["digest"] != digest(plan):
        raise CheckpointError(
            f"the plan in {file} is not what was written there: its checksum does not match, so the file was damaged "
            "or changed; copy it again from where it was saved"
        )
    return plan, "digest" in description


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Identify an architecture by a hash of its tensors' names and shapes."""
    text = json.dumps(sorted((name, list(shape)) for name, shape in shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_digest(model: nn.Module) -> str:
    """Identify the weights of a model by a hash of its saved tensors, with subnormal numbers as zeros."""
    found, state = hashlib.sha256(), model.state_dict()
    for name in tensor_bytes(model):
        tensor, _ = without_subnormals(state[name].detach().cpu())
        found.update(name.encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def plan_document(plan: Plan) -> dict[str, Any]:
    """The content of `plan.json` for a plan."""
    return {
        "format": FORMAT,
        "fingerprint": fingerprint(plan.shapes),
        "versions": {
            "torch": str(torch.__version__),
            "safetensors": str(safetensors.__version__),
            "python": platform.python_version(),
        },
        "digest": digest(plan),
        "plan": plan.to_json(),
    }


def digest(plan: Plan) -> str:
    """Identify a plan by a hash; it is written as checksum into its file, and into the file of the weights."""
    return hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every saved tensor of a model once, under its first name.

    Raises:
        CheckpointError: the model's state holds something that is not a tensor.
    """
    state = model.state_dict(keep_vars=True)
    for name, held in state.items():
        if not isinstance(held, Tensor):
            raise CheckpointError(
                f"{name!r} in the model's state is {type(held).__name__}, not a tensor, and can't be saved without "
                "pickle; let get_extra_state return a tensor, or keep it out of the state"
            )
    return {name: state[name] for name in tensor_bytes(model)}


def _with_aliases(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    first: dict[int, str] = {}
    return {name: tensors[first.setdefault(id(t), name)] for name, t in model.state_dict(keep_vars=True).items()}


def _materialise_(model: nn.Module) -> None:
    """Allocate the tensors of a model that are on the meta device.

    Raises:
        CheckpointError: one of them is not saved, so its numbers are unknown.
    """
    saved = {id(tensor): tensor for tensor in unique_tensors(model).values() if tensor.is_meta}
    for path, module in model.named_modules():
        for name, held in (*vars(module).items(), *module._buffers.items()):
            if isinstance(held, Tensor) and held.is_meta and id(held) not in saved:
                where = f"{path}.{name}" if path else name
                raise CheckpointError(
                    f"tensor {where!r} of the model is on the meta device and not saved, so its numbers are unknown; "
                    "build the model with its buffers on the CPU and only its parameters on the meta device, or all of "
                    "it on the CPU"
                )
    exchange_(model, {key: _empty(tensor) for key, tensor in saved.items()})


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
    if not isinstance(tensor, nn.Parameter):
        return empty
    made = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    vars(made).update(vars(tensor))  # attributes that users set for their optimisers
    return made


def _place(files: TensorFiles) -> Path:
    return files.path / WEIGHTS if (files.path / WEIGHTS).exists() else files.path


def _check(model: nn.Module, files: TensorFiles) -> None:
    wanted = unique_tensors(model)
    for name, tensor in wanted.items():
        if name not in files.shapes:
            raise CheckpointError(f"{_place(files)} lacks tensor {name!r} (expected shape {tuple(tensor.shape)})")
        file, shape, dtype = files.file_of(name), files.shapes[name], files.dtypes[name]
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"tensor {name!r} in {file} has shape {shape}, the plan makes it {tuple(tensor.shape)}; plan and "
                "weights don't belong together"
            )
        if dtype != tensor.dtype:
            raise CheckpointError(
                f"tensor {name!r} in {file} is {dtype}, the model's is {tensor.dtype}; first convert the model to the "
                f"dtype in which it was compressed: model.to({dtype})"
            )
    extra = sorted(set(files.shapes) - set(wanted))
    if extra:
        raise CheckpointError(f"{files.file_of(extra[0])} holds tensor {extra[0]!r}, which the model does not have")
