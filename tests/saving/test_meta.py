"""Loading without memory for the original, from shards, and what subnormal numbers become."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from idap.errors import CheckpointError
from idap.saving.checkpoint import forget_, load, origin, save
from idap.saving.stream import apply_to_checkpoint
from idap.saving.tensors import write_tensors
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from tests import nets
from tests.saving.test_checkpoint import CASES, Buffered, cut, outputs
from tests.saving.test_stream import ORIGINALS, write_checkpoint


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", sorted(set(CASES) - {"buffers"}))
def test_a_model_without_memory_becomes_a_real_one(name: str, sharded: bool, tmp_path: Path) -> None:
    make, args, kwargs = CASES[name]
    small, plan = cut(name)
    if sharded:
        apply_to_checkpoint(plan, write_checkpoint(tmp_path / "a", ORIGINALS[name]), tmp_path / "b", max_shard_size=200)
    else:
        save(tmp_path / "b", small, plan)
    with torch.device("meta"):
        empty = make().eval()
    back = load(tmp_path / "b", empty)
    assert not any(tensor.is_meta for tensor in (*back.parameters(), *back.buffers()))
    assert all(tensor.is_meta for tensor in empty.parameters())
    assert_close(back.state_dict(), small.state_dict(), rtol=0, atol=0)
    assert torch.equal(outputs(back, args, kwargs), outputs(small, args, kwargs))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in back.parameters())


def test_what_holds_its_weights_twice_holds_the_new_ones(tmp_path: Path) -> None:
    """Recurrent layers keep a flat list of their weights."""
    net = nets.Recurrent().eval()
    plan = Plan(shapes={name: tuple(tensor.shape) for name, tensor in net.state_dict().items()})
    save(tmp_path, net, plan)
    with torch.device("meta"):
        empty = nets.Recurrent().eval()
    back = load(tmp_path, empty)
    for module in back.modules():
        if isinstance(module, nn.RNNBase):
            assert not any(weight.is_meta for weight in module._flat_weights)


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    small, plan = cut("tied")
    save(tmp_path, small, plan)
    with torch.device("meta"):
        empty = nets.LanguageModel().eval()
    back = load(tmp_path, empty)
    assert back.head.weight is back.embed.weight and torch.equal(back.head.weight, small.head.weight)


class Noticed(Buffered):
    """Holds a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        del self._buffers["gain"]
        self.gain = torch.arange(6.0) + 10


@pytest.mark.parametrize("kind", [Buffered, Noticed])
def test_numbers_that_no_file_holds_are_named(kind: type[nn.Module], tmp_path: Path) -> None:
    small, plan = cut("buffers")
    save(tmp_path, small, plan)
    with torch.device("meta"):
        empty = Buffered().eval()
    with pytest.raises(
        CheckpointError, match=r"tensor 'gain' of the model is on the meta device and not saved, so its"
    ):
        load(tmp_path, empty)
    empty.gain = Buffered().gain  # the way out: its buffers are real
    assert torch.equal(load(tmp_path, empty).gain, small.gain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    small, plan = cut("resnet", dtype=dtype)
    save(tmp_path, small, plan)
    with torch.device("meta"):
        empty = CASES["resnet"][0]().to(dtype)
    assert_close(load(tmp_path, empty).state_dict(), small.state_dict(), rtol=0, atol=0)


def test_marks_and_flags_of_parameters_stay(tmp_path: Path) -> None:
    small, plan = cut("mlp")
    save(tmp_path, small, plan)
    with torch.device("meta"):
        empty = nets.mlp()
    empty[0].weight.requires_grad_(False)
    empty[4].weight.decay = False
    back = load(tmp_path, empty)
    assert not back[0].weight.requires_grad and back[2].weight.requires_grad and back[4].weight.decay is False


def test_a_model_of_the_size_of_resnet_50_loads_in_a_second(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(400, 400, bias=False), nn.BatchNorm1d(400)) for _ in range(160)))

    with torch.device("meta"):
        empty = build()
    net = build().eval()
    kept = tuple(range(0, 400, 2))
    tensors = {f"{n}.0.weight": {0: kept} for n in range(160)}
    plan = Plan(tensors=tensors, shapes={name: tuple(tensor.shape) for name, tensor in net.state_dict().items()})
    save(tmp_path, apply_plan(net, plan), plan)
    for fresh in (net, empty):
        start = time.process_time()
        back = load(tmp_path, fresh)
        assert time.process_time() - start < 1
        assert torch.equal(back[159][0].weight, net[159][0].weight[::2])


# ------------------------------------------------------------------------------------------------- what models remember


def test_a_loaded_model_remembers_its_plan_and_its_state_does_not(tmp_path: Path) -> None:
    small, plan = cut("mlp")
    save(tmp_path, small, plan)
    back = load(tmp_path, nets.mlp())
    assert origin(back) == plan == origin(apply_plan(back, Plan(shapes={})))
    assert origin(small) is None and back.state_dict().keys() == small.state_dict().keys()
    forget_(back)
    assert origin(back) is None


# --------------------------------------------------------------------------------------------------------- subnormals

TINY = {torch.float32: 1e-40, torch.bfloat16: 1e-39, torch.float64: 1e-310}


@pytest.mark.parametrize("dtype", TINY)
def test_subnormal_numbers_are_written_as_zeros_and_counted(dtype: torch.dtype, tmp_path: Path) -> None:
    least, tiny = torch.finfo(dtype).tiny, TINY[dtype]
    net = nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[tiny, -tiny, least], [-least, 0.0, float("inf")]], dtype=dtype))
        net.bias.copy_(torch.tensor([float("nan"), 1.0]))
    before = net.weight.detach().clone()
    assert int((before != 0).sum()) == 5
    plan = Plan(shapes={"weight": (2, 3), "bias": (2,)})
    assert save(tmp_path, net, plan) == {"weight": 2}
    back = load(tmp_path, nn.Linear(3, 2).to(dtype))
    assert back.weight.tolist() == [[0.0, 0.0, least], [-least, 0.0, float("inf")]]
    assert back.bias.isnan().tolist() == [True, False]
    assert torch.equal(net.weight, before)
    assert save(tmp_path, net, plan, exact=True) == {}
    assert torch.equal(load(tmp_path, nn.Linear(3, 2).to(dtype)).weight, before)


def test_the_small_numbers_of_half_precision_are_ordinary_ones(tmp_path: Path) -> None:
    net = nn.Linear(1, 1).half()
    nn.init.constant_(net.weight, 1e-6)
    assert save(tmp_path, net, Plan(shapes={"weight": (1, 1), "bias": (1,)})) == {}
    assert load(tmp_path, nn.Linear(1, 1).half()).weight.item() > 0


def test_a_checkpoint_on_disk_loses_them_too(tmp_path: Path) -> None:
    net = nets.mlp()
    nn.init.constant_(net[0].weight, 1e-41)
    _, plan = cut("mlp")
    applied = apply_to_checkpoint(plan, write_checkpoint(tmp_path / "a", net), tmp_path / "b")
    assert applied.subnormal == {"0.weight": plan.shape_after("0.weight")[0] * 4}
    assert json.loads(json.dumps(applied.to_json()))["subnormal"] == applied.subnormal


def test_a_type_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(
        CheckpointError, match=r"^tensor 'wide' is torch\.complex128, which safetensors files can't hold"
    ):
        save(tmp_path, Wide(), Plan(shapes={"wide": (2,)}))
    assert list(tmp_path.iterdir()) == []
    assert write_tensors(tmp_path / "none.safetensors", [], {}) == {}
