"""Read, merge, move and describe batches of the usual layouts, and seed the loaders that make them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from idap.errors import TaskError

Batch = Any
Outputs = Any
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_LABEL_KEYS = ("labels", "label")


def default_inputs(batch: Batch) -> Inputs:
    """Find the model's arguments in a batch of one of the usual layouts.

    Args:
        batch: a tensor, a tuple or list that starts with the input, or a dict of keyword arguments and labels.

    Returns:
        Positional and keyword arguments of the model.

    Raises:
        TaskError: the batch has another layout.

    Example:
        >>> default_inputs({"input_ids": 1, "labels": 2})
        ((), {'input_ids': 1})
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), {key: value for key, value in batch.items() if key not in _LABEL_KEYS}
    if isinstance(batch, tuple | list) and batch:
        return (batch[0],), {}
    raise TaskError(
        f"a batch is {describe(batch)}; expected a tensor, a non-empty tuple or list, or a dict. "
        "Pass inputs=lambda batch: ((positional, ...), {keyword: ...}) to the task."
    )


def default_logits(outputs: Outputs) -> Tensor:
    """Find the tensor of logits in a model's outputs.

    Args:
        outputs: a tensor, an object with `.logits`, a dict with 'logits', or a tuple or list that starts with a tensor.

    Returns:
        The logits, of the shape the model gave them.

    Raises:
        TaskError: the outputs have another layout.
    """
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif isinstance(outputs, Tensor):
        found = outputs
    else:
        found = getattr(outputs, "logits", None)
        if found is None and isinstance(outputs, tuple | list) and outputs:
            found = outputs[0]
    if isinstance(found, Tensor):
        return found
    raise TaskError(
        f"no logits found in the model's outputs, which are {describe(outputs)}; expected a tensor, .logits, "
        "['logits'] or a tuple that starts with a tensor. Pass logits=lambda outputs: ... to the task."
    )


def default_labels(batch: Batch) -> Tensor:
    """Find the labels in a batch of one of the usual layouts.

    Args:
        batch: a tuple or list `(input, labels, ...)`, or a dict with 'labels' or 'label'.

    Returns:
        The labels, as the loader gave them.

    Raises:
        TaskError: the batch has another layout.
    """
    found: object = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[1]
    if isinstance(found, Tensor):
        return found
    raise TaskError(
        f"no labels found in a batch, which is {describe(batch)}; expected (input, labels) or a dict with "
        "'labels'. Let the loader yield that, or build a Task with a loss and a metric of your own."
    )


def default_padding(batch: Batch) -> Tensor | None:
    """Find which positions of a batch of padded sequences count: its ``attention_mask``, (samples, positions).

    Args:
        batch: any batch; only a mapping can hold a mask, by itself or first in a tuple or list.
    """
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    mask = first.get("attention_mask") if isinstance(first, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


MERGED_BYTES = 256 * 2**20
"""Batches that are larger in sum are not merged: their activations would fill the memory."""


def merge_batches(batches: Sequence[Batch]) -> Batch | None:
    """Merge several batches into one, with their samples one after another.

    Args:
        batches: tensors, nested in tuples, lists and dicts.

    Returns:
        The batch; None if the batches can't be merged, because their shapes differ (such as sentences padded to
        different lengths) or they are too large.

    Example:
        >>> merge_batches([(torch.zeros(2, 3), torch.zeros(2)), (torch.ones(1, 3), torch.ones(1))])[0].shape
        torch.Size([3, 3])
    """
    if len(batches) == 1:
        return batches[0]
    leaves, specs = zip(*(tree_flatten(batch) for batch in batches), strict=True)
    if any(spec != specs[0] for spec in specs):
        return None
    columns = list(zip(*leaves, strict=True))
    for column in columns:
        shapes = {(leaf.shape[1:], leaf.dtype) if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in column}
        if len(shapes) > 1 or None in shapes:
            return None
    if sum(leaf.nbytes for column in columns for leaf in column) > MERGED_BYTES:
        return None
    return tree_unflatten([torch.cat(column) for column in columns], specs[0])


def default_size(batch: Batch) -> int:
    """Count the samples of a batch: the first dimension of its first tensor.

    Args:
        batch: a tensor, or tensors nested in tuples, lists and dicts.

    Returns:
        The number of samples.

    Raises:
        TaskError: no tensor of the batch has a dimension.
    """
    for tensor in tensors_of(batch):
        if tensor.ndim:
            return len(tensor)
    raise TaskError(f"a batch is {describe(batch)}, so its size is not known. Pass size=lambda batch: ... to the task.")


def move(batch: Batch, device: torch.device | str) -> Batch:
    """Move every tensor of a batch to a device.

    Args:
        batch: tensors, or objects with `.to(device)`, nested in tuples, lists and dicts.
        device: the target.

    Returns:
        The same nesting; other values are unchanged.
    """
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(part, device) for part in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(move(part, device) for part in batch)
    return batch


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """Find the tensors of a batch.

    Args:
        batch: tensors nested in tuples, lists and dicts.

    Returns:
        The tensors, in order; other values are left out.
    """
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for key in batch:
            yield from tensors_of(batch[key])
    elif isinstance(batch, tuple | list):
        for part in batch:
            yield from tensors_of(part)


def nan_in(values: Batch | Outputs) -> list[Tensor]:
    """Check which tensors of a batch or of a model's outputs hold NaN.

    Args:
        values: as `tensors_of` takes them, or an object with `.logits`.

    Returns:
        For each dense tensor of floating-point or complex numbers, a bool tensor that says whether it holds NaN; does
        not wait for the device.
    """
    tensors = list(tensors_of(values)) or list(tensors_of(getattr(values, "logits", None)))
    dense = (each for each in tensors if each.layout is torch.strided and not (each.is_nested or each.is_quantized))
    return [each.isnan().any() for each in dense if each.is_floating_point() or each.is_complex()]


def device_of(model: nn.Module) -> torch.device:
    """Return the device on which a model expects its inputs.

    Args:
        model: any module.

    Returns:
        The device of its first parameter, else of its first buffer, else the CPU.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The name of a device; for a GPU, its model name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def describe(value: object) -> str:
    """Describe a value in a few words, for an error message.

    Args:
        value: a batch, the outputs of a model, or a part of them.

    Returns:
        Its type, the shapes of tensors, and the keys of dicts.

    Example:
        >>> describe((torch.zeros(2, 3), {"labels": torch.tensor([1])}))
        'a tuple of (a float32 tensor of shape (2, 3), a dict of (labels: an int64 tensor of shape (1,)))'
    """
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{'an' if kind.startswith('i') else 'a'} {kind} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of ({', '.join(f'{key}: {describe(part)}' for key, part in value.items())})"
    if isinstance(value, tuple | list):
        shown = [describe(part) for part in value[:3]] + ["..."] * (len(value) > 3)
        return f"a {type(value).__name__} of ({', '.join(shown)})"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


@contextmanager
def seed_loader(loader: Iterable[Batch], seed: int) -> Iterator[None]:
    """Seed everything that a loader draws, and restore torch's random state and the loader's own afterwards.

    Args:
        loader: any iterable of batches.
        seed: seed of the draws within the context.
    """
    cuda = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=cuda), seed_generators(loader, seed):
        torch.manual_seed(seed)
        yield


@contextmanager
def seed_generators(loader: Iterable[Batch], seed: int) -> Iterator[None]:
    """Seed the generators of a loader and its samplers, and restore the state of each afterwards.

    Without it, a run that is stopped and resumed would read other batches than an uninterrupted one.

    Args:
        loader: any iterable of batches; without a generator, nothing is seeded.
        seed: seed of the draws within the context.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    generators = [getattr(holder, "generator", None) for holder in holders]
    own = {id(each): each for each in generators if isinstance(each, torch.Generator)}
    states = [(each, each.get_state()) for each in own.values()]
    for each in own.values():
        each.manual_seed(seed)
    try:
        yield
    finally:
        for each, state in states:
            each.set_state(state)
