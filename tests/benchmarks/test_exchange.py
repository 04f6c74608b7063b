"""Units share the measured cost of a group's cut, and keep their order."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.exchange import INNOVATION, LEVELS, WAYS, Exchange
from idap.divergence.measure import Divergence

ERRORS = {6: 1.0, 4: 1.0, 2: 5.0}


@pytest.fixture
def exchange(monkeypatch):
    known = torch.tensor([1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0])
    bench = SimpleNamespace(
        scores=lambda *_: Divergence(INNOVATION, {"group": known}, {}),
        groups=lambda _: {"group"},
        subject=SimpleNamespace(calibration=lambda *_: [torch.zeros(1)], run=lambda *_: torch.zeros(1), model=None),
    )
    monkeypatch.setattr(Exchange, "_error", lambda self, name, kept, *, corrected: ERRORS[len(kept)])
    return Exchange(bench, 0)


@pytest.mark.parametrize("way", WAYS)
def test_between_two_levels_the_cost_is_shared_by_innovation(exchange, way):
    scores = exchange.scores(way)[0]["group"]
    worst_first = scores[[0, 2, 4, 6, 7, 5, 3, 1]]
    assert worst_first[:2].tolist() == pytest.approx([1 / 3, 2 / 3])  # 1.0 for 1 and 2
    assert float(worst_first[4:6].sum()) == pytest.approx(4.0)  # 5.0 - 1.0 for 5 and 6
    assert worst_first.diff().min() >= 0  # though nothing is lost from the first level to the second
    assert LEVELS == (0.75, 0.5, 0.25)


def test_the_default_is_not_changed(exchange):
    scores, seconds = exchange.scores(INNOVATION)
    assert scores is exchange.innovation
    assert seconds == 0
