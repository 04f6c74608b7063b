"""Functions of the list whose kernels do not check what they are given, with the checks that they lack.

Rewritten code calls these in place of torch's functions, in every mode: when it runs, is compiled, exported or traced.
The faults are those of torch 2.13; each has a test that names it.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from idap.errors import RewrittenModuleError


def _pool(function: Callable[..., Any], dims: int) -> Callable[..., Any]:
    """Max pooling whose windows begin within the image: else indices lie behind it, and so does the gradient."""

    @wraps(function)
    def pool(
        input: Tensor,  # noqa: A002 - the name that torch gives it
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        for size, pad, step in zip(input.shape[-dims:], _each(padding, dims), _each(dilation, dims), strict=True):
            if pad > 0 and step > size:
                raise RewrittenModuleError(
                    f"rewritten code pools {size} positions with padding {pad} and dilation {step}: the indices would "
                    "lie outside of the input"
                )
        return function(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)

    return pool


def _each(size: Any, dims: int) -> tuple[int, ...]:
    """A size for each dimension."""
    sizes = tuple(size) if isinstance(size, tuple | list) else (size,)
    return sizes * dims if len(sizes) == 1 else sizes


@wraps(F.scaled_dot_product_attention)
def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention whose keys and values are as many: the kernel for CPUs takes the number of the values from the keys."""
    if key.shape[-2] != value.shape[-2]:
        raise RewrittenModuleError(f"rewritten code attends to {key.shape[-2]} keys with {value.shape[-2]} values")
    return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)


@wraps(F.group_norm)
def _group_norm(
    input: Tensor,  # noqa: A002 - the name that torch gives it
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """A group norm in one type of number: the gradient of its kernel for CPUs is broken for several types."""
    kept = [tensor.dtype for tensor in (weight, bias) if tensor is not None]
    if input.device.type != "cpu" or all(kind == input.dtype for kind in kept):
        return F.group_norm(input, num_groups, weight, bias, eps)
    weight, bias = (None if tensor is None else tensor.to(kept[0]) for tensor in (weight, bias))
    return F.group_norm(input.to(kept[0]), num_groups, weight, bias, eps).to(input.dtype)


def _median(function: Callable[..., Any]) -> Callable[..., Any]:
    """A median of numbers that lie one behind the other: the kernel for CPUs misreads expanded dimensions."""

    @wraps(function)
    def median(*args: Any, **kwargs: Any) -> Any:
        if args:
            return function(args[0].contiguous(), *args[1:], **kwargs)
        return function(**{**kwargs, "input": kwargs["input"].contiguous()})

    return median


def _division(function: Callable[..., Any]) -> Callable[..., Any]:
    """A division that whole numbers survive: the smallest one by -1, rounded towards zero, ends the process."""

    @wraps(function)
    def divide(*args: Any, **kwargs: Any) -> Any:
        number = args[0] if args else kwargs["input"]
        other = args[1] if len(args) > 1 else kwargs["other"]
        parts = [part for part in (number, other) if isinstance(part, Tensor)]
        whole = not isinstance(other, float) and not any(
            part.is_floating_point() or part.is_complex() for part in parts
        )
        if kwargs.get("rounding_mode") != "trunc" or not whole:
            return function(*args, **kwargs)
        floor = torch.div(number, other, rounding_mode="floor")
        inexact = (floor * other != number) & ((number < 0) != (other < 0))
        quotient = floor + inexact.to(floor.dtype)
        return number.copy_(quotient) if function is torch.Tensor.div_ else quotient

    return divide


SAFEGUARDED: Mapping[str, Callable[..., Any]] = {
    "torch.Tensor.data.__get__": torch.Tensor.detach,  # which autograd notices when what it saved is changed by it
    "torch.Tensor.div": _division(torch.Tensor.div),
    "torch.Tensor.div_": _division(torch.Tensor.div_),
    "torch.Tensor.median": _median(torch.Tensor.median),
    "torch.div": _division(torch.div),
    "torch.median": _median(torch.median),
    "torch.nn.functional.group_norm": _group_norm,
    "torch.nn.functional.max_pool1d": _pool(F.max_pool1d, 1),
    "torch.nn.functional.max_pool2d": _pool(F.max_pool2d, 2),
    "torch.nn.functional.max_pool2d_with_indices": _pool(F.max_pool2d_with_indices, 2),
    "torch.nn.functional.max_pool3d": _pool(F.max_pool3d, 3),
    "torch.nn.functional.scaled_dot_product_attention": _attention,
}
"""Name of a function of the list -> what rewritten code calls in its place, with the same arguments."""
