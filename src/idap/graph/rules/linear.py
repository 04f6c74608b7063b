"""Linear maps, matrix products, equations of `torch.einsum`, and Fourier transforms."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from idap.graph.ir import Node
from idap.graph.labels import Dim, constant_dim
from idap.graph.rules.flow import Contraction, Flow, arguments, broadcast, rule


class Equation(NamedTuple):
    """A name for each dimension of each tensor: a letter, or a number for a dimension that an ellipsis stands for.

    Dimensions of the same name are one dimension.

    Attributes:
        terms: the names of each tensor, in the order of its dimensions.
        result: the names of the result.
    """

    terms: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]


def read_equation(equation: str, ranks: Sequence[int]) -> Equation:
    """Expand the ellipses of an equation, and add the result if the equation has no arrow.

    Args:
        equation: as `torch.einsum` takes it.
        ranks: the number of dimensions of each tensor.

    Example:
        >>> read_equation("...i, io", (3, 2))
        Equation(terms=(('2', '1', 'i'), ('i', 'o')), result=('2', '1', 'o'))
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = tuple(_letters(term, rank) for term, rank in zip(left.split(","), ranks, strict=True))
    hidden = max((sum(letter.isdigit() for letter in term) for term in terms), default=0)
    if arrow:
        return Equation(terms, _letters(right, hidden + len(right.replace("...", ""))))
    counts = Counter(letter for term in terms for letter in term if not letter.isdigit())
    once = sorted(letter for letter, count in counts.items() if count == 1)
    return Equation(terms, (*_ellipsis_names(hidden), *once))


def _letters(term: str, rank: int) -> tuple[str, ...]:
    """One name per dimension."""
    before, dots, after = term.partition("...")
    return (*before, *(_ellipsis_names(rank - len(before) - len(after)) if dots else ()), *after)


def _ellipsis_names(count: int) -> tuple[str, ...]:
    """Names of the dimensions that an ellipsis stands for, counted from the right, as they broadcast."""
    return tuple(map(str, range(count, 0, -1)))


@rule("linear")
def linear(flow: Flow, node: Node) -> list[Dim]:
    """X (..., I), weight (O, I), bias (O) -> (..., O)."""
    given = arguments(node)
    x, weight = flow.of(given["input"]), flow.of(given["weight"])
    flow.labels.unify(x[-1], weight[1])
    if given["bias"] is not None:
        flow.labels.unify(flow.of(given["bias"])[0], weight[0])
    last = len(x) - 1
    _cross_computed(flow, node, given["weight"], x[-1])
    flow.contractions.append(
        Contraction(node.name, "linear", given["input"].name, last, given["weight"].name, 1, 0, last)
    )
    return [*x[:-1], flow.labels.resolve(weight[0])]


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot")
def matmul(flow: Flow, node: Node) -> list[Dim]:
    """The matrix product with the broadcasting of `torch.matmul`."""
    given = list(arguments(node).values())
    return _product(flow, node, given[0], given[1])


@rule("addmm", "baddbmm")
def addmm(flow: Flow, node: Node) -> list[Dim]:
    """A matrix product added to a tensor."""
    bias, one, other = list(arguments(node).values())[:3]
    return broadcast(flow, [flow.of(bias), _product(flow, node, one, other)], node.shape)


def _cross_computed(flow: Flow, node: Node, weight: Any, dim: Dim) -> None:
    """Note a crossing for a computed weight: it may be nonzero where its parameter is zero, as after a softplus."""
    if flow.is_weight(weight) and flow.node(weight).op != "parameter":
        flow.crosses(node, "contraction", [dim])


def _product(flow: Flow, node: Node, one: Any, other: Any) -> list[Dim]:
    a, b = flow.of(one), flow.of(other)
    flow.labels.unify(a[-1], b[-2] if len(b) > 1 else b[-1])
    rows = [a[-2]] if len(a) > 1 else []
    columns = [b[-1]] if len(b) > 1 else []
    shape = node.shape[: len(node.shape) - len(rows) - len(columns)]
    batch = broadcast(flow, [a[:-2], b[:-2]], shape)
    for value in (one, other):
        _cross_computed(flow, node, value, a[-1])
    if len(b) == 2 and flow.is_weight(other):
        flow.contractions.append(
            Contraction(node.name, "linear", one.name, len(a) - 1, other.name, 0, 1, len(node.shape) - 1)
        )
    elif len(a) == 2 and flow.is_weight(one) and len(b) > 1:
        flow.contractions.append(
            Contraction(node.name, "linear", other.name, len(b) - 2, one.name, 1, 0, len(node.shape) - 2)
        )
    else:
        flow.crosses(node, "contraction", [a[-1]])
        flow.roles.append(("head width", a[-1]))
        flow.roles += [("heads", dim) for dim in batch]
    return [flow.labels.resolve(dim) for dim in [*batch, *rows, *columns]]


@rule("bilinear")
def bilinear(flow: Flow, node: Node) -> list[Dim]:
    """X1 (..., I), x2 (..., J), weight (O, I, J), bias (O) -> (..., O)."""
    given = arguments(node)
    one, other, weight = (flow.of(given[name]) for name in ("input1", "input2", "weight"))
    flow.labels.unify(one[-1], weight[1])
    flow.labels.unify(other[-1], weight[2])
    for dim in (one[-1], other[-1]):
        _cross_computed(flow, node, given["weight"], dim)
    if given["bias"] is not None:
        flow.labels.unify(flow.of(given["bias"])[0], weight[0])
    batch = broadcast(flow, [one[:-1], other[:-1]], node.shape[:-1])
    flow.products.append((given["weight"].name, f"a product of two inputs, at {node.where()}"))
    return [*batch, flow.labels.resolve(weight[0])]


@rule("cdist", "_cdist_forward", "_euclidean_dist")
def cdist(flow: Flow, node: Node) -> list[Dim]:
    """X1 (..., P, M), x2 (..., R, M) -> their distances (..., P, R)."""
    one, other = (flow.of(node.args[place]) for place in (0, 1))
    flow.labels.unify(one[-1], other[-1])
    flow.crosses(node, "contraction", [flow.of(node.args[0])[-1]])
    batch = broadcast(flow, [one[:-2], other[:-2]], node.shape[:-2])
    return [*batch, flow.of(node.args[0])[-2], flow.of(node.args[1])[-2]]


@rule("einsum")
def einsum(flow: Flow, node: Node) -> list[Dim]:
    """A sum over letters: dims of the same letter are one dimension."""
    given = arguments(node)
    equation = read_equation(given["equation"], [len(flow.node(ref).shape) for ref in given["tensors"]])
    return _by_letters(flow, node, equation.terms, equation.result, given["tensors"])


@rule("tensordot")
def tensordot(flow: Flow, node: Node) -> list[Dim]:
    """The sum over some dims of one tensor and as many of the other."""
    given = arguments(node)
    tensors = [given["self"], given["other"]]
    left = [[f"{side} {place}" for place in range(len(flow.of(ref)))] for side, ref in enumerate(tensors)]
    for one, other in zip(given["dims_self"], given["dims_other"], strict=True):
        left[1][other] = left[0][one]
    right = [letter for letters in left for letter in letters if letter not in left[0] or letter not in left[1]]
    return _by_letters(flow, node, left, right, tensors)


def _by_letters(
    flow: Flow, node: Node, left: Sequence[Sequence[str]], right: Sequence[str], tensors: Sequence[Any]
) -> list[Dim]:
    places: dict[str, list[Dim]] = {}
    for letters, ref in zip(left, tensors, strict=True):
        for letter, dim in zip(letters, flow.of(ref), strict=True):
            places.setdefault(letter, []).append(dim)
    for met in places.values():
        met.sort(key=lambda dim: -dim.shape[1])  # dims of one slot come last: they broadcast
        flow.freeze([dim for dim in met if dim.shape[1] == 1])
        for dim in met[1:]:
            if dim.shape[1] == met[0].shape[1]:
                flow.labels.unify(met[0], dim)
    flow.crosses(node, "contraction", [met[0] for letter, met in places.items() if letter not in right])
    _note_product(flow, node, left, right, tensors)
    return [flow.labels.resolve(places[letter][0]) for letter in right]


def _note_product(
    flow: Flow, node: Node, left: Sequence[Sequence[str]], right: Sequence[str], tensors: Sequence[Any]
) -> None:
    """Find out what role the letters play: a weight's contraction, or attention over heads."""
    if len(left) != 2:
        return
    for (x, w), (input_, weight) in zip(((0, 1), (1, 0)), (tensors, tensors[::-1]), strict=True):
        if not flow.is_weight(weight):
            continue
        summed = [letter for letter in left[w] if letter not in right and letter in left[x]]
        written = [letter for letter in left[w] if letter in right and letter not in left[x]]
        shapes = [flow.node(ref).shape for ref in tensors]
        once = all(len(set(letters)) == len(letters) for letters in left)
        whole = all(shapes[x][left[x].index(each)] == shapes[w][left[w].index(each)] for each in summed)
        if len(summed) == len(written) == 1 and len(left[w]) == 2 and once and whole:
            read, write = summed[0], written[0]
            rows = [[letter for letter in letters if letter not in left[w]] for letters in (left[x], right)]
            flow.contractions.append(
                Contraction(
                    node.name, "linear", input_.name, left[x].index(read), weight.name,
                    left[w].index(read), left[w].index(write), right.index(write), paired=rows[0] == rows[1],
                )
            )  # fmt: skip
        else:
            why = "a product that does not read one whole dimension of it and write the other"
            flow.products.append((weight.name, f"{why}, at {node.where()}"))
        return
    both = set(left[0]) & set(left[1])
    dims = dict(zip(left[0], flow.of(tensors[0]), strict=True))
    flow.roles += [("heads" if letter in right else "head width", dims[letter]) for letter in sorted(both)]


_MIXED = "a Fourier transform mixes its slots"


@rule("view_as_complex", "view_as_real")
def complex_view(flow: Flow, node: Node) -> list[Dim]:
    """The last dim holds the real and the imaginary part."""
    x = flow.of(arguments(node)["self"])
    if len(node.shape) > len(x):
        return [*x, constant_dim(2)]
    flow.freeze([x[-1]], "it holds the real and the imaginary part")
    return flow.of(arguments(node)["self"])[:-1]


@rule(
    "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft",
    "fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn",
    "fft_fftshift", "fft_ifftshift",
)  # fmt: skip
def fourier(flow: Flow, node: Node) -> list[Dim]:
    """The transformed dims can't shrink; the other dims pass."""
    given = arguments(node)
    x = flow.of(given["self"])
    dim = given["dim"]
    several = given.get("s") or ()  # sizes of the last dims, if `dim` does not name any
    axes = range(len(x))[-len(several) :] if dim is None else [dim] if isinstance(dim, int) else dim
    places = {int(axis) % len(x) for axis in axes}
    flow.freeze([x[place] for place in places], _MIXED)
    passed = flow.of(given["self"])
    return [constant_dim(size) if place in places else passed[place] for place, size in enumerate(node.shape)]


@rule("outer")
def outer(flow: Flow, node: Node) -> list[Dim]:
    """X (N) and Y (M) -> (N, M)."""
    given = arguments(node)
    return [flow.of(given["self"])[0], flow.of(given["vec2"])[0]]
