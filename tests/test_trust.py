"""Which run folders were made here: what is noted, what can be forged, and what happens without a key."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from idap import ownership
from idap.ownership import foreign_signs, key_file, printable, seal_place

RECIPE = {"model": {"build": "python:/home/me/net.py:build"}, "goals": {"macs": 0.5, "steps": (1, 2)}}


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def settings(run: Path, recipe=RECIPE):
    """What a run notes, as it is read back."""
    place, why = seal_place(run, recipe)
    assert why == ""
    return json.loads(json.dumps({"environment": place, "recipe": recipe}))


def signs(run, noted, *, folder_matters=False):
    return foreign_signs(run, noted, folder_matters=folder_matters)


def test_a_run_that_was_made_here(tmp_path, monkeypatch):
    noted = settings(tmp_path / "run")
    assert signs(tmp_path / "run", noted) == [] == signs(tmp_path / "run", noted, folder_matters=True)
    monkeypatch.chdir(tmp_path)
    assert signs(Path("run"), noted) == []  # however it is written
    assert signs(Path("run"), noted, folder_matters=True) == [
        f"it was begun in the working folder {noted['environment']['folder']}, and this is {tmp_path}"
    ]


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        ("user", "it was made by user elsewhere, and you are "),
        ("host", "it was made on the machine elsewhere, and this is "),
        ("run_dir", "it was made in elsewhere, and is now "),
    ],
)
def test_what_differs_is_said(fact, expected, tmp_path):
    noted = settings(tmp_path / "run")
    noted["environment"][fact] = "elsewhere"
    (found,) = signs(tmp_path / "run", noted)
    assert found.startswith(expected)


def test_a_folder_that_was_moved(tmp_path):
    noted = settings(tmp_path / "run")
    assert signs(tmp_path / "other", noted) == [f"it was made in {tmp_path / 'run'}, and is now {tmp_path / 'other'}"]


@pytest.mark.parametrize("environment", [None, [], {}, {"user": 3}, {"seal": "0" * 64}])
def test_a_run_that_does_not_say_where_it_was_made(environment, tmp_path):
    noted = settings(tmp_path) | {"environment": environment}
    assert signs(tmp_path, noted) == ["it does not say where it was made"]


@pytest.mark.parametrize("seal", [None, "", "0" * 64, 3, "é", ["x"]])
def test_a_stranger_who_guesses_everything_but_the_key(seal, tmp_path):
    noted = settings(tmp_path)
    noted["environment"]["seal"] = seal
    assert signs(tmp_path, noted) == [
        "it says that it was made here, but its seal does not fit: its recipe was changed, or all of it is forged"
    ]


def test_a_recipe_that_was_changed(tmp_path):
    noted = settings(tmp_path)
    noted["recipe"]["model"]["build"] = "python:/home/me/run/evil.py:build"
    assert "its seal does not fit" in signs(tmp_path, noted)[0]


def test_the_seal_of_another_run_does_not_fit(tmp_path):
    one, other = settings(tmp_path / "one"), settings(tmp_path / "other")
    other["environment"]["seal"] = one["environment"]["seal"]
    assert "its seal does not fit" in signs(tmp_path / "other", other)[0]


def test_the_seal_of_another_key_does_not_fit(tmp_path, state):
    noted = settings(tmp_path)
    (state / "idap" / "key").unlink()
    assert signs(tmp_path, noted) == [f"whether it was made here can't be told: there is no key {key_file()} here"]
    settings(tmp_path / "another run")  # makes another key
    assert "its seal does not fit" in signs(tmp_path, noted)[0]


def test_a_run_without_a_recipe_needs_no_key(tmp_path, state):
    place, why = seal_place(tmp_path, None)
    assert place["seal"] is None and why == "" and not state.exists()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="rights of files are for Unix")
def test_only_the_user_can_read_the_key(tmp_path, state):
    noted = settings(tmp_path)
    key = state / "idap" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert [file.name for file in key.parent.iterdir()] == ["key"]
    key.chmod(0o640)
    assert "is not private: " in signs(tmp_path, noted)[0]
    assert "is not private: " in seal_place(tmp_path, RECIPE)[1]
    key.chmod(0o600)
    key.rename(tmp_path / "known")
    key.symlink_to(tmp_path / "known")
    assert "is not a key of idap; delete it" in signs(tmp_path, noted)[0]


def test_a_folder_that_cannot_hold_a_key(tmp_path, state):
    state.write_text("a file")
    place, why = seal_place(tmp_path, RECIPE)
    assert place["seal"] is None and "can't be used" in why
    assert "can't be told" in signs(tmp_path, {"environment": place, "recipe": RECIPE})[0]


def test_a_user_without_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # means nothing

    def find_no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(ownership.Path, "home", find_no_home)
    why = seal_place(tmp_path, RECIPE)[1]
    assert why == "you have no home folder for a key; set XDG_STATE_HOME to a folder of your own"


def test_a_user_without_a_name(tmp_path, monkeypatch):
    def find_no_name():
        raise KeyError("uid not found")

    monkeypatch.setattr(ownership.getpass, "getuser", find_no_name)
    assert signs(tmp_path, settings(tmp_path)) == []


def test_a_file_system_without_links(tmp_path, state, monkeypatch):
    def refuse_link(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(ownership.os, "link", refuse_link)
    assert signs(tmp_path, settings(tmp_path)) == []
    assert [file.name for file in (state / "idap").iterdir()] == ["key"]


def test_processes_that_begin_at_once_make_one_key(tmp_path):
    code = "import sys; from pathlib import Path; from idap.ownership import seal_place; "
    code += "sys.stdin.readline(); print(seal_place(Path('/run'), {})[0]['seal'])"
    start = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(4)
    ]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    seals = {process.communicate()[0].strip() for process in processes}
    assert len(seals) == 1 and len(seals.pop()) == 64


def test_what_strangers_write_does_nothing_to_a_terminal():
    assert printable("\x1b[2J\r\n\u202eevil") == r"\x1b[2J\r\n\u202eevil"
    assert len(printable("x" * 10_000)) == 203
