"""Run folders that were damaged: every command gives what is left, or an error that names the file and the way out."""

import json
import os
import re
import shutil
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from idap.cli.commands.report import _document
from idap.cli.failure import state_of
from idap.compress.run import compress
from idap.errors import IdapError, RunFolderError
from idap.recipes.runs import model_folder, recipe_of_run
from idap.record import AFTER, BEFORE, MEASURED, RESULT, RUN, STEPS
from idap.report.comparing import check_runs, compare_page, comparison_data
from idap.report.page import run_page
from idap.report.reading import read_run
from idap.saving.checkpoint import load
from idap.steps import CHECKSUM, seal_line
from idap.training.recovery import Recovery
from tests.compress.tiny import config, task, train_net
from tests.fuzz.mutations import damages, misplacements, mutations
from tests.report.runs import MEASUREMENT

NET = train_net()
RECIPE = {"model": {"build": "idap:digits_resnet"}, "data": {"name": "digits"}, "goals": {"macs": 0.7}}
CASES = 200
RESUMED = 16
"""Of so many damaged runs one is gone on with, which takes longest."""


def begin_run(folder, *, resume=False):
    settings = config(max_drop=0.03, macs=0.4, recovery=Recovery(steps=4, lr=0.02))
    return compress(NET, task(), settings, run_dir=folder, resume=resume, recipe=RECIPE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that is finished, and one that was stopped."""
    root = tmp_path_factory.mktemp("runs")
    begin_run(root / "whole")
    (root / "whole" / MEASURED).write_text(json.dumps(MEASUREMENT))
    shutil.copytree(root / "whole", root / "part")
    lines = (root / "part" / STEPS).read_text().splitlines(keepends=True)
    assert len(lines) > 2
    (root / "part" / STEPS).write_text("".join(lines[:-1]))
    for name in (RESULT, AFTER, MEASURED):
        (root / "part" / name).unlink()
    shutil.rmtree(root / "part" / "model")
    return root


def damage(file: Path, rng: Random) -> str:
    """Damage one file of a run, and say how."""
    kind = rng.random()
    if kind < 0.6 and file.suffix in (".json", ".jsonl"):
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        place = rng.randrange(len(lines))
        ((what, lines[place]),) = islice(mutations(json.loads(lines[place]), rng), 1)
        file.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))
        return what
    if kind < 0.9:
        ((what, content),) = islice(damages(file.read_bytes(), rng), 1)
        file.write_bytes(content)
        return what
    ((what, put),) = islice(misplacements(rng), 1)
    put(file)
    return what


def report(run, _):
    found = read_run(run)
    run_page(found).encode()
    json.dumps(_document(found, [])).encode()


def compare(run, whole):
    found = [read_run(run), whole]
    check_runs(found)
    compare_page(found).encode()
    json.dumps(comparison_data(found)).encode()


def evaluate(run, _):
    recipe_of_run(run)
    load(model_folder(run), NET)


def resume(run, _):
    begin_run(run, resume=True)


def test_no_damage_ends_in_a_raw_error(runs, tmp_path):
    rng, refused, whole = Random(0), 0, read_run(runs / "whole")
    for number in range(CASES):
        run = tmp_path / "run"
        shutil.copytree(runs / rng.choice(["whole", "part"]), run)
        files = sorted(each for each in run.rglob("*") if each.is_file() and each.suffix != ".md")
        top = [each for each in files if each.parent == run]
        file = rng.choice(top if rng.random() < 0.8 else files)
        what = damage(file, rng)
        for command in (report, compare, evaluate, *([resume] if number % RESUMED == 0 else [])):
            try:
                command(run, whole)
            except IdapError as error:
                refused += 1
                assert str(run) in str(error) or "plan" in str(error), (what, error)  # it says where
            except Exception as error:
                pytest.fail(f"case {number}, {command.__name__} of {file.relative_to(run)}, {what}: {error!r}")
        state_of(run).encode()
        shutil.rmtree(run)
    assert refused > CASES / 2  # most damage is seen


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (
            STEPS,
            ("stage", None),
            r"line 1 of .*steps\.jsonl is not what .*: stage: .*Delete the line and all after it",
        ),
        (STEPS, ("index", 7), r"line 1 of .*: it has the index 7, expected 0; .*Delete the line and all after it"),
        (STEPS, ("seconds", -1.0), r"line 1 of .*: seconds must be 0 or more; "),
        (STEPS, ("shares", {}), r"line 1 of .*: it does not say which share of the macs is left; "),
        (STEPS, ("accepted", "yes"), r"line 1 of .*: accepted: Input should be a valid boolean"),
        (STEPS, ("metric", float("nan")), r"line 1 of .*steps\.jsonl is broken: NaN is not valid JSON\. Delete"),
        (STEPS, ("reason", "\ud800"), r"line 1 of .*steps\.jsonl is broken: it holds \\ud800, half of a"),
        (RUN, ("model", 3), r"run\.json is not what .*: model: .* Begin the run again in another folder\."),
        (RUN, ("baseline", {"metric": 0.9}), r"run\.json is not what .*: baseline\.macs: Field required"),
        (RUN, ("groups", {}), r"(blocks\.0|blocks\.0.*): there is no group 'blocks\.0\.fc1'"),
        (RUN, ("environment", {"command": "idap"}), r"environment\.command: expected a list of words, found 'idap'"),
        (RESULT, ("latency", -1), r"result\.json is not what .*: latency: .* Delete it to have it measured again"),
        (BEFORE, ("units", []), r"divergence-before\.json is not what .*Delete the file; the report then lacks this"),
        (
            MEASURED,
            ("batch", 2**70),
            r"measured\.json can't be read: the whole number 118059162071\.\.\. has 22 digits",
        ),
    ],
)
def test_each_file_is_named_with_what_is_wrong_and_the_way_out(runs, tmp_path, name, change, expected):
    run = tmp_path / "run"
    shutil.copytree(runs / "whole", run)
    lines = (run / name).read_text().splitlines(keepends=True) if name == STEPS else [(run / name).read_text()]
    data = json.loads(lines[0])
    key, value = change
    if value is None:
        del data[key]
    else:
        data[key] = value
    (run / name).write_text("".join([json.dumps(data) + "\n", *lines[1:]]))
    with pytest.raises(RunFolderError, match=expected) as refused:
        read_run(run)
    assert re.search(r"[.!] ?$", str(refused.value))
    if name in (STEPS, RUN):
        with pytest.raises(RunFolderError):
            begin_run(run, resume=True)


@pytest.mark.parametrize("name", [RUN, STEPS, RESULT, ".idap-holder.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(runs, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(runs / "whole", run)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    if name in (RUN, STEPS, RESULT):
        for command in (partial(begin_run, run, resume=True), partial(read_run, run)):
            with pytest.raises(RunFolderError, match="can't be read: it is not a file"):
                command()
    else:
        assert begin_run(run, resume=True).steps


def test_a_decision_that_takes_what_is_not_there(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "part", run)
    first, second, *rest = (run / STEPS).read_text().splitlines()
    removed = json.loads(first)["removed"]
    unsealed = {key: value for key, value in json.loads(second).items() if key != CHECKSUM}
    (run / STEPS).write_text("\n".join([first, json.dumps(seal_line(unsealed | {"removed": removed})), *rest]) + "\n")
    with pytest.raises(RunFolderError, match=r"line 2 of .*steps\.jsonl is a decision that does not fit the run: "):
        begin_run(run, resume=True)


def test_a_decision_that_was_changed_into_another_one_is_noticed(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "part", run)
    first, *rest = (run / STEPS).read_text().splitlines()
    line = json.loads(first)
    for key, value in (("turn", line["turn"] + 1), ("metric", line["metric"] + 0.001), (CHECKSUM, "0" * 16)):
        (run / STEPS).write_text("\n".join([json.dumps(line | {key: value}), *rest]) + "\n")
        for read in (lambda: begin_run(run, resume=True), lambda: read_run(run)):
            with pytest.raises(RunFolderError, match=r"line 1 of .*steps\.jsonl .*: its checksum does not match"):
                read()


def test_an_accepted_state_whose_plan_was_changed(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "part", run)
    plan = next((run / "checkpoints").iterdir()) / "plan.json"
    data = json.loads(plan.read_text())
    data["plan"]["keep"] = 3
    plan.write_text(json.dumps(data))
    with pytest.raises(RunFolderError, match=r"the accepted state .*step-\d+ does not fit the run: .*Delete its line"):
        begin_run(run, resume=True)
