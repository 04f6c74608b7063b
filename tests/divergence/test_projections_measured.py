"""A model with projections is measured as if it had been traced with them: the oracle traces it anew."""

import pytest
import torch
from torch import nn

from idap.divergence.criteria import CRITERIA
from idap.divergence.measure import Divergence, measure_all
from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze
from idap.surgery.apply import apply_plan
from idap.surgery.stand_ins import trial_map
from tests import nets
from tests.rebalance.cuts import build_net, normal, passes
from tests.surgery.test_projection_plans import Tall


def resnet() -> nn.Module:
    blocks = nets.Basic(6, 6), nets.Basic(6, 8, 2), nets.Basic(8, 8)
    return nets.ResNet(*blocks, stem=6, width=8)


PLAIN = [name for name in CRITERIA if name not in ("taylor", "fisher", "random")]
Both = tuple[Structure, dict[str, Divergence], Structure, dict[str, Divergence]]


@pytest.fixture(scope="module", params=["resnet", "linear"])
def both(request: pytest.FixtureRequest) -> Both:
    """Structure and scores as a run sees them, and those of the small model traced anew."""
    make, path, x = {
        "resnet": (resnet, "layers.1", normal(32, 3, 8, 8)),
        "linear": (Tall, "steps.0", normal(32, 5, 4)),
    }[request.param]
    model = build_net(make)
    structure = analyze(trace(model, (x[:2],)), replacement="auto")
    plan = structure.plan({}, [path])
    small = apply_plan(model, plan, {path: trial_map(plan.projections[path])})
    mine = measure_all(small, structure, passes(x), criteria=PLAIN, removed=[path])
    anew = analyze(trace(small, (x[:2],)))
    theirs = measure_all(small, anew, passes(x), criteria=PLAIN)
    return structure.after([path]), mine, anew, theirs


@pytest.mark.parametrize("criterion", PLAIN)
def test_units_score_as_in_a_model_that_was_traced_with_its_projections(both: Both, criterion: str) -> None:
    structure, mine, anew, theirs = both
    compared = set()
    for group in anew.groups:
        (same,) = [g for g in structure.groups if set(group.members) <= set(g.members)]
        if group.name in theirs[criterion].units:
            scores = theirs[criterion].units[group.name]
            assert torch.allclose(mine[criterion].units[same.name], scores, rtol=1e-6), group.name
            compared |= {name for name, _ in group.members}
    if criterion != "bn_scale":
        assert any(name.endswith(".map.weight") for name in compared)
