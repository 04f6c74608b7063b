"""Code that only training runs is not in the graph: what it needs stays whole, and is said."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idap.compress.config import FilterStage, LayerStage
from idap.compress.run import compress
from idap.graph.trace import trace
from idap.structure.analysis import analyze
from idap.training.recovery import Recovery
from tests.compress.tiny import CLASSES, Net, Noting, config, task

ONLY_FILTERS = {"layers": LayerStage(removals=0), "filters": FilterStage(steps=3, first_share=0.3), "macs": 0.7}


class Auxiliary(nn.Module):
    """A second head reads the hidden units in training."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 12), nn.Linear(12, 20), nn.Linear(20, CLASSES)
        self.aux = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.one(x))
        logits: Tensor = self.three(F.relu(self.two(hidden)))
        return logits + 0.1 * self.aux(hidden) if self.training else logits


class Noisy(nn.Module):
    """Noise of a length that is a number in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 12), nn.Linear(12, 20), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.one(x))
        if self.training:
            hidden = hidden + 0.01 * torch.randn(12)
        return self.three(F.relu(self.two(hidden)))


class Harmless(Noisy):
    """Noise in the shape of what it is added to."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.one(x))
        if self.training:
            hidden = hidden + 0.01 * torch.randn_like(hidden)
        return self.three(F.relu(self.two(hidden)))


@pytest.mark.parametrize("build", [Auxiliary, Noisy])
def test_what_training_needs_stays_whole(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, heard = build().eval(), Noting()
    result = compress(model, task(), config(**ONLY_FILTERS | {"max_drop": 1.0}), progress=heard)
    assert result.reached, result.message
    assert result.model.one.out_features == 12 and result.model.two.out_features < 20
    (said,) = [line for line in heard.lines if line.startswith("Group one stays whole: ")]
    assert "fails in training, where its code does more: RuntimeError: " in said
    result.model.train()(torch.randn(8, 6)).sum().backward()


def test_what_fits_any_width_is_cut() -> None:
    torch.manual_seed(0)
    heard = Noting()
    result = compress(Harmless().eval(), task(), config(**ONLY_FILTERS | {"max_drop": 1.0}), progress=heard)
    assert result.reached and not any("stays whole" in line for line in heard.lines)
    assert result.model.one.out_features < 12


def test_models_that_never_run_in_training_are_cut_as_ever() -> None:
    class Served(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("for serving only")
            return super().forward(x)

    torch.manual_seed(0)
    untrained = config(max_drop=1.0, recovery=Recovery(epochs=0), final=None)
    assert compress(Served().eval(), task(), untrained).reached


class Scaled(nn.Module):
    """The width is a size in evaluation, and a number besides in training."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.write, self.read = 16, nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.write(x)).view(-1, self.dim)
        return self.read(hidden * (self.dim / 16) if self.training else hidden)


def test_an_attribute_that_training_reads_as_a_number_is_not_changed() -> None:
    structure = analyze(trace(Scaled().eval(), (torch.randn(4, 6),)), required=False)
    assert not structure.groups
    assert any("comes from dim, which the code also uses as a number" in item.reason for item in structure.blocked)


def test_the_model_and_the_dice_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES)).eval()
    before, dice = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    compress(model, task(), config(max_drop=1.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), dice)
