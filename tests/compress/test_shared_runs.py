"""Two processes compress a model as one does: the same decisions, the same result."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from idap.compress.run import compress
from idap.errors import RunFolderError
from idap.record import STEPS, read_steps
from idap.saving.checkpoint import load
from idap.training.processes import on_main
from idap.training.recovery import Recovery
from tests.compress.tiny import Noting, config, shuffling_loader, task, train_net
from tests.together import in_two

ROOT = Path(__file__).parents[2]


def settings(**changes):
    recovery = Recovery(epochs=1, lr=0.02, features=0.1)
    return config(**({"max_drop": 0.03, "macs": 0.4, "recovery": recovery, "cost_power": "auto"} | changes))


def outcome(result):
    decided = [(s.stage, s.accepted, [(r.name, r.units) for r in s.removed]) for s in result.steps]
    return decided, result.plan.to_json(), result.metric, dict(result.model.state_dict())


def optimizer_of(net):
    # eps is far above the rounding of a sum in two parts, which AdamW would otherwise turn into whole steps
    return torch.optim.AdamW(net.parameters(), lr=0.02, eps=1e-3)


def runs(folder):
    """Compress in float64, where the rounding of sums in two parts is far below what trainings make of it."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return runs_of(folder)
    finally:
        torch.set_default_dtype(usual)


def runs_of(folder):
    """A run in a folder; one with fewer calibration batches than processes; one that is stopped and goes on."""
    net, heard = train_net(), Noting()
    found = {"whole": outcome(compress(net, task(), settings(), run_dir=f"{folder}/whole", progress=heard))}
    found["heard"] = bool(heard.lines)
    single = task(train=shuffling_loader(256, 1))
    found["one batch"] = outcome(compress(net, single, settings(calibration_batches=1), optimizer=optimizer_of(net)))
    on_main(lambda: stop_after(2, Path(folder)))
    found["resumed"] = outcome(compress(net, task(), settings(), run_dir=f"{folder}/stopped", resume=True))
    try:
        compress(net, task(), settings(), run_dir=f"{folder}/whole")
    except RunFolderError as error:
        found["refused"] = str(error)
    return found


def stop_after(decisions, folder):
    """Make of a whole run one that was stopped."""
    shutil.copytree(folder / "whole", folder / "stopped")
    steps = (folder / "stopped" / STEPS).read_text().splitlines(keepends=True)
    assert len(steps) > decisions
    (folder / "stopped" / STEPS).write_text("".join(steps[:decisions]))
    shutil.rmtree(folder / "stopped" / "model")


@pytest.mark.slow
def test_two_processes_decide_as_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone = runs(str(tmp_path / "one"))
    first, second = in_two(runs, tmp_path / "two", str(tmp_path / "two"))
    for found in (first, second):
        for name in ("whole", "one batch", "resumed"):
            decided, plan, metric, state = found[name]
            assert decided == alone[name][0]
            assert plan == alone[name][1]
            assert metric == pytest.approx(alone[name][2], abs=1e-6)
            assert_close(state, alone[name][3], rtol=1e-6, atol=1e-9)
            assert_close(state, first[name][3], rtol=0, atol=0)
        assert "already holds a run" in found["refused"]
    assert (first["heard"], second["heard"]) == (True, False)
    folder = tmp_path / "two" / "whole"
    assert [step["accepted"] for step in read_steps(folder)] == [accepted for _, accepted, _ in first["whole"][0]]
    assert_close(load(folder / "model", train_net().double()).state_dict(), first["whole"][3], rtol=0, atol=0)
    assert json.loads((folder / "run.json").read_text())["environment"]["processes"] == 2


RECIPE = """
[model]
build = "idap:digits_resnet"
[data]
name = "digits"
[train]
steps = 40
lr = 0.05
[goals]
max_drop = 0.9
macs = 0.8
[filters]
steps = 2
first_share = 0.1
[layers]
removals = 0
[recovery]
steps = 4
[compress]
calibration_batches = 2
"""
ANY_TORCHVISION = "from tests.conformance.vision_operators import make_importable; make_importable()"


def launch(folder, *options):
    """Without a GPU, this kind of launch makes processes that meet on the CPU."""
    command = [
        *[
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
        ],
        *[
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
            "-m",
            "idap",
            "compress",
            "recipe.toml",
            "--run-dir",
            "run",
        ],
    ]
    paths = [str(folder), str(ROOT / "src"), str(ROOT), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command, *options],
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
def test_a_launcher_runs_the_command_in_two_processes(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    if importlib.util.find_spec("torchvision") is not None:
        (tmp_path / "sitecustomize.py").write_text(ANY_TORCHVISION)
    ran = launch(tmp_path, "--json")
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["reached"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["environment"]["processes"] == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    again = launch(tmp_path, "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("(recalled)") == len(document["steps"])
