"""Compare two models by their outputs, on the example inputs and on random inputs like them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_unflatten

from idap.graph.run import own_inputs

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs."""


def outputs_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Every tensor that a model returns in evaluation mode, in order; its modules then return to their own modes.

    Args:
        model: it gets copies of the inputs, so it may change them in place.
        args: positional inputs.
        kwargs: keyword inputs.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        mine, named = own_inputs(args, kwargs)
        with torch.no_grad():
            returned = model(*mine, **named)
    finally:
        for module, mode in modes:
            module.training = mode
    return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]


def difference(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value of `theirs`, both of one shape; infinite where NaN meets a number.

    >>> difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    0.25
    """
    if not theirs.is_floating_point():
        return 0.0 if torch.equal(mine, theirs) else float("inf")
    same = torch.isclose(mine, theirs, rtol=0, atol=0, equal_nan=True)  # infinities of masks
    if bool(same.all()):
        return 0.0
    finite = theirs[theirs.isfinite()].abs()
    scale = finite.max().clamp_min(1e-12) if finite.numel() else torch.ones(())
    return float(((mine - theirs).abs()[~same] / scale).nan_to_num(nan=float("inf")).max())


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The first dimension of the first input tensor that has dimensions; None where there is no such tensor."""
    leaves = tree_leaves((args, dict(kwargs)))
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)


def is_batched(leaf: Any, batch: int | None) -> bool:
    """Whether an input is a tensor whose first dimension is the batch."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch


def resize_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int) -> Inputs:
    """The example inputs with another batch size; the samples are repeated in order, as often as needed."""
    old = batch_size(args, kwargs)
    leaves, spec = tree_flatten_with_path((args, dict(kwargs)))
    new = [_repeat_samples(leaf, batch) if is_batched(leaf, old) else leaf for _, leaf in leaves]
    resized: Inputs = tree_unflatten(new, spec)
    return resized


def fresh_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, batch: int | None, seed: int
) -> Inputs:
    """Random inputs like the example inputs, to check an exported file on inputs with which it was not made.

    Floating point inputs are drawn from a normal distribution with the example's mean and deviation, within the
    example's range; for a constant example, only the mean is used. Whole numbers are drawn between the example's
    smallest and largest value. Masks (bool tensors, and inputs with "mask" in their name) and inputs that are not
    tensors stay as they are.

    Args:
        model: the parameters of its forward give the names of positional inputs.
        args: positional example inputs.
        kwargs: keyword example inputs.
        batch: batch size of the new inputs; None: that of the example.
        seed: the same seed gives the same inputs.

    Returns:
        Positional and keyword inputs on the example's devices.
    """
    old = batch_size(args, kwargs)
    generator = torch.Generator().manual_seed(seed)
    leaves, spec = tree_flatten_with_path((args, dict(kwargs)))
    names = list(inspect.signature(model.forward).parameters)
    new = []
    for path, leaf in leaves:
        if is_batched(leaf, old) and batch is not None:
            leaf = _repeat_samples(leaf, batch)  # noqa: PLW2901 - the same input, larger
        if isinstance(leaf, Tensor) and not _is_mask(leaf, _name(path, names)):
            leaf = _draw(leaf, generator)  # noqa: PLW2901 - as above
        new.append(leaf)
    fresh: Inputs = tree_unflatten(new, spec)
    return fresh


def largest_difference(
    model: nn.Module, other: Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]], inputs: Inputs
) -> tuple[float, str]:
    """The largest difference between the outputs of a model and those of another form of it, such as a file.

    Args:
        model: the reference.
        other: runs the other form on positional and keyword inputs and returns its tensors, in order.
        inputs: for both.

    Returns:
        The largest relative difference over all outputs, and a description of it.
    """
    args, kwargs = inputs
    expected = outputs_of(model, args, kwargs)
    found = other(*own_inputs(args, kwargs))
    if len(found) != len(expected):
        return float("inf"), f"it returns {len(found)} tensors, the model {len(expected)}"
    worst, description = 0.0, ""
    for place, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            kinds = [f"{each.dtype} of shape {tuple(each.shape)}" for each in (mine, theirs)]
            return float("inf"), f"output {place} is {kinds[0]}, that of the model {kinds[1]}"
        error = difference(mine.to(theirs.device), theirs)
        if error > worst:
            worst, description = error, f"output {place} differs by {error:.2g} of its largest value"
    return worst, description


def _repeat_samples(tensor: Tensor, batch: int) -> Tensor:
    return tensor[torch.arange(batch, device=tensor.device) % max(1, len(tensor))]


def path_keys(path: tuple[Any, ...]) -> list[int | str]:
    """The indices, keys and fields that lead to a leaf of a tree."""
    return [next(getattr(key, name) for name in ("idx", "key", "name") if hasattr(key, name)) for key in path]


def _name(path: tuple[Any, ...], parameters: list[str]) -> str:
    """The name of an input in the model's forward; "" if forward has no parameter at the input's position."""
    keys = path_keys(path)
    first = keys[1]
    if keys[0] == 0:
        place = int(first)
        first = parameters[place] if place < len(parameters) else ""
    return ".".join(map(str, [first, *keys[2:]]))


def _is_mask(tensor: Tensor, name: str) -> bool:
    return tensor.dtype is torch.bool or "mask" in name.lower()


def _draw(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.numel() == 0:
        return tensor
    if tensor.is_complex():
        return torch.view_as_complex(_draw(torch.view_as_real(tensor), generator))
    if not tensor.is_floating_point():
        numbers = torch.randint(int(tensor.min()), int(tensor.max()) + 1, tensor.shape, generator=generator)
        return numbers.to(tensor)
    wide = tensor.detach().double().cpu()
    finite = wide[wide.isfinite()]
    if not finite.numel():
        return tensor
    low, high = float(finite.min()), float(finite.max())
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    if low == high:
        return (noise + low).to(tensor)
    drawn = noise * finite.std(correction=0) + finite.mean()
    return drawn.clamp(low, high).to(tensor)
