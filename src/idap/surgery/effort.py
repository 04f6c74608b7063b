"""What functions of torch make on the way to their result, and how often they multiply: bounds from shapes alone."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_PRODUCTS = (
    "matmul",
    "rmatmul",
    "mm",
    "mv",
    "bmm",
    "addmm",
    "baddbmm",
    "linear",
    "einsum",
    "tensordot",
    "bilinear",
    "outer",
)


def effort_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[Tensor]) -> tuple[int, int]:
    """Estimate the effort of one call from above.

    Args:
        name: of the function, such as ``torch.nn.functional.conv2d``.
        args: positional arguments.
        kwargs: keyword arguments.
        results: the tensors that it returns.

    Returns:
        Elements that are made on the way, and multiplications or comparisons.

    >>> import torch
    >>> row, column = torch.ones(1, 1000, device="meta"), torch.ones(1000, 1, device="meta")
    >>> effort_of("torch.matmul", (row, column), {}, [torch.ones(1, 1, device="meta")])
    (0, 1000)
    """
    short = name.rpartition(".")[2].strip("_")
    given = [
        item for item in (*args, *kwargs.values()) for item in (item if isinstance(item, list | tuple) else (item,))
    ]
    tensors = [item for item in given if isinstance(item, Tensor)]
    made = sum(tensor.numel() for tensor in results)
    if short in _PRODUCTS and len(tensors) > 1:
        return _product(short, tensors, made)
    if short.startswith("conv") and len(tensors) > 1:
        return _convolution(short, tensors[0], tensors[1], made)
    if short == "scaled_dot_product_attention":
        query, key = tensors[0], tensors[1]
        scores = query.numel() // max(query.shape[-1], 1) * key.shape[-2]
        return scores, scores * (query.shape[-1] + tensors[2].shape[-1])
    if short == "cosine_similarity":
        shapes = [(1,) * (max(t.ndim for t in tensors[:2]) - t.ndim) + tuple(t.shape) for t in tensors[:2]]
        both = math.prod(max(sizes) for sizes in zip(*shapes, strict=True))
        return both, both
    if short == "cdist":
        return 0, made * tensors[0].shape[-1]
    if "pool" in short and "adaptive" not in short:
        size = kwargs.get("kernel_size", next((item for item in args[1:] if isinstance(item, int | tuple | list)), 1))
        dims = int(found[1]) if (found := re.search(r"(\d)d", short)) else 1
        return 0, made * (abs(size) ** dims if isinstance(size, int) else math.prod(map(abs, size)))
    return 0, made


def _product(short: str, tensors: Sequence[Tensor], made: int) -> tuple[int, int]:
    """For a contraction of two tensors, rows · inner · columns = √(rows · inner × inner · columns × rows · columns)."""
    two = tensors[-2:] if short in ("addmm", "baddbmm") else tensors[:2]
    sizes, beside = [tensor.numel() for tensor in two], 0
    if short in ("matmul", "rmatmul") and all(tensor.ndim > 2 for tensor in two):
        ranks = max(tensor.ndim for tensor in two)
        batches = [(1,) * (ranks - tensor.ndim) + tuple(tensor.shape[:-2]) for tensor in two]
        batch = math.prod(max(pair) for pair in zip(*batches, strict=True))
        expanded = [batch * math.prod(tensor.shape[-2:]) for tensor in two]
        beside = sum(expanded) - sum(sizes)
        sizes = expanded
    if short == "bilinear":
        sizes[0] *= two[1].shape[-1]
        beside = made * two[1].shape[-1]
        sizes[1] = tensors[2].numel() if len(tensors) > 2 else sizes[1]
    return beside, math.isqrt(sizes[0] * sizes[1] * max(made, 1))


def _convolution(short: str, data: Tensor, weight: Tensor, made: int) -> tuple[int, int]:
    """Each result is a product of a patch and a kernel; patches may be unfolded, if nothing faster is at hand."""
    first = max(weight.shape[0], 1)
    patch = weight.numel() // first
    positions = data.numel() // first if "transpose" in short else made // first
    return positions * patch, positions * first * patch
