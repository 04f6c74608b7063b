"""`torch.compile` works on a cut model with a removed block and rewritten modules."""

import shutil

import pytest
import torch

from idap.surgery.apply import apply_plan
from idap.surgery.finalize import finalize
from tests.nets import by_name, structure_of


def cut(name, removed):
    """Half of every group gone, and a block."""
    net, structure = by_name[name], structure_of(name)
    plan = structure.plan({group.name: range(0, group.size, 2) for group in structure.groups}, [removed])
    return net, apply_plan(net.model(), plan), plan


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "removed", "backend"),
    [
        ("torch encoder, swapped", "encoder.layers.1", "aot_eager"),
        ("cifar literal, swapped", "layers.2", "aot_eager"),
        ("resnet basic", "layers.1", "aot_eager"),
        pytest.param(
            *("torch encoder, swapped", "encoder.layers.1", "inductor"),
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"),
            ],
        ),
    ],
)
def test_a_cut_net_is_compiled_whole(name, removed, backend):
    net, small, plan = cut(name, removed)
    assert plan.replaced and bool(plan.programs) == net.swap
    compiled = torch.compile(small, backend=backend, fullgraph=True)
    with torch.no_grad():
        for x in (net.args[0], torch.cat([net.args[0], net.args[0] * 2])):
            expected = small(x)
            assert torch.allclose(compiled(x), expected, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_gradients_of_a_compiled_cut_net():
    net, small, _ = cut("torch encoder, swapped", "encoder.layers.1")
    torch.compile(small, backend="aot_eager")(net.args[0]).sum().backward()
    compiled = {name: parameter.grad.clone() for name, parameter in small.named_parameters()}
    small.zero_grad()
    small(net.args[0]).sum().backward()
    for name, parameter in small.named_parameters():
        assert torch.allclose(parameter.grad, compiled[name], atol=1e-4), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_finalized_net_is_compiled_too():
    net, small, _ = cut("resnet basic", "layers.1")
    final, _ = finalize(small, net.args)
    compiled = torch.compile(final, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(net.args[0]), small(net.args[0]), atol=1e-3)
