"""Loaders that draw from generators of their own: the seed of the run counts there too."""

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from idap.compress.config import Config
from idap.compress.prepare import calibration_batches
from idap.errors import TaskError
from idap.training.batch import seed_generators
from idap.training.fit import fit
from idap.training.recovery import Recovery
from idap.training.task import classification

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)
DATA = TensorDataset(X, Y)


def own(kind: str) -> tuple[DataLoader, torch.Generator]:
    """A loader that shuffles by its own generator, however it got it."""
    dice = torch.Generator().manual_seed(11)
    if kind == "loader":
        return DataLoader(DATA, 8, shuffle=True, generator=dice), dice
    sampler = RandomSampler(DATA, generator=dice)
    if kind == "sampler":
        return DataLoader(DATA, 8, sampler=sampler), dice
    return DataLoader(DATA, batch_sampler=BatchSampler(sampler, 8, drop_last=False)), dice


def weights_after(loader: DataLoader, seed: int) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    fit(model, classification(loader, num_classes=3), Recovery(epochs=2, lr=0.1, seed=seed))
    return model.weight.detach()


@pytest.mark.parametrize("kind", ["loader", "sampler", "batch sampler"])
def test_the_seed_decides_and_the_generator_gets_its_state_back(kind: str) -> None:
    loader, dice = own(kind)
    state = dice.get_state()
    first = weights_after(loader, 1)
    assert torch.equal(dice.get_state(), state)
    assert torch.equal(weights_after(loader, 1), first)
    assert torch.equal(weights_after(own(kind)[0], 1), first)
    assert not torch.equal(weights_after(loader, 2), first)


def test_epochs_differ_within_a_training() -> None:
    loader, _ = own("loader")
    with seed_generators(loader, 3):
        one, two = ([batch[1].tolist() for batch in loader] for _ in range(2))
    assert one != two


def test_calibration_is_drawn_by_the_seed() -> None:
    loader, _ = own("loader")
    drawn = [
        calibration_batches(classification(loader, num_classes=3), Config(macs=0.5, seed=seed)) for seed in (5, 5, 6)
    ]
    assert torch.equal(drawn[0][0][0], drawn[1][0][0])
    assert not torch.equal(drawn[0][0][0], drawn[2][0][0])


@pytest.mark.parametrize("batches", [[], [(X, Y)], iter(())])
def test_what_has_no_generator_is_left_alone(batches: object) -> None:
    with seed_generators(batches, 0):  # type: ignore[arg-type]
        pass


def test_gradients_are_on_while_it_trains_whatever_the_caller_switched_off() -> None:
    with torch.no_grad():
        weights = weights_after(DataLoader(DATA, 8), 1)
        assert not torch.is_grad_enabled()
    assert torch.equal(weights, weights_after(DataLoader(DATA, 8), 1))


def test_a_batch_that_can_not_be_learned_from_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    loader = DataLoader(TensorDataset(X[:17], Y[:17]), 8)
    message = (
        r"^Sequential failed in training at step 2.*, on a batch with 1 sample: ValueError: .* drop_last=True leaves it"
    )
    with pytest.raises(TaskError, match=message):
        fit(model, classification(loader, num_classes=3), Recovery(epochs=1))
