"""Language models from which layers and units went still generate text, with and without their cache."""

import pytest
import torch

from idap.errors import PlanError
from idap.graph.trace import trace
from idap.structure.analysis import analyze
from idap.surgery.apply import apply_plan
from idap.surgery.verify import verify
from tests.conformance.catalogue import case

pytest.importorskip("transformers", reason="transformers is not installed; make installs it")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "opt", "mamba"])
@pytest.mark.parametrize("kind", ["block", "branch"])
def test_it_generates_the_same_with_and_without_a_cache(name: str, kind: str) -> None:
    chosen = case(f"transformers:{name}")
    model, args, kwargs = chosen.made()
    structure = analyze(trace(model, args, kwargs), contracts=chosen.contracts)
    first = next((block.name for block in structure.blocks if block.kind == kind), None)
    if first is None:
        pytest.skip("a state-space layer is one block without branches")
    keep = {group.name: range(max(1, group.size * 3 // 4)) for group in structure.groups}
    plan = structure.plan(keep, [first])
    small = apply_plan(model, plan)
    assert verify(structure, model, small, plan, (args, kwargs)).error <= 1e-4
    small.generation_config.pad_token_id, small.generation_config.eos_token_id = 0, None
    start = torch.arange(5, 11)[None]
    found = [small.generate(start, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert found[0].shape == (1, 12) and torch.equal(*found)


def test_layers_that_stay_number_themselves_anew() -> None:
    chosen = case("transformers:llama")
    model, args, kwargs = chosen.made()
    structure = analyze(trace(model, args, kwargs), contracts=chosen.contracts)
    small = apply_plan(model, structure.plan({}, ["model.layers.0"]))
    assert small.model.layers[1].self_attn.layer_idx == 0
    assert model.model.layers[1].self_attn.layer_idx == 1


def test_a_group_without_units_takes_its_branch_with_it() -> None:
    chosen = case("transformers:llama")
    model, args, kwargs = chosen.made()
    structure = analyze(trace(model, args, kwargs), contracts=chosen.contracts)
    plan = structure.plan({"model.layers.0.mlp.gate_proj": []})
    assert plan.removed == ("model.layers.0.mlp",)
    assert verify(structure, model, apply_plan(model, plan), plan, (args, kwargs)).error <= 1e-4
    with pytest.raises(PlanError, match="no residual branch contains the whole group"):
        structure.plan({"model.embed_tokens": []})
