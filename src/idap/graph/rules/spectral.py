"""Complex numbers and Fourier transforms."""

from idap.graph.ir import Node
from idap.graph.labels import Dim, fixed
from idap.graph.rules.flow import Flow, arguments, rule

_MIXED = "a Fourier transform mixes its slots"


@rule("view_as_complex", "view_as_real")
def complex_view(flow: Flow, node: Node) -> list[Dim]:
    """The last dim holds the real and the imaginary part."""
    x = flow.of(arguments(node)["self"])
    if len(node.shape) > len(x):
        return [*x, fixed(2)]
    flow.freeze([x[-1]], "it holds the real and the imaginary part")
    return flow.of(arguments(node)["self"])[:-1]


@rule(
    "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft",
    "fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn",
    "fft_fftshift", "fft_ifftshift",
)  # fmt: skip
def fourier(flow: Flow, node: Node) -> list[Dim]:
    """Dims that are transformed can't shrink; the others pass."""
    given = arguments(node)
    x = flow.of(given["self"])
    dim = given["dim"]
    several = given.get("s") or ()  # sizes of the last dims, where these are not named
    axes = range(len(x))[-len(several) :] if dim is None else [dim] if isinstance(dim, int) else dim
    places = {int(axis) % len(x) for axis in axes}
    flow.freeze([x[place] for place in places], _MIXED)
    passed = flow.of(given["self"])
    return [fixed(size) if place in places else passed[place] for place, size in enumerate(node.shape)]


@rule("outer")
def outer(flow: Flow, node: Node) -> list[Dim]:
    """X (N) and Y (M) -> (N, M)."""
    given = arguments(node)
    return [flow.of(given["self"])[0], flow.of(given["vec2"])[0]]
