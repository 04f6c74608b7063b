"""A compressed model of transformers comes back from its folder: from a plain one wherever its configuration can."""

import copy
import json

import pytest
import torch
from torch import nn

import idap
from idap.errors import CheckpointError, ConfigError, UncheckedFileWarning
from idap.graph.trace import trace
from idap.hugging_face import folder as hugging_face
from idap.hugging_face.folder import load_pretrained, save_pretrained
from idap.structure.analysis import analyze
from idap.surgery.apply import apply_plan
from tests.conformance import vision_operators

vision_operators.make_importable()
transformers = pytest.importorskip("transformers", reason="transformers is not installed; make installs it")
pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 61
TOKENS = torch.randint(5, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WORDS = {"vocab_size": VOCABULARY, "max_position_embeddings": 40}
STREAM = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 3}

MODELS = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**WORDS, **STREAM}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "use_cache": False},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**WORDS, **STREAM, "num_key_value_heads": 2, "use_cache": False}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {
            **WORDS,
            **STREAM,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 64,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
            "use_cache": False,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"num_decoder_layers": 3, "decoder_start_token_id": 0, "use_cache": False},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**STREAM, "image_size": 16, "patch_size": 8}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**WORDS, **STREAM, "num_hidden_layers": 1, "num_key_value_heads": 2, "num_local_experts": 2}
        | {"experts_implementation": "batched_mm", "use_cache": False},
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
        | {"window_size": 2, "mlp_ratio": 3.0},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**WORDS, "hidden_size": 32, "word_embed_proj_dim": 32, "num_attention_heads": 4, "ffn_dim": 48}
        | {"num_hidden_layers": 3, "use_cache": False},
    ),
}
_MADE: dict[str, tuple] = {}


def make_case(name):
    """A model, its structure and inputs; the same for all tests, which change none of them."""
    if name not in _MADE:
        torch.manual_seed(0)
        kind, config, options = MODELS[name]
        model = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
        inputs = {"pixel_values": PIXELS} if name in ("vit", "swin") else {"input_ids": TOKENS}
        if name == "t5":
            inputs["decoder_input_ids"] = TOKENS[:, :7]
        structure = analyze(trace(model, (), inputs), contracts=("logits",))
        _MADE[name] = model, structure, inputs
    return _MADE[name]


def is_inner(group):
    return group.kind == "neurons" and group.size >= 48


def is_shared_head(group):
    """Heads, or those that share keys where there are such."""
    return group.kind == "heads" and "#" not in group.name


def cut(name, *choose, removed=()):
    """Half of the chosen groups goes: (small model, plan, inputs)."""
    model, structure, inputs = make_case(name)
    keep = {
        group.name: range(0, group.size, 2)  # no two neighbours
        for group in structure.groups
        if any(chosen(group) for chosen in choose)
    }
    plan = structure.plan(keep, list(removed))
    assert plan
    return apply_plan(model, plan), plan, inputs


def assert_same(one, other, inputs):
    with torch.no_grad():
        torch.testing.assert_close(one(**inputs).logits, other(**inputs).logits)


def stream(group):
    return group.size == 32


PLAIN = {
    "bert-inner": ("bert", (is_inner,), (), {"intermediate_size": (48, 24)}),
    "bert-all": (
        "bert",
        (is_inner, is_shared_head, stream),
        ("bert.encoder.layer.1",),
        {"num_hidden_layers": (3, 2), "hidden_size": (32, 16), "num_attention_heads": (4, 2)}
        | {"intermediate_size": (48, 24)},
    ),
    "gpt2-inner": ("gpt2", (is_inner,), ("transformer.h.0",), {"n_layer": (3, 2), "n_inner": (None, 64)}),
    "gpt2-all": (
        "gpt2",
        (is_inner, is_shared_head, stream),
        (),
        {"n_embd": (32, 16), "n_head": (4, 2)},  # the inner width is four times that of the stream by itself
    ),
    "llama-heads": (
        "llama",
        (is_inner, is_shared_head),
        ("model.layers.2",),
        {"num_attention_heads": (4, 2), "num_key_value_heads": (2, 1), "intermediate_size": (48, 24)}
        | {"num_hidden_layers": (3, 2)},
    ),
    "llama-stream": ("llama", (stream,), (), {"hidden_size": (32, 16)}),  # the head width stays 8
    "qwen2-layer": (
        "qwen2",
        (is_inner,),
        ("model.layers.0",),
        {
            "num_hidden_layers": (3, 2),
            "intermediate_size": (48, 24),
            "layer_types": (
                ["full_attention", "sliding_attention", "full_attention"],
                ["sliding_attention", "full_attention"],
            ),
        },
    ),
    "mixtral-heads": (
        "mixtral",
        (is_shared_head,),
        (),
        {"num_key_value_heads": (2, 1), "num_attention_heads": (4, 2), "head_dim": (None, 8)},
    ),
    "swin-ratio": ("swin", (lambda group: group.name.endswith("mlp.fc1"),), (), {"mlp_ratio": (3.0, 1.5)}),
    "t5-heads": (
        "t5",
        (is_inner, is_shared_head),
        ("decoder.block.1",),
        {"num_heads": (4, 2), "d_ff": (48, 24), "num_decoder_layers": (3, 2)},
    ),
    "vit-all": (
        "vit",
        (is_inner, is_shared_head, stream),
        ("vit.layers.0",),
        {"hidden_size": (32, 16), "num_attention_heads": (4, 2), "intermediate_size": (48, 24)}
        | {"num_hidden_layers": (3, 2)},
    ),
    "opt-all": (
        "opt",
        (is_inner, is_shared_head, stream),
        ("model.decoder.layers.1", "model.decoder.layers.2"),
        {"hidden_size": (32, 16), "num_attention_heads": (4, 2), "ffn_dim": (48, 24), "num_hidden_layers": (3, 1)}
        | {"word_embed_proj_dim": (32, 16)},
    ),
}


@pytest.mark.parametrize(("name", "choose", "removed", "changed"), PLAIN.values(), ids=PLAIN)
def test_what_a_configuration_can_say_becomes_a_plain_folder(name, choose, removed, changed, tmp_path):
    small, plan, inputs = cut(name, *choose, removed=removed)
    saved = save_pretrained(small, plan, tmp_path / "small")
    assert saved.plain, saved.reason
    assert saved.changed == changed
    assert saved.loads_with == f"{type(make_case(name)[0]).__name__}.from_pretrained({str(tmp_path / 'small')!r})"
    again = type(make_case(name)[0]).from_pretrained(tmp_path / "small")
    assert_same(again, small, inputs)
    assert_same(load_pretrained(tmp_path / "small"), small, inputs)
    assert {type(module) for module in again.modules()} <= {type(module) for module in make_case(name)[0].modules()}
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in small.parameters())
    assert not (tmp_path / "small" / "plan.json").exists()
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["small"]


UNEVEN = {
    "widths": (
        "llama",
        {"model.layers.0.mlp.gate_proj": range(20), "model.layers.1.mlp.gate_proj": range(24)},
        (),
        r"^model\.layers\.0\.mlp\.gate_proj\.weight has shape \(20, 32\), model\.layers\.1\.mlp\.gate_proj\.weight has "
        r"\(24, 32\), and a configuration has one number for both$",
    ),
    "branch": (
        "opt",
        {},
        ("model.decoder.layers.1.final_layer_norm…fc2",),
        r"^model\.decoder\.layers\.1\.\w+ stands in for what was removed, and a configuration can leave out only "
        r"whole layers$",
    ),
    "heads": (
        "bert",
        {f"bert.encoder.layer.{place}.attention.self.query:heads": (0, 2) for place in range(3)},
        (),
        r"makes tensor 'bert\.encoder\.layer\.0\.attention\.self\.query\.weight' \(16, 32\); the nearest is \(32, 32\)",
    ),
    "scale": (
        "vit",  # the code computes its scale from the head width, and the cut keeps that of the original
        {f"vit.layers.{place}.attention.q_proj:head-width": range(4) for place in range(3)},
        (),
        r"^a configuration with head_dim=4 gives tensors of the same shapes, but other outputs$",
    ),
    "refused": (
        "gpt2",
        {"transformer.wte": range(30)},
        (),
        r"the configuration refuses n_embd=30: .*",
    ),
}


@pytest.mark.parametrize(("name", "keep", "removed", "reason"), UNEVEN.values(), ids=UNEVEN)
def test_what_no_configuration_can_say_keeps_its_plan_and_says_why(name, keep, removed, reason, tmp_path):
    model, structure, inputs = make_case(name)
    plan = structure.plan(keep, list(removed))
    small = apply_plan(model, plan)
    saved = save_pretrained(small, plan, tmp_path / "small")
    assert not saved.plain and not saved.changed
    assert saved.loads_with == f"idap.hugging_face.folder.load_pretrained({str(tmp_path / 'small')!r})"
    with pytest.raises(ConfigError, match=reason):
        raise ConfigError(saved.reason)
    again = load_pretrained(tmp_path / "small")
    assert not any(module.training for module in again.modules())
    assert_same(again, small, inputs)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "small" / "original")
    assert_same(idap.load(tmp_path / "small", type(model)(config).eval()), small, inputs)
    for kind in (type(model), transformers.AutoModel):
        with pytest.raises(OSError, match=r"config\.json' is not a valid JSON file"):
            kind.from_pretrained(tmp_path / "small")
    assert "load_pretrained(" in (tmp_path / "small" / "config.json").read_text()
    assert saved.reason in str(saved) and "is not a plain folder" in str(saved)


@pytest.mark.parametrize(("name", "plain"), [("llama", True), ("gpt2", False), ("t5", True)])
def test_what_comes_back_writes_the_same_text(name, plain, tmp_path):
    model, structure, _ = make_case(name)
    inner = [group.name for group in structure.groups if is_inner(group)]
    plan = structure.plan({group: range(20 if plain else 20 + place) for place, group in enumerate(inner)})
    small = apply_plan(model, plan)
    small.generation_config.update(pad_token_id=0, eos_token_id=None, max_new_tokens=5, do_sample=False)
    assert save_pretrained(small, plan, tmp_path / "small").plain is plain
    again = load_pretrained(tmp_path / "small")
    assert again.generation_config.max_new_tokens == 5
    assert torch.equal(again.generate(TOKENS[:1]), small.generate(TOKENS[:1]))


def test_tied_tensors_stay_tied(tmp_path):
    small, plan, _ = cut("qwen2", is_inner)
    assert save_pretrained(small, plan, tmp_path / "small").plain
    again = type(make_case("qwen2")[0]).from_pretrained(tmp_path / "small")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    small.lm_head.weight = nn.Parameter(small.lm_head.weight.detach().clone())
    saved = save_pretrained(small, plan, tmp_path / "untied")
    assert saved.reason == "the model ties other tensors than the configuration does"


def test_attention_that_outputs_do_not_show_is_compared_too(tmp_path):
    small, plan, _ = cut("qwen2", is_inner)
    small.model.layers[0].self_attn.sliding_window = 64  # longer than any example
    saved = save_pretrained(small, plan, tmp_path / "small")
    assert (
        saved.reason
        == "the layer model.layers.0.self_attn of the configuration has a different sliding_window (None, here 64)"
    )


def test_nothing_of_the_model_or_the_dice_changes(tmp_path):
    small, plan, _ = cut("bert", is_inner)
    small.train()
    state, config = copy.deepcopy(small.state_dict()), small.config.to_dict()
    torch.manual_seed(3)
    dice = torch.get_rng_state()
    assert save_pretrained(small, plan, tmp_path / "small").plain
    assert torch.equal(dice, torch.get_rng_state())
    assert small.config.to_dict() == config
    assert all(module.training for module in small.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in small.state_dict().items())


def test_half_precision_comes_back_as_it_was(tmp_path):
    uneven = ((lambda group: is_inner(group) and ".0." in group.name),)
    for number, choose in enumerate(((is_inner,), (is_shared_head, stream), uneven)):
        small, plan, _ = cut("llama", *choose)
        small = small.to(torch.bfloat16)
        saved = save_pretrained(small, plan, tmp_path / str(number))
        assert saved.plain is (number < 2), saved.reason
        assert number != 1 or saved.changed["num_attention_heads"] == (4, 2)
        again = load_pretrained(tmp_path / str(number))
        assert again.dtype == torch.bfloat16
        assert all(torch.equal(one, two) for one, two in zip(again.parameters(), small.parameters(), strict=True))


class Tokenizer:
    """Writes a file, or fails."""

    def __init__(self, fails=False):
        self.fails = fails

    def save_pretrained(self, folder):
        if self.fails:
            raise OSError("the disk is full")
        (folder / "vocab.txt").write_text("a b c")


def test_a_folder_appears_whole_or_stays_as_it_was(tmp_path):
    small, plan, inputs = cut("bert", is_inner)
    folder = tmp_path / "small"
    with pytest.raises(CheckpointError, match=r"^cannot write the model to .*small: the disk is full$"):
        save_pretrained(small, plan, folder, tokenizer=Tokenizer(fails=True))
    assert list(tmp_path.iterdir()) == []
    save_pretrained(small, plan, folder, tokenizer=Tokenizer())
    assert (folder / "vocab.txt").read_text() == "a b c"
    other, uneven, _ = cut("bert", lambda group: is_inner(group) and ".0." in group.name)
    with pytest.raises(CheckpointError, match="the disk is full"):
        save_pretrained(other, uneven, folder, tokenizer=Tokenizer(fails=True))
    assert_same(load_pretrained(folder), small, inputs)
    assert not save_pretrained(other, uneven, folder).plain
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json",
        "idap.json",
        "model.safetensors",
        "original",
        "plan.json",
    ]
    assert_same(load_pretrained(folder), other, inputs)
    assert list(tmp_path.iterdir()) == [folder]
    assert json.loads((folder / "idap.json").read_text())["plain"] is False


@pytest.mark.parametrize("plain", [True, False])
def test_damage_is_noticed(plain, tmp_path):
    inner = is_inner if plain else lambda group: is_inner(group) and ".0." in group.name
    small, plan, inputs = cut("bert", inner)
    assert save_pretrained(small, plan, tmp_path).plain is plain
    config = "config.json" if plain else "original/config.json"
    for name, message in {
        "model.safetensors": r"model\.safetensors is not what was written there: its checksum does not match",
        config: r"config\.json is not what was written there: its checksum does not match.* delete the entry '.*' of",
    }.items():
        content = (tmp_path / name).read_bytes()
        place = content.rindex(b"1e-12") + 4 if name == config else len(content) - 1
        (tmp_path / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(tmp_path)
        (tmp_path / name).write_bytes(content)
    assert_same(load_pretrained(tmp_path), small, inputs)


def test_a_folder_without_checksums_loads_and_it_is_said(tmp_path):
    small, plan, inputs = cut("bert", is_inner)
    save_pretrained(small, plan, tmp_path)
    note = json.loads((tmp_path / "idap.json").read_text())
    del note["sha256"]
    (tmp_path / "idap.json").write_text(json.dumps(note))
    with pytest.warns(UncheckedFileWarning, match="was written without checksums"):
        assert_same(load_pretrained(tmp_path), small, inputs)


@pytest.mark.parametrize("plain", [True, False])
def test_a_folder_that_names_a_kernel_of_the_hub(plain, tmp_path):
    inner = is_inner if plain else lambda group: is_inner(group) and ".0." in group.name
    small, plan, _ = cut("bert", inner)
    save_pretrained(small, plan, tmp_path)
    file = tmp_path / ("config.json" if plain else "original/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_implementation": "somebody/kernel"}))
    (tmp_path / "idap.json").write_text(json.dumps({"sha256": {}}))
    with pytest.raises(ConfigError, match="names 'somebody/kernel' as attn_implementation, which is code from else"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "original/../x", "a/b", ""])
def test_checksums_name_only_files_of_the_folder(name, tmp_path):
    small, plan, _ = cut("bert", is_inner)
    save_pretrained(small, plan, tmp_path)
    (tmp_path / "idap.json").write_text(json.dumps({"sha256": {name: "0"}}))
    with pytest.raises(CheckpointError, match=r"names the file|can't be read"):
        load_pretrained(tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    small, plan, _ = cut("bert", is_inner)
    make_case("bert")[0].save_pretrained(tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"mine is not empty and was not written by save_pretrained of idap; "):
        save_pretrained(small, plan, tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file is a file; choose a folder$"):
        save_pretrained(small, plan, tmp_path / "file")


def test_a_loaded_model_knows_its_plan(tmp_path):
    (small, plan, _), original = cut("bert", is_inner), make_case("bert")[0]
    with pytest.raises(ConfigError, match=r"remembers no plan, so it comes neither from idap\.load nor from "):
        save_pretrained(original, None, tmp_path / "small")
    idap.save(tmp_path / "run", small, plan)
    assert save_pretrained(idap.load(tmp_path / "run", original), None, tmp_path / "small").plain


def test_what_is_no_model_of_transformers_or_has_another_plan_is_refused(tmp_path):
    small, plan, _ = cut("bert", is_inner)
    with pytest.raises(ConfigError, match=r"^save_pretrained takes a model of transformers, found Linear; idap\.save "):
        save_pretrained(nn.Linear(2, 2), plan, tmp_path / "small")
    with pytest.raises(
        CheckpointError, match=r"^the plan is not that of this model: it makes tensor 'bert\..* \(24, 32\)"
    ):
        save_pretrained(make_case("bert")[0], plan, tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"holds no saved model of transformers: .*config\.json is missing$"):
        load_pretrained(tmp_path)
    small.main_input_name = "waves"
    with pytest.raises(
        ConfigError, match=r"^no example inputs for BertForSequenceClassification are known; pass inputs="
    ):
        save_pretrained(small, plan, tmp_path / "small")
    with pytest.raises(
        ConfigError, match=r"^BertForSequenceClassification does not run on the example inputs: .*Pass "
    ):
        save_pretrained(small, plan, tmp_path / "small", inputs=((), {"pixel_values": PIXELS}))
    assert save_pretrained(small, plan, tmp_path / "small", inputs=((TOKENS,), {})).plain
    (tmp_path / "small" / "config.json").write_text('{"architectures": ["AutoConfig"]}')
    with pytest.raises(ConfigError, match=r"names the model 'AutoConfig', which transformers [\d.]+ does not have; "):
        load_pretrained(tmp_path / "small")


def test_without_transformers_it_says_what_to_install(tmp_path, monkeypatch):
    small, plan, _ = cut("bert", is_inner)
    monkeypatch.setattr(hugging_face.importlib, "import_module", lambda name: __import__("no_such_package"))
    with pytest.raises(
        ConfigError, match=r"this needs transformers, which is missing\. Run: pip install 'idap\[text\]'$"
    ):
        save_pretrained(small, plan, tmp_path)


def test_code_written_anew_runs_at_other_sizes_and_is_not_in_a_plain_folder(tmp_path):
    model, structure, _ = make_case("llama")
    plan = structure.plan({group.name: (0,) for group in structure.groups if group.name.endswith("#2")})
    small = apply_plan(model, plan)
    assert plan.programs
    one = {"input_ids": TOKENS[:, :1]}  # of one token, attention is called without a causal mask
    with pytest.raises(
        ConfigError, match=r"RewrittenModuleError: .* Pass inputs=\(args, kwargs\), of the kind and size"
    ):
        save_pretrained(small, plan, tmp_path / "small", inputs=((), one))
    saved = save_pretrained(small, plan, tmp_path / "small")
    assert saved.changed == {"num_attention_heads": (4, 2)}
    again = load_pretrained(tmp_path / "small")
    for tokens in (TOKENS, TOKENS[:1], TOKENS[:, :3]):
        assert_same(again, small, {"input_ids": tokens})
    assert again(TOKENS[:, :1]).logits.shape == (2, 1, VOCABULARY)


def test_a_selection_that_is_alike_gives_a_plain_folder(tmp_path):
    model, structure, inputs = make_case("t5")
    from idap.selection.ranking import rank_units
    from idap.selection.reach import reach
    from idap.selection.rounding import tie_units
    from idap.structure.groups import alike_groups

    dice = torch.Generator().manual_seed(0)
    groups = [group for group in structure.groups if is_inner(group) or is_shared_head(group)]
    scores = {group.name: torch.rand(group.size, generator=dice).tolist() for group in groups}
    present = {group.name: tuple(range(group.size)) for group in groups}
    costs = dict.fromkeys(scores, 1.0)
    ranking = tie_units(rank_units(scores, present, costs, floors={}), alike_groups(groups, "model"))
    choice = reach(
        ranking, lambda keep, removed: float(sum(map(len, keep.values()))), 0.6 * sum(map(len, scores.values()))
    )
    plan = structure.plan(choice.keep)
    small = apply_plan(model, plan)
    saved = save_pretrained(small, plan, tmp_path / "small")
    assert set(saved.changed) == {"d_ff", "num_heads"}
    assert_same(load_pretrained(tmp_path / "small"), small, inputs)
