"""A cut model comes back from disk as it was, without tracing and without pickle; what does not fit is named."""

import copy
import json
import pickle
import random

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

from idap import record
from idap.errors import CheckpointError, PlanError, UncheckedFileWarning
from idap.graph.trace import trace
from idap.saving import checkpoint
from idap.saving.checkpoint import fingerprint, load, read_plan, save
from idap.structure.analysis import analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan
from tests import nets

IDS = nets.tokens()


class Buffered(nn.Module):
    """Buffers of both kinds that shrink with the layer, and one that does not."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("shift", torch.arange(6.0))
        self.register_buffer("gain", torch.arange(6.0) + 10, persistent=False)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x):
        return self.head(self.fc(x) * self.gain + self.shift)


def residual():
    return nets.ResNet(nets.Basic(4, 4), nets.Basic(4, 4), nets.Basic(4, 6, 2), stem=4, width=6)


def transformer():
    return nets.Encoder(4, 8, *(nets.PreNorm(8, nets.FusedAttention(8, 3, 4), nets.SwiGLU(8, 6)) for _ in range(2)))


CASES = {
    "mlp": (nets.mlp, (torch.randn(3, 4),), {}),
    "vgg": (nets.VGG, (nets.images(),), {}),
    "resnet": (residual, (nets.images(),), {}),
    "shufflenet": (nets.ShuffleNet, (nets.images(),), {}),
    "transformer": (transformer, (nets.sequence(4),), {}),
    "tied": (nets.LanguageModel, (IDS,), {"mask": torch.ones(IDS.shape)}),
    "buffers": (Buffered, (torch.randn(3, 4),), {}),
}


def outputs(model, args, kwargs):
    with torch.no_grad():
        found = model(*args, **kwargs)
    return found["logits"] if isinstance(found, dict) else found


def cut(name, seed=0, dtype=torch.float32):
    """A trained-looking model cut at random, and its plan."""
    make, args, kwargs = CASES[name]
    model = nets.randomised(make(), seed).eval()
    if name == "buffers":
        model.gain.copy_(Buffered().gain)  # not saved, so it must be what a fresh model has
    structure = analyze(trace(model, args, kwargs))
    dice = random.Random(seed)
    keep = {g.name: dice.sample(range(g.size), dice.randint(1, g.size - 1)) for g in structure.groups}
    plan = structure.plan(keep, tuple(block.name for block in structure.blocks[:1]))
    return apply_plan(model, plan).to(dtype), plan


def refuse(*_args, **_kwargs):
    raise AssertionError("this must not be called")


@pytest.mark.parametrize("name", CASES)
def test_weights_and_outputs_come_back(name, tmp_path):
    make, args, kwargs = CASES[name]
    small, plan = cut(name)
    save(tmp_path / "deep" / "model", small, plan)
    fresh = make().eval()
    before = copy.deepcopy(fresh.state_dict())
    back = load(tmp_path / "deep" / "model", fresh)
    assert type(back) is type(small)
    assert back.state_dict().keys() == small.state_dict().keys()
    assert_close(back.state_dict(), small.state_dict(), rtol=0, atol=0)
    assert torch.equal(outputs(back, args, kwargs), outputs(small, args, kwargs))
    assert_close(fresh.state_dict(), before, rtol=0, atol=0)
    assert sorted(path.name for path in (tmp_path / "deep" / "model").iterdir()) == ["model.safetensors", "plan.json"]
    assert read_plan(tmp_path / "deep" / "model") == plan


@pytest.mark.parametrize("name", CASES)
def test_loading_needs_no_tracing_and_no_pickle(name, tmp_path, monkeypatch):
    make, args, kwargs = CASES[name]
    small, plan = cut(name)
    expected = outputs(small, args, kwargs)
    save(tmp_path, small, plan)
    fresh = make().eval()
    for owner, function in (
        *((torch.export, "export"), (torch, "load"), (torch, "save")),
        *((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")),
    ):
        monkeypatch.setattr(owner, function, refuse)
    assert torch.equal(outputs(load(tmp_path, fresh), args, kwargs), expected)


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    small, plan = cut("tied")
    save(tmp_path, small, plan)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert ("embed.weight" in stored, "head.weight" in stored) == (True, False)
    back = load(tmp_path, nets.LanguageModel().eval())
    assert back.head.weight is back.embed.weight
    assert torch.equal(back.head.weight, small.embed.weight)


def test_persistent_buffers_are_stored_and_others_are_rebuilt(tmp_path):
    small, plan = cut("buffers")
    save(tmp_path, small, plan)
    assert "gain" not in safetensors.torch.load_file(tmp_path / "model.safetensors")
    back = load(tmp_path, Buffered().eval())
    assert torch.equal(back.shift, small.shift) and torch.equal(back.count, small.count)
    assert torch.equal(back.gain, Buffered().gain[list(plan.keep["fc"])])
    assert back.count.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype, tmp_path):
    small, plan = cut("mlp", dtype=dtype)
    save(tmp_path, small, plan)
    back = load(tmp_path, nets.mlp().to(dtype))
    assert {parameter.dtype for parameter in back.parameters()} == {dtype}
    assert_close(back.state_dict(), small.state_dict(), rtol=0, atol=0)
    with pytest.raises(
        CheckpointError,
        match=rf"tensor '0.weight' in .* is {dtype}, the model's is torch.float32; .* compressed: model.to\({dtype}\)",
    ):
        load(tmp_path, nets.mlp())


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_gradient_flags_follow_the_fresh_model(training, tmp_path):
    small, plan = cut("mlp")
    save(tmp_path, small, plan)
    fresh = nets.mlp().train(training)
    fresh[0].weight.requires_grad_(False)
    back = load(tmp_path, fresh)
    assert {module.training for module in back.modules()} == {training}
    assert (back[0].weight.requires_grad, back[2].weight.requires_grad) == (False, True)


def test_buffers_that_share_memory_are_stored_apart(tmp_path):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
            table = torch.arange(8.0)
            self.register_buffer("table", table)
            self.register_buffer("start", table[:3])

        def forward(self, x):
            return self.head(self.fc(x)) + self.start.sum()

    model = Views().eval()
    plan = analyze(trace(model, (torch.zeros(2, 4),))).plan({"fc": (1, 2)})
    save(tmp_path, apply_plan(model, plan), plan)
    assert torch.equal(load(tmp_path, Views().eval()).start, model.start)


def test_saving_again_replaces_what_was_there(tmp_path):
    for seed in (0, 1):
        small, plan = cut("mlp", seed)
        save(tmp_path, small, plan)
    assert_close(load(tmp_path, nets.mlp()).state_dict(), small.state_dict(), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------- crashes


@pytest.mark.parametrize("file", ["model.safetensors", "plan.json"])
def test_a_crash_while_writing_leaves_each_file_whole(file, tmp_path, monkeypatch):
    old, old_plan = cut("mlp", 0)
    save(tmp_path, old, old_plan)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new, new_plan = cut("mlp", 1)
    move = record.Path.replace

    def crash(self, target):
        if target.name == file:
            raise KeyboardInterrupt
        return move(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(record.Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, new, new_plan)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after[file] == before[file]
    if file == "model.safetensors":
        assert after == before
        assert_close(load(tmp_path, nets.mlp()).state_dict(), old.state_dict(), rtol=0, atol=0)
    else:  # the new weights lie beside the old plan: better no model than a wrong one
        with pytest.raises(CheckpointError, match=r"don't belong together|was not saved with the plan"):
            load(tmp_path, nets.mlp())


def test_a_folder_that_cannot_be_written(tmp_path):
    small, plan = cut("mlp")
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match=r"^cannot write the model to .*file: "):
        save(tmp_path / "file", small, plan)


def test_a_state_that_is_no_tensor_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(CheckpointError, match=r"^'_extra_state' in the model's state is dict, not a tensor, and can't"):
        save(tmp_path, Extra(2, 2), Plan())
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ what is wrong with a folder


@pytest.fixture
def folder_of_model(tmp_path):
    small, plan = cut("mlp")
    save(tmp_path, small, plan)
    return tmp_path


def rejects(folder, match, model=None, error=CheckpointError):
    fresh = nets.mlp() if model is None else model
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(error, match=match):
        load(folder, fresh)
    assert_close(fresh.state_dict(), before, rtol=0, atol=0)


def edit(folder, change):
    file = folder / "plan.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_no_model_there(tmp_path):
    rejects(tmp_path / "nowhere", r"nowhere holds no compressed model: .*plan\.json is missing")
    rejects(tmp_path, r"holds no compressed model: .*plan\.json is missing")


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "model.pt").write_text("text")
    rejects(tmp_path / "model.pt", r"^cannot read .*plan\.json: ")


def test_missing_weights(folder_of_model):
    (folder_of_model / "model.safetensors").unlink()
    rejects(folder_of_model, r"the compressed model has no weights: .*model\.safetensors is missing")


@pytest.mark.parametrize("length", [0, 4, 20, -1])
def test_truncated_weights(folder_of_model, length):
    file = folder_of_model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    rejects(
        folder_of_model, r"model\.safetensors is truncated or not a safetensors file \(.+\); copy or download it again"
    )


def test_a_pickle_in_place_of_the_weights_is_never_opened(folder_of_model):
    torch.save({"0.weight": torch.zeros(1)}, folder_of_model / "model.safetensors")
    rejects(folder_of_model, r"is truncated or not a safetensors file")


@pytest.mark.parametrize("text", ['{"format": 1', "", "\udcff"])
def test_broken_plan(folder_of_model, text):
    (folder_of_model / "plan.json").write_bytes(text.encode(errors="surrogateescape"))
    rejects(folder_of_model, r"plan\.json is broken: ")


@pytest.mark.parametrize(("content", "found"), [({"format": 2}, "2"), ({}, "None"), ([], r"\[\]")])
def test_other_format(folder_of_model, content, found):
    (folder_of_model / "plan.json").write_text(json.dumps(content))
    rejects(folder_of_model, rf"plan\.json has format {found}, this version of idap reads format 1")


def test_plan_without_a_part(folder_of_model):
    edit(folder_of_model, lambda data: data["plan"].pop("tensors"))
    rejects(
        folder_of_model,
        r"plan\.json: this is not a plan: KeyError: 'tensors'; it must come from Plan\.to_json",
        error=PlanError,
    )


def test_plan_of_another_model_names_the_first_tensor_its_shape_and_the_one_expected(folder_of_model):
    other = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5, bias=False), nn.GELU(), nn.Linear(5, 3))
    rejects(
        folder_of_model,
        r"the plan does not fit this model: tensor '0\.weight' has shape \(7, 4\), the plan expects \(6, 4\); build",
        other,
        PlanError,
    )
    rejects(folder_of_model, r"it has no tensor '0\.weight' \(expected shape \(6, 4\)\)", nets.VGG(), PlanError)


def test_changed_shapes(folder_of_model):
    edit(folder_of_model, lambda data: data["plan"]["shapes"].update({"0.weight": [9, 4]}))
    rejects(folder_of_model, r"plan\.json was changed after it was written: its fingerprint does not match its shapes")


def test_changed_plan_of_the_same_shapes(folder_of_model):
    def other_units(data):
        for name in ("0.weight", "0.bias"):
            kept = data["plan"]["tensors"][name]["0"]
            others = sorted(set(range(6)) - set(kept))[: len(kept)] + kept[6 - len(kept) :]
            data["plan"]["tensors"][name]["0"] = sorted(others)

    edit(folder_of_model, other_units)
    rejects(folder_of_model, r"the plan in .*plan\.json is not what was written there: its checksum does not match")
    edit(folder_of_model, lambda data: data.update(digest=checkpoint.digest(Plan.from_json(data["plan"]))))
    rejects(folder_of_model, r"don't belong together|was not saved with the plan\.json beside it")


def test_weights_of_another_plan(folder_of_model, tmp_path):
    structure = analyze(trace(nets.mlp().eval(), (torch.zeros(2, 4),)))
    kept = len(read_plan(folder_of_model).keep["0"])
    others = {
        "smaller": {"0": range(1), "2": range(1)},
        "other units": {name: range(len(units)) for name, units in read_plan(folder_of_model).keep.items()},
    }
    assert kept > 1
    for name, keep in others.items():
        plan = structure.plan({group: tuple(units) for group, units in keep.items()})
        save(tmp_path / name, apply_plan(nets.mlp(), plan), plan)
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        (folder_of_model / "model.safetensors").write_bytes(weights)
        expected = r"tensor '0\.weight' in .* has shape \(1, 4\), the plan makes it \(\d, 4\); plan and weights don't"
        rejects(
            folder_of_model,
            expected if name == "smaller" else r"was not saved with the plan\.json beside it: one of the two",
        )


def test_weights_that_a_user_wrote_are_taken_if_they_fit(folder_of_model):
    """Fine-tuned elsewhere and written with safetensors alone: no word on the plan, but the right shapes."""
    tensors = safetensors.torch.load_file(folder_of_model / "model.safetensors")
    safetensors.torch.save_file(
        {name: tensor + 1 for name, tensor in tensors.items()}, folder_of_model / "model.safetensors"
    )
    with pytest.warns(UncheckedFileWarning, match=r"model\.safetensors was written without checksums, so damage"):
        assert torch.equal(load(folder_of_model, nets.mlp())[4].bias, tensors["4.bias"] + 1)


def test_missing_and_unknown_tensors(folder_of_model):
    tensors = safetensors.torch.load_file(folder_of_model / "model.safetensors")
    bias = tensors.pop("4.bias")
    safetensors.torch.save_file(tensors, folder_of_model / "model.safetensors")
    rejects(folder_of_model, r"model\.safetensors lacks tensor '4\.bias' \(expected shape \(3,\)\)")
    safetensors.torch.save_file({**tensors, "4.bias": bias, "5.bias": bias + 1}, folder_of_model / "model.safetensors")
    rejects(folder_of_model, r"model\.safetensors holds tensor '5\.bias', which the model does not have")


def test_the_fingerprint_tells_architectures_apart_and_not_their_order():
    one, two = {"a": (2, 3), "b": (4,)}, {"b": (4,), "a": (2, 3)}
    assert fingerprint(one) == fingerprint(two)
    assert len({fingerprint(one), fingerprint({"a": (3, 2), "b": (4,)}), fingerprint({"a": (2, 3)})}) == 3


def test_versions_are_noted(folder_of_model):
    versions = json.loads((folder_of_model / "plan.json").read_text())["versions"]
    assert versions["torch"] == str(torch.__version__)
    assert set(versions) == {"torch", "safetensors", "python"}
    assert checkpoint.FORMAT == 1
