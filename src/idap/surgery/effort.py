"""Bound what calls of torch functions take, from shapes alone: temporary elements and multiplications."""

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

_SPLITS = ("split", "chunk", "unbind", "tensor_split", "split_with_sizes")


def effort_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[Tensor]) -> tuple[int, int]:
    """Bound the effort of one call from above.

    Args:
        name: name of the function, such as ``torch.nn.functional.conv2d``.
        args: positional arguments.
        kwargs: keyword arguments.
        results: the tensors that it returns.

    Returns:
        The number of temporary elements besides the result, and the number of multiplications or comparisons.

    >>> import torch
    >>> row, column = torch.ones(1, 1000, device="meta"), torch.ones(1000, 1, device="meta")
    >>> effort_of("torch.matmul", (row, column), {}, [torch.ones(1, 1, device="meta")])
    (0, 2001)
    """
    short = _short(name)
    tensors = tensors_in((args, kwargs))
    made, read = sum(tensor.numel() for tensor in results), sum(tensor.numel() for tensor in tensors)
    temporary, products = _special_effort(short, args, kwargs, tensors, made)
    return temporary, max(products, made + read)  # a sum reads many elements and makes few


def parts_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Bound the number of tensors that a function cuts its first argument into; 1 for functions that don't.

    >>> import torch
    >>> parts_of("torch.Tensor.unbind", (torch.ones(5, 3, device="meta"),), {"dim": 1})
    5
    >>> parts_of("torch.tensor_split", (torch.ones(5, device="meta"), 2**40), {}) == 2**40
    True
    """
    if _short(name) not in _SPLITS:
        return 1
    given = [item for item in (*args, *kwargs.values()) if not isinstance(item, Tensor)]
    counts = [item for item in given if isinstance(item, int)] + [
        len(item) + 1 for item in given if isinstance(item, tuple | list)
    ]
    sizes = [size for tensor in tensors_in((args, kwargs))[:1] for size in tensor.shape]
    return max((1, *sizes, *counts))


def _short(name: str) -> str:
    return name.rpartition(".")[2].strip("_")


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in arguments or results, also in tuples, lists and dictionaries."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, tuple | list):
        return [tensor for item in tree for tensor in tensors_in(item)]
    return [tensor for item in tree.values() for tensor in tensors_in(item)] if isinstance(tree, Mapping) else []


def _special_effort(
    short: str, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor], made: int
) -> tuple[int, int]:
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
        place = 2 if short.startswith("lp_pool") else 1  # it comes after the data; in lp_pool, after the norm
        size = kwargs.get("kernel_size", args[place] if place < len(args) else 1)
        dims = int(found[1]) if (found := re.search(r"(\d)d", short)) else 1
        sizes = tuple(size) if isinstance(size, list | tuple) else (size,)
        return 0, made * math.prod(map(abs, sizes * dims if len(sizes) == 1 else sizes))
    return 0, made


def _product(short: str, tensors: Sequence[Tensor], made: int) -> tuple[int, int]:
    """For a contraction of two tensors, rows · inner · columns = √(rows · inner × inner · columns × rows · columns)."""
    two = tensors[-2:] if short in ("addmm", "baddbmm") else tensors[:2]
    sizes, temporary = [tensor.numel() for tensor in two], 0
    if short in ("matmul", "rmatmul") and all(tensor.ndim > 2 for tensor in two):
        ranks = max(tensor.ndim for tensor in two)
        batches = [(1,) * (ranks - tensor.ndim) + tuple(tensor.shape[:-2]) for tensor in two]
        batch = math.prod(max(pair) for pair in zip(*batches, strict=True))
        expanded = [batch * math.prod(tensor.shape[-2:]) for tensor in two]
        temporary = sum(expanded) - sum(sizes)
        sizes = expanded
    if short == "bilinear":
        sizes[0] *= two[1].shape[-1]
        temporary = made * two[1].shape[-1]
        sizes[1] = tensors[2].numel() if len(tensors) > 2 else sizes[1]
    return temporary, math.isqrt(sizes[0] * sizes[1] * max(made, 1))


def _convolution(short: str, data: Tensor, weight: Tensor, made: int) -> tuple[int, int]:
    """Each result is a product of a patch and a kernel; torch may unfold the patches if it has no faster kernel."""
    first = max(weight.shape[0], 1)
    patch = weight.numel() // first
    positions = data.numel() // first if "transpose" in short else made // first
    return positions * patch, positions * first * patch
