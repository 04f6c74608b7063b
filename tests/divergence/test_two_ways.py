"""Code that takes other steps in an export than in an ordinary run: what it reads is seen where it is read."""

import importlib.util

import pytest
import torch

from idap.divergence.criteria import CRITERIA
from idap.divergence.measure import measure_all
from idap.divergence.observe import Pass
from idap.graph.trace import trace
from idap.structure.analysis import analyze

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@needs_transformers
def test_heads_of_a_language_model_that_repeats_its_keys_only_in_an_export():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 31, (3, 6))
    structure = analyze(trace(model, (), {"input_ids": tokens[:2]}), contracts=["logits"])
    heads = {group.name for group in structure.groups if group.kind == "heads"}
    assert heads

    def loss(outputs):
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    found = measure_all(model, structure, [Pass(lambda m: m(input_ids=tokens), loss)], criteria=list(CRITERIA))
    for block in structure.blocks:  # the exporter asserts types and devices of what an addition returns
        assert block.name in found["relative"].blocks
        assert block.name in found["paper"].blocks
    for name in ("relative", "innovation", "paper", "activation", "taylor", "magnitude"):
        assert heads <= set(found[name].units), name
        assert all(bool(found[name].units[group].isfinite().all()) for group in heads)
