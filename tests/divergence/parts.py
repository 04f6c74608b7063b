"""Small nets whose divergences can be computed by hand, and helpers that compute them."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idap.divergence.measure import Divergence, measure
from idap.divergence.observe import Pass
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from tests.nets import randomised


class Mlp(nn.Module):
    """A stem, one residual branch spread over two layers, and a head; works on samples and on tokens."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8, bias=bias)
        self.fc1 = nn.Linear(8, 10, bias=bias)
        self.fc2 = nn.Linear(10, 8, bias=bias)
        self.head = nn.Linear(8, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.fc2(F.relu(self.fc1(x)))
        return self.head(x)


class Unit(nn.Module):
    """Convolution, batch norm, convolution, batch norm beside the stream."""

    def __init__(self, width: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, kernel, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, width, kernel, padding=kernel // 2, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(out)))


class Convs(nn.Module):
    """Two residual units, then a flattened head."""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.one, self.two = Unit(6, 5, kernel), Unit(6, 4, kernel)
        self.last = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4 * 2 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(F.relu(self.stem(x))))
        return self.head(F.max_pool2d(F.relu(self.last(x)), 2).flatten(1))


_STRUCTURES: dict[tuple[object, ...], Structure] = {}


def build(make: Callable[[], nn.Module], *example: Tensor, seed: int = 0) -> tuple[nn.Module, Structure]:
    """A net with weights that hide nothing, and its structure."""
    torch.manual_seed(seed)
    model = randomised(make(), seed).eval()
    known = make, *((tensor.shape, tensor.dtype) for tensor in example)
    if known not in _STRUCTURES:  # weights do not matter to it
        _STRUCTURES[known] = analyze(trace(model, example))
    return model, _STRUCTURES[known]


def passes(*batches: Tensor) -> list[Pass]:
    return [Pass(lambda m, batch=batch: m(batch)) for batch in batches]


def measure_batches(model: nn.Module, structure: Structure, *batches: Tensor, **settings: object) -> Divergence:
    return measure(model, structure, passes(*batches), **settings)


class Tap:
    """Records the inputs and outputs of the modules of a copy in float64, in the order of the calls."""

    def __init__(self, model: nn.Module, batch: Tensor) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.model = copy.deepcopy(model).double()
        handles = [
            module.register_forward_hook(lambda m, given, made, path=path: self._note(path, given, made))
            for path, module in self.model.named_modules()
        ]
        with torch.no_grad():
            self.model(batch.double())
        for handle in handles:
            handle.remove()

    def _note(self, path: str, given: tuple[Tensor, ...], made: Tensor) -> None:
        self.inputs.setdefault(path, []).append(given[0].clone())
        self.outputs.setdefault(path, []).append(made.clone())

    def input_of(self, path: str) -> Tensor:
        return self.inputs[path][0]

    def output_of(self, path: str) -> Tensor:
        return self.outputs[path][0]


def energy(x: Tensor, channel_dim: int) -> Tensor:
    """Mean over positions of the squared norm over channels."""
    return x.square().sum(channel_dim).mean()


def lost_energy(read: Callable[[Tensor], Tensor], x: Tensor, slots: list[list[int]], dim: int) -> Tensor:
    """Mean squared norm of what each unit contributes through a layer: run it with the unit and without."""
    found = []
    with torch.no_grad():
        for mine in slots:
            without = x.index_fill(dim, torch.tensor(mine), 0)
            found.append(energy(read(x) - read(without), dim))
    return torch.stack(found)


def unit_slots(count: int, width: int = 1) -> list[list[int]]:
    return [list(range(unit * width, (unit + 1) * width)) for unit in range(count)]
