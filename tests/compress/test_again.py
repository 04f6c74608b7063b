"""What was compressed once is compressed again, and one plan leads from the original to the result."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from idap.compress.run import compress
from idap.errors import PlanError
from idap.saving.checkpoint import forget_, load, origin, read_plan
from idap.structure.plan import Plan
from tests.compress.tiny import Net, config, task, train_net

NET = train_net()


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("once") / "run"
    compress(NET, task(), config(max_drop=None, macs=0.7), run_dir=folder)
    return folder / "model"


@pytest.mark.parametrize("killed", [False, True])
def test_one_plan_for_the_same_original(killed: bool, once: Path, tmp_path: Path) -> None:
    first = load(once, Net())
    settings = config(max_drop=None, macs=0.7)
    result = compress(first, task(), settings, run_dir=tmp_path / "run")
    if killed:
        (tmp_path / "run" / "model" / "plan.json").unlink()
        result = compress(first, task(), settings, run_dir=tmp_path / "run", resume=True)
    assert result.base == read_plan(once) and origin(result.model) == result.whole_plan
    back = load(tmp_path / "run" / "model", Net())
    assert_close(back.state_dict(), result.model.state_dict(), rtol=0, atol=0)
    plan = read_plan(tmp_path / "run" / "model")
    assert plan == result.whole_plan and plan.shapes == {n: tuple(p.shape) for n, p in Net().named_parameters()}
    assert set(plan.keep) >= set(result.plan.keep)
    third = compress(result.model, task(), settings)  # without a file in between
    third.save(tmp_path / "third")
    assert_close(load(tmp_path / "third", Net()).state_dict(), third.model.state_dict(), rtol=0, atol=0)
    assert "compressed before" in (tmp_path / "third" / "card.md").read_text(encoding="utf-8")


def test_a_model_that_was_changed_since_is_refused_or_forgets(once: Path, tmp_path: Path) -> None:
    first = load(once, Net())
    first.head = nn.Linear(first.head.in_features, 4)
    with pytest.raises(
        PlanError, match=r"made by idap\.load or compress and changed since: .*'head\.\w+'.*forget_\(model\)"
    ):
        compress(first, task(num_classes=4), config(max_drop=None, macs=0.7))
    forget_(first)
    result = compress(first, task(num_classes=4), config(max_drop=None, macs=0.7))
    assert result.base is None
    result.save(tmp_path)
    assert torch.equal(load(tmp_path, first).head.weight, result.model.head.weight)


def test_a_first_compression_has_no_base() -> None:
    result = compress(NET, task(), config(max_drop=None, macs=0.8))
    assert result.base is None and result.whole_plan is result.plan and origin(NET) is None
    assert replace(result, base=Plan(shapes=result.plan.shapes)).whole_plan.tensors == result.plan.tensors
