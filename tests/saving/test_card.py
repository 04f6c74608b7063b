"""The card says what was done, and its lines load the model."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from idap.compress.result import Result
from idap.errors import CheckpointError
from idap.models.nets import DigitsResNet
from idap.saving.card import module_of
from idap.steps import Contest, Removal, Step
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from tests import nets
from tests.saving.test_checkpoint import cut

STEPS = tuple(
    Step(
        index=place,
        stage="filters",
        removed=(Removal(name="0", kind="neurons", units=(1, 2), left=4, divergence=(0.1, 0.2)),),
        macs=900 - place,
        parameters=80,
        metric=0.75,
        accepted=accepted,
        reason="",
        error=0.0,
        seconds=1.0,
    )
    for place, accepted in enumerate((True, False))
)


BEATEN = dataclasses.replace(STEPS[1], index=2, stage="layers", contest=Contest(layer=0.5, filters=0.4))


def result(model: nn.Module, plan: Plan, base: Plan | None = None) -> Result:
    return Result(
        model=model,
        plan=plan,
        steps=(*STEPS, BEATEN),
        baseline=0.8,
        metric=0.79,
        macs=(1000, 500),
        parameters=(100, 60),
        size=(400, 240),
        latency=None,
        output_error=0.0123,
        reached=True,
        message="every goal was reached",
        metric_name="accuracy",
        base=base,
    )


def whole(model: nn.Module) -> tuple[nn.Module, Plan]:
    plan = Plan(
        shapes={name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    )
    return apply_plan(model, plan), plan


def lines_of(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "card.md").read_text(encoding="utf-8"), re.DOTALL)
    return code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [None, "idap.models.nets.DigitsResNet()"])
def test_the_loading_lines_run(
    build: str | None, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, plan = whole(DigitsResNet().to(dtype))
    monkeypatch.chdir(tmp_path)
    result(small, plan).save("small", build=build)
    found: dict[str, nn.Module] = {}
    exec(lines_of(tmp_path / "small"), found)
    assert type(found["model"]) is DigitsResNet and not found["model"].training
    assert all(torch.equal(*pair) for pair in zip(found["model"].parameters(), small.parameters(), strict=True))


def test_it_says_how_large_and_how_fast(tmp_path: Path) -> None:
    small, plan = cut("resnet")
    result(small, plan).save(tmp_path / "a")
    text = (tmp_path / "a" / "card.md").read_text(encoding="utf-8")
    assert "| bytes of the weights | 400 | 240 |" in text
    assert "latency" not in text
    dataclasses.replace(result(small, plan), latency=0.5234).save(tmp_path / "b")
    text = (tmp_path / "b" / "card.md").read_text(encoding="utf-8")
    assert "| latency, where it was compressed | 100 % | 52.3 % |" in text


def test_what_the_run_was_told_builds_the_original(tmp_path: Path) -> None:
    told = dataclasses.replace(result(*whole(nn.Linear(3, 4))), build="torch.nn.Linear(3, 4)")
    told.save(tmp_path / "told")
    assert "original = torch.nn.Linear(3, 4)\n" in lines_of(tmp_path / "told")
    told.save(tmp_path / "said", build="torch.nn.Linear(3, 4, bias=True)")
    assert "original = torch.nn.Linear(3, 4, bias=True)\n" in lines_of(tmp_path / "said")


def test_it_says_what_was_done(tmp_path: Path) -> None:
    small, plan = cut("resnet")
    assert result(small, plan).save(tmp_path) == {}
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert text.startswith(
        '---\nlibrary_name: idap\ntags:\n- pruning\n- structured-pruning\nmetrics:\n- "accuracy"\n---\n'
    )
    for line in (
        "| multiply-adds per sample | 1,000 | 500 |",
        "| accuracy (validation) | 0.8 | 0.79 |",
        "| relative squared error of the outputs (validation) | 0 | 0.0123 |",
        "| 0 | filters | 2 neurons | 900 | 80 | 0.75 | yes |",
        "| 1 | filters | 2 neurons | 899 | 80 | 0.75 | no, rolled back |",
        "| 2 | layers | 2 neurons | 899 | 80 | 0.75 | no, filters were better |",
        f"Removed branches and blocks: `{plan.removed[0]}`.",
        "Every goal was reached.",
        f"torch {torch.__version__}",
    ):
        assert line in text
    assert "build_original()  # the code that built this tests.nets.ResNet before" in text
    assert "subnormal" not in text


def test_it_counts_subnormal_numbers_and_says_that_there_was_an_earlier_compression(tmp_path: Path) -> None:
    small, plan = cut("mlp")
    nn.init.constant_(small[4].bias, 1e-40)
    again = Plan(shapes={name: plan.shape_after(name) for name in plan.shapes})
    assert result(small, again, base=plan).save(tmp_path) == {"4.bias": 3}
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "3 subnormal numbers" in text and "- `4.bias`: 3" in text
    assert "had been compressed before" in text


class Hidden(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)


class Failing(nn.Linear):
    def __init__(self, wanted: int = 0) -> None:
        if not wanted:
            raise KeyError("wanted")
        super().__init__(wanted, 2)


@pytest.mark.parametrize(("model", "known"), [(Hidden(), True), (Failing(3), False), (nets.mlp(), False)])
def test_a_class_is_named_only_if_it_can_be_built_without_arguments(
    model: nn.Module, known: bool, tmp_path: Path
) -> None:
    result(*whole(model)).save(tmp_path)
    assert ("build_original" in lines_of(tmp_path)) is not known


def test_another_size_of_the_class_is_not_taken_for_it(tmp_path: Path) -> None:
    model = DigitsResNet()
    model.head = nn.Linear(3, 3)
    result(*whole(model)).save(tmp_path)
    assert "build_original" in lines_of(tmp_path)


@pytest.mark.parametrize("build", ["", "resnet50()", "torch.nn", "import os", "f'x'", "[torch.nn.Linear(2, 2)]", "a b"])
def test_what_builds_nothing_is_refused_before_anything_is_written(build: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^build=.* (is not a Python call|does not say how)"):
        result(*cut("mlp")).save(tmp_path / "x", build=build)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("build", "module"),
    [("torch.nn.Linear(3, 4)", "torch.nn"), ("torch.nn.Linear.from_x(3)", "torch.nn"), ("x.y.z()", "x")],
)
def test_the_module_of_a_call(build: str, module: str) -> None:
    assert module_of(build) == module
