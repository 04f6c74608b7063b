"""Methods come to the same cost, and small networks start from weights of their own."""

import pytest
import torch

from benchmarks.bench import Bench, Protocol, inner
from benchmarks.compress_cifar import BOTH, FIRST, METHODS, SHARES, forget, small, to_cost
from benchmarks.harness import Rows, cifar_task
from benchmarks.subjects import build
from idap import Recovery
from idap.surgery.apply import apply_plan

PROTOCOL = Protocol(device="cpu", train=64, val=32, calibration=64, batch=32, recovery=Recovery(epochs=0))


@pytest.fixture(scope="module")
def bench(real_data):
    task = cifar_task(real_data, train=64, val=32, calibration=64, batch=32, seed=0)
    return Bench(build("resnet20", real_data), task, PROTOCOL, 0)


@pytest.fixture
def rows(tmp_path):
    return Rows(tmp_path / "none.json", ("network", "target", "method", "seed", "protocol"), {})


@pytest.mark.parametrize("share", SHARES.values())
@pytest.mark.parametrize("uniform", [False, True])
def test_a_ranking_is_cut_to_the_cost(bench, share, uniform):
    draw = torch.Generator().manual_seed(0)
    scores = {
        name: torch.rand(bench.structure.group(name).size, generator=draw).tolist() for name in inner(bench.structure)
    }
    keep = to_cost(bench, scores, share, uniform=uniform)
    reached = bench.costs.cost(keep).macs / bench.costs.cost().macs
    assert share * 0.98 < reached <= share
    assert all(len(keep[group.name]) == group.size for group in bench.structure.groups if group.name not in scores)


def test_a_narrow_network_has_the_same_share_of_each_layer(bench, rows):
    cut = small(None)(bench, 1 / 3, rows)
    left = {
        group.name: len(cut.plan.keep.get(group.name, range(group.size))) / group.size
        for group in bench.structure.groups
    }
    assert max(left.values()) - min(left.values()) < 0.15
    assert sum(parameter.numel() for parameter in cut.model.parameters()) == cut.cost.parameters


def test_the_shape_of_another_row_is_taken(bench, rows):
    key = {"network": "resnet20", "target": "1/3", "method": BOTH, "seed": 0, "protocol": "cpu"}
    with pytest.raises(LookupError, match="isn't measured yet"):
        small(BOTH)(bench, SHARES["1/3"], rows)
    rows.rows.append({**key, "left": {"layer1.0.conv1": 5}, "removed": ["layer2.1"]})
    model = small(BOTH)(bench, SHARES["1/3"], rows).model
    assert model.layer1[0].conv1.out_channels == 5
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert not list(model.layer2[1].parameters())


def test_nothing_learnt_is_left(bench):
    model, again, other = (apply_plan(bench.model, bench.structure.plan({})) for _ in range(3))
    for each, seed in ((model, 0), (again, 0), (other, 1)):
        forget(each, seed)
    kept, known = model.state_dict(), bench.model.state_dict()
    learnt = [name for name, tensor in known.items() if tensor.is_floating_point()]
    assert not any(torch.equal(kept[name], known[name]) for name in learnt)
    assert all(torch.equal(kept[name], again.state_dict()[name]) for name in learnt)
    assert not torch.equal(kept["conv1.weight"], other.state_dict()["conv1.weight"])


def test_rows_that_others_need_come_first():
    order = list(METHODS)
    assert order.index(BOTH) < min(place for place, name in enumerate(order) if name.startswith("small"))
    assert all(name.startswith(("idap", "torch-pruning")) for name in order[:FIRST])
