"""Every criterion on every small net: finite, not negative, and gradients of gates against gradients of weights."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from idap.divergence.criteria import CRITERIA
from idap.divergence.measure import measure_all
from idap.divergence.observe import Pass
from idap.graph.ir import leaves
from tests import nets


def loss_of(outputs):
    """Mean over the samples of something that treats no output like another."""
    found = [x for x in leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]
    total = 0
    for x in found:
        weights = torch.rand(x[0].shape, generator=torch.Generator().manual_seed(7)).to(x)
        total = total + (x.square() * weights).flatten(1).mean(1).mean()
    return total


@pytest.mark.parametrize("name", nets.by_name)
def test_scores_are_finite_and_not_negative(name):
    net, structure = nets.by_name[name], nets.structure_of(name)
    model = net.model()
    data = [Pass(lambda m: m(*net.args, **net.kwargs), loss_of)] * 2
    for criterion, found in measure_all(model, structure, data, criteria=list(CRITERIA)).items():
        for group, scores in found.units.items():
            assert scores.shape == (structure.group(group).size,)
            assert bool((scores.isfinite() & (scores >= 0)).all()), (criterion, group)
        assert all(0 <= score < float("inf") for score in found.blocks.values())


@pytest.mark.parametrize("name", nets.by_name)
def test_a_gate_on_a_unit_is_a_factor_on_the_weights_that_read_it(name):
    net, structure = nets.by_name[name], nets.structure_of(name)
    model = net.model()
    args = tuple(x[:1] if isinstance(x, Tensor) else x for x in net.args)
    kwargs = {key: x[:1] if isinstance(x, Tensor) else x for key, x in net.kwargs.items()}
    data = [Pass(lambda m: m(*args, **kwargs), loss_of)]
    found = measure_all(model, structure, data, criteria=["taylor"])["taylor"].units
    loss_of(model(*args, **kwargs)).backward()
    graph = structure.graph
    used = Counter(graph.nodes[name].target for node in graph.nodes.values() for name in dict.fromkeys(node.inputs()))
    parameters = dict(model.named_parameters())
    contractions = structure.layout.contractions
    checked = 0
    for group in structure.groups:
        read = [(port.weight, contractions[port.contraction]) for port in group.readers]
        plain = all(weight in parameters and how.groups == 1 and how.kind != "recurrent" for weight, how in read)
        if group.name not in found or not plain or any(used[weight] > 1 for weight, _ in read):
            continue
        expected = torch.zeros(group.size, dtype=torch.float64)
        for port, (weight, how) in zip(group.readers, read, strict=True):
            product = (parameters[weight] * parameters[weight].grad).detach().double()
            columns = product.movedim(how.read_dim, 0).flatten(1).sum(1)
            dim = structure.layout.dims[contractions[port.contraction].weight][0][how.read_dim]
            units = torch.from_numpy(structure.layout.units(dim, group.index))
            expected.index_add_(0, units[units >= 0], columns[units >= 0])
        assert_close(found[group.name], expected.abs(), rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
        checked += 1
    assert checked >= min(len(structure.groups), 2) or name in ("shared", "recurrent")
