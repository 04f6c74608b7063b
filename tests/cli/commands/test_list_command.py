"""`idap list`: for people, for grep, for machines."""

import json

import pytest

from tests.cli.commands.test_commands import idap, plain_terminal, text  # noqa: F401 - a fixture


def test_what_can_be_listed():
    result = idap("list")
    assert result.exit_code == 0
    for kind in ("models", "data", "criteria", "recipes"):
        assert kind in result.stdout
    assert idap("list", "-q").stdout.split() == ["models", "data", "criteria", "recipes"]
    found = {each["name"]: each["count"] for each in json.loads(idap("list", "--json").stdout)}
    assert found["models"] >= 4 and found["criteria"] == 13


def test_models_by_words():
    result = idap("list", "models", "idap", "VIT")
    assert result.stdout.split(maxsplit=1)[0] == "idap:digits_vit"
    assert len(result.stdout.strip().splitlines()) == 1
    assert idap("list", "models", "idap:digits", "--quiet").stdout.split() == ["idap:digits_resnet", "idap:digits_vit"]
    found = json.loads(idap("list", "models", "idap:digits", "--json").stdout)
    assert [each["name"] for each in found] == ["idap:digits_resnet", "idap:digits_vit"]
    assert all(each["about"] for each in found)


def test_nothing_found():
    result = idap("list", "data", "zzzz")
    assert (result.exit_code, text(result.stdout)) == (0, "No data with these words. ")
    assert json.loads(idap("list", "data", "zzzz", "--json").stdout) == []
    assert idap("list", "data", "zzzz", "-q").stdout == ""


@pytest.mark.parametrize("kind", ["data", "criteria", "recipes"])
def test_every_kind_in_lines_that_are_never_broken(kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    found = json.loads(idap("list", kind, "--json").stdout)
    lines = idap("list", kind).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [each["name"] for each in found]


def test_a_wrong_kind():
    result = idap("list", "modles")
    assert result.exit_code == 2 and "did you mean models?" in text(result.stderr)


def test_verbose_says_how_long_on_the_standard_error():
    result = idap("list", "data", "-v")
    assert "idap list: 0." in result.stderr and "Python 3." in result.stderr
    assert result.stdout == idap("list", "data").stdout
