"""Models, weights and the user's own objects are found by name, or the error says what to write instead."""

import sys
import types
from random import Random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from idap.errors import CheckpointError, ConfigError
from idap.models.nets import CifarResNet, DigitsResNet, DigitsViT, cifar_resnet20
from idap.models.resolve import build_model, example_inputs
from idap.models.weights import check_keepable, load_weights, notes_in
from idap.script import load_object
from tests.fuzz.mutations import damages

SCRIPT = """
from torch import nn

WIDTH = 3

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))

def build_model():
    import late_part
    return late_part.finish(Net())

def no_model():
    return 3

def fails():
    return nn.Linear(2, 2)(nn.Linear(2, 2))

ready = Net()
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "late_part.py").write_text("def finish(net):\n    return net\n")
    file = tmp_path / "net.py"
    file.write_text(SCRIPT)
    yield file
    sys.modules.pop("late_part", None)


def make_tied_net():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


class TestModels:
    @pytest.mark.parametrize(
        ("name", "kind", "shape"),
        [
            ("digits_resnet", DigitsResNet, (1, 1, 8, 8)),
            ("digits_vit", DigitsViT, (1, 1, 8, 8)),
            ("cifar_resnet20", CifarResNet, (1, 3, 32, 32)),
            ("cifar_resnet56", CifarResNet, (1, 3, 32, 32)),
        ],
    )
    def test_own_networks(self, name, kind, shape):
        model = build_model(f"idap:{name}")
        assert isinstance(model, kind)
        assert not model.training
        assert example_inputs(f"idap:{name}", model)[0][0].shape == shape

    @pytest.mark.parametrize("name", ["build_model", "Net", "ready"])
    def test_a_function_a_class_or_a_module_of_a_script(self, script, name):
        model = build_model(f"python:{script}:{name}")
        assert model(torch.zeros(1, 4)).shape == (1, 2)

    def test_a_relative_path_and_a_module_of_the_working_folder(self, script, monkeypatch):
        monkeypatch.chdir(script.parent)
        assert type(build_model("python:net.py:Net")).__name__ == "Net"
        try:
            assert type(build_model("python:net:Net")).__name__ == "Net"
        finally:
            sys.modules.pop("net", None)

    @pytest.mark.parametrize(
        ("spec", "text"),
        [
            ("idap:digits_resne", "idap has no model named 'digits_resne'; did you mean idap:digits_resnet?"),
            ("digits_vit", "Write idap:digits_vit"),
            ("resnet50", "torchvision:resnet50 or timm:resnet50"),
            ("tim:resnet50", "Did you mean timm:resnet50"),
            ("net.py:build", "For your own code write python:net.py:build"),
            ("hub:resnet50", "begins with one of python:, idap:, torchvision:, timm:"),
        ],
    )
    def test_a_wrong_name_gets_the_nearest(self, spec, text):
        with pytest.raises(ConfigError) as caught:
            build_model(spec)
        assert text in str(caught.value)

    @pytest.mark.parametrize(("spec", "module"), [("torchvision:resnet18", "torchvision.models"), ("timm:vit", "timm")])
    def test_a_missing_package_says_how_to_install_it(self, monkeypatch, spec, module):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=r"is missing\. Run: pip install 'idap\[vision\]'"):
            build_model(spec)

    def test_a_package_that_does_not_suit_torch(self, monkeypatch, tmp_path):
        (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "timm", raising=False)
        with pytest.raises(
            ConfigError, match=r"timm is installed but can't be imported: .*nms.*another version of torch"
        ):
            build_model("timm:vit")

    def test_torchvision(self, monkeypatch):
        fake = types.ModuleType("torchvision.models")
        fake.list_models = lambda: ["resnet18", "vgg11"]
        fake.get_model = lambda name: nn.Identity()
        fake.get_model_builder = lambda name: nn.Identity
        monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.models", fake)
        model = build_model("torchvision:resnet18")
        assert example_inputs("torchvision:resnet18", model)[0][0].shape == (1, 3, 224, 224)
        with pytest.raises(ConfigError, match=r"did you mean torchvision:vgg11\?"):
            build_model("torchvision:vgg12")

    @pytest.mark.parametrize(
        "spec", ["torchvision:squeezenet1_1", "torchvision:lraspp_mobilenet_v3_large", "timm:test_vit"]
    )
    def test_the_real_libraries_build_as_many_outputs_as_they_are_told(self, spec):
        model = build_model(spec, classes=3)
        with torch.no_grad():
            outputs = model(torch.zeros(1, 3, 160, 160))
        assert (outputs["out"] if isinstance(outputs, dict) else outputs).shape[1] == 3

    def test_timm_states_its_image_size(self, monkeypatch):
        def create(name, *, pretrained, **counted):
            assert not pretrained
            model = nn.Identity()
            model.pretrained_cfg = {"input_size": (3, 96, 96)}
            return model

        fake = types.ModuleType("timm")
        fake.list_models, fake.create_model = lambda: ["vit_tiny"], create
        fake.list_pretrained = lambda: ["vit_tiny.augreg"]
        monkeypatch.setitem(sys.modules, "timm", fake)
        assert example_inputs("timm:vit_tiny", build_model("timm:vit_tiny.augreg"))[0][0].shape == (1, 3, 96, 96)

    def test_a_script_whose_inputs_are_not_known(self, script):
        spec = f"python:{script}:Net"
        assert example_inputs(spec, build_model(spec)) is None


class TestScripts:
    def test_one_file_runs_once_until_it_changes(self, tmp_path):
        file = tmp_path / "counted.py"
        file.write_text("value = object()\n")
        first = load_object(f"python:{file}:value")
        assert load_object(f"python:{file}:value") is first
        file.write_text("value = 'changed'\n")
        assert load_object(f"python:{file}:value") == "changed"

    def test_nothing_is_left_on_the_path(self, script):
        before = list(sys.path)
        build_model(f"python:{script}:build_model")
        assert sys.path == before

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("build_mode", "there is no 'build_mode' in .*net.py. Did you mean 'build_model'"),
            ("zzzz", "It defines Net, build_model, no_model, fails"),
            ("no_model", "gave int, expected a torch.nn.Module"),
            ("WIDTH", "the model is int, expected a function without arguments"),
            ("fails", r"failed: TypeError: .*\(net.py, line 18: return nn.Linear"),
        ],
    )
    def test_what_a_script_can_get_wrong(self, script, name, text):
        with pytest.raises(ConfigError, match=text):
            build_model(f"python:{script}:{name}")

    @pytest.mark.parametrize(
        ("code", "text"),
        [
            ("x = 1 / 0", r"importing .* failed: ZeroDivisionError: .* \(bad.py, line 1: x = 1 / 0\)"),
            ("def f(:", "failed: SyntaxError"),
            ("import no_such_package", "failed: ModuleNotFoundError: No module named 'no_such_package'"),
            ("import sys; sys.exit(1)", "ends the program when it is imported"),
        ],
    )
    def test_code_that_cannot_be_imported(self, tmp_path, code, text):
        (tmp_path / "bad.py").write_text(code)
        loaded = set(sys.modules)
        with pytest.raises(ConfigError, match=text):
            load_object(f"python:{tmp_path / 'bad.py'}:f")
        assert not [name for name in set(sys.modules) - loaded if name.startswith("idap_script")]

    @pytest.mark.parametrize(
        ("spec", "text"),
        [
            ("python:net.py", "does not say where to look; write python:path/to/file.py:name"),
            ("python:net.py:1x", "does not say where to look"),
            ("python:no_such_module:f", "there is no module 'no_such_module' here"),
            ("python:json.nothing:f", "there is no module 'json.nothing' here"),
            ("python:json:dumpt", "there is no 'dumpt' in json. Did you mean 'dump'"),
        ],
    )
    def test_specs_that_name_nothing(self, spec, text):
        with pytest.raises(ConfigError, match=text):
            load_object(spec)

    def test_a_missing_file_gets_its_neighbour(self, script):
        with pytest.raises(ConfigError, match=r"nets\.py does not exist\. Did you mean .*net\.py\?"):
            load_object(f"python:{script.with_name('nets.py')}:Net")


class TestWeights:
    @pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model."])
    def test_a_round_trip(self, tmp_path, name, prefix):
        source, target = nn.Linear(3, 2), nn.Linear(3, 2)
        state = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
        if name.endswith("pt"):
            torch.save({"epoch": 3, "state_dict": state}, tmp_path / name)
        else:
            save_file(state, tmp_path / name)
        load_weights(target, tmp_path / name)
        assert torch.equal(target.weight, source.weight)
        assert torch.equal(target.bias, source.bias)

    @pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
    def test_wrappers_of_checkpoints(self, tmp_path, key):
        source, target = nn.Linear(3, 2), nn.Linear(3, 2)
        torch.save({key: source.state_dict(), "optimizer": {"lr": 0.1}}, tmp_path / "w.pt")
        load_weights(target, tmp_path / "w.pt")
        assert torch.equal(target.weight, source.weight)

    def test_names_of_the_model_that_look_like_a_wrapper_stay(self, tmp_path):
        source, target = nn.ModuleDict({"model": nn.Linear(3, 2)}), nn.ModuleDict({"model": nn.Linear(3, 2)})
        torch.save(source.state_dict(), tmp_path / "w.pt")
        load_weights(target, tmp_path / "w.pt")
        assert torch.equal(target["model"].weight, source["model"].weight)

    def test_another_number_of_classes_is_named(self, tmp_path):
        torch.save(DigitsResNet(num_classes=1000).state_dict(), tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=r"a model with 1000 classes, and the model has 10: .* = 1000"):
            build_model("idap:digits_resnet", tmp_path / "w.pt")

    def test_tied_tensors_are_stored_once(self, tmp_path):
        source, target = make_tied_net(), make_tied_net()
        state = {key: value for key, value in source.state_dict().items() if key != "1.weight"}
        save_file(state, tmp_path / "w.safetensors")
        load_weights(target, tmp_path / "w.safetensors")
        assert torch.equal(target[1].weight, source[0].weight)

    def test_counters_of_norms_may_be_missing(self, tmp_path):
        state = {k: v for k, v in cifar_resnet20().state_dict().items() if not k.endswith("num_batches_tracked")}
        save_file(state, tmp_path / "w.safetensors")
        build_model("idap:cifar_resnet20", tmp_path / "w.safetensors")

    @pytest.mark.parametrize(
        ("state", "text"),
        [
            ({"weight": (2, 3)}, r"lacks 'bias' of shape \(2,\)"),
            ({"weight": (2, 3), "bias": (2,), "extra": (1,), "more": (1,)}, r"holds 'extra', which .* \(1 more\)"),
            ({"weight": (2, 4), "bias": (2,)}, r"'weight' with shape \(2, 4\), the model's has \(2, 3\)"),
        ],
        ids=["missing", "unexpected", "shape"],
    )
    def test_weights_that_do_not_fit_leave_the_model_alone(self, tmp_path, state, text):
        save_file({name: torch.zeros(shape) for name, shape in state.items()}, tmp_path / "w.safetensors")
        model = nn.Linear(3, 2)
        before = model.weight.clone()
        with pytest.raises(CheckpointError, match=text):
            load_weights(model, tmp_path / "w.safetensors")
        assert torch.equal(model.weight, before)

    @pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
    def test_a_truncated_file(self, tmp_path, name):
        path = tmp_path / name
        if name.endswith("pt"):
            torch.save(nn.Linear(3, 2).state_dict(), path)
        else:
            save_file(nn.Linear(3, 2).state_dict(), path)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(CheckpointError, match="is truncated or no"):
            load_weights(nn.Linear(3, 2), path)

    def test_no_code_is_run_from_a_file(self, tmp_path):
        torch.save(nn.Linear(3, 2), tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=r"holds more than tensors.*runs no code from a file"):
            load_weights(nn.Linear(3, 2), tmp_path / "w.pt")

    def test_a_file_of_something_else(self, tmp_path):
        torch.save({"loss": 3}, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match="holds dict with the keys loss; expected tensors by name"):
            load_weights(nn.Linear(3, 2), tmp_path / "w.pt")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda weight: {"weight": weight.to_sparse()}, "holds 'weight', which is torch.sparse_coo"),
            (lambda weight: {3: weight}, "holds a tensor under 3; expected names"),
        ],
    )
    def test_tensors_that_no_model_takes(self, tmp_path, change, message):
        net = nn.Linear(3, 2)
        torch.save(net.state_dict() | change(net.weight.detach()), tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=message):
            load_weights(net, tmp_path / "w.pt")

    @pytest.mark.parametrize("place", [20, 189, 300])
    def test_a_checkpoint_with_foreign_bytes(self, tmp_path, place):
        path = tmp_path / "w.pt"
        torch.save(nn.Linear(3, 2).state_dict(), path, _use_new_zipfile_serialization=False)
        data = path.read_bytes()
        path.write_bytes(data[:place] + b"\x03\xa9\xed\x89\xfdE" + data[place:])
        with pytest.raises(CheckpointError, match=r"truncated or not a checkpoint|holds more than tensors"):
            load_weights(nn.Linear(3, 2), path)

    def test_a_missing_file_gets_its_neighbour(self, tmp_path):
        (tmp_path / "resnet20.safetensors").touch()
        with pytest.raises(CheckpointError, match=r"do not exist; did you mean .*resnet20\.safetensors\?"):
            load_weights(nn.Linear(3, 2), tmp_path / "resnet2.safetensors")

    @pytest.mark.parametrize(
        ("state", "text"),
        [
            (
                {1: torch.zeros(2, 3), 2: torch.zeros(2)},
                r"w\.pt holds a tensor under 1; expected names, as model\.state_d",
            ),
            (
                {"weight": torch.zeros(2, 3).to_sparse(), "bias": torch.zeros(2)},
                r"holds 'weight', which is torch\.sparse_",
            ),
            (
                {"weight": torch.zeros(2, 3, device="meta"), "bias": torch.zeros(2)},
                "'weight', which is without numbers",
            ),
            (
                {"weight": torch.zeros(2, 3, dtype=torch.cfloat), "bias": torch.zeros(2)},
                "'weight' with complex numbers",
            ),
            (
                {"weight": torch.zeros(2, 3, dtype=torch.int32), "bias": torch.zeros(2)},
                r"'weight' with whole numbers \(torch.int32\), those of the model are torch.float32",
            ),
            ({"weight": [1.0], "bias": torch.zeros(2)}, r"holds dict with the keys weight, bias; expected tensors"),
            ({"state_dict": {(1, 2): torch.zeros(1)}}, r"holds a tensor under \(1, 2\)"),
        ],
        ids=["integers", "sparse", "meta", "complex", "whole", "a list", "tuples"],
    )
    def test_what_are_no_weights_is_said(self, tmp_path, state, text):
        torch.save(state, tmp_path / "w.pt")
        model = nn.Linear(3, 2)
        before = model.weight.clone()
        with pytest.raises(CheckpointError, match=text):
            load_weights(model, tmp_path / "w.pt")
        assert torch.equal(model.weight, before)

    def test_a_broken_checkpoint_is_said_whatever_its_bytes_lead_to(self, tmp_path):
        torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "whole.pt")
        content = (tmp_path / "whole.pt").read_bytes()
        damaged = damages(content, Random(0))
        for _ in range(60):
            what, data = next(damaged)
            (tmp_path / "w.pt").write_bytes(data)
            try:
                load_weights(nn.Linear(3, 2), tmp_path / "w.pt")
            except CheckpointError as error:
                assert "w.pt" in str(error), what

    def test_a_path_that_can_be_no_file(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"the weights n+\.pt can't be read: .*too long"):
            load_weights(nn.Linear(3, 2), "n" * 300 + ".pt")
        (tmp_path / "w.safetensors").mkdir()
        with pytest.raises(CheckpointError, match="do not exist"):
            load_weights(nn.Linear(3, 2), tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match=r"w\.safetensors is broken \(it is not a file\)"):
            notes_in(tmp_path / "w.safetensors")

    def test_what_can_not_be_kept_is_named_before_it_is_trained(self):
        class Net(nn.Linear):
            def __init__(self):
                super().__init__(3, 2)
                self.register_buffer("graph", torch.eye(2).to_sparse())

        with pytest.raises(
            CheckpointError, match=r"'graph' in the model's state is a tensor of torch\.float32 with torch"
        ):
            check_keepable(Net())
        check_keepable(nn.Linear(3, 2))


def test_a_tag_of_timm_that_names_another_place_is_refused():
    pytest.importorskip("timm", reason="timm is not installed; pip install 'idap[vision]'")
    for tag in ("hf-hub:x/y", "nosuch_tag", "local-dir:/tmp"):
        with pytest.raises(ConfigError, match=r"timm has no model named 'resnet18\."):
            build_model(f"timm:resnet18.{tag}")
