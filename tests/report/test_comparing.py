"""Several runs side by side: the table, the page, and runs that can't be compared."""

import pytest

from idap.errors import ConfigError
from idap.report.comparing import compare_page, comparison_data, names, obstacles, rows, setting_differences
from idap.report.reading import read_run
from tests.report.runs import HOSTILE, settings, steps, write_run
from tests.report.test_page import Page


def runs_of(tmp_path, *changes):
    return [read_run(write_run(tmp_path / f"net-{place}", **change)) for place, change in enumerate(changes)]


def test_two_runs_of_one_model(tmp_path):
    config = settings()["config"] | {"macs": 0.4}
    runs = runs_of(tmp_path, {}, {"config": config, "finished": False, "decided": steps()[:3]})
    assert obstacles(runs) == []
    table = {row[0]: row[1:] for row in rows(runs)[1:]}
    assert table["multiply-adds"] == ["960\xa0k (−52.0\xa0%)", "1.40\xa0M (−30.0\xa0%)"]
    assert table["latency, batch of 64"][1] == "not measured"
    assert table["decisions kept"] == ["4 of 5", "2 of 3"]
    assert rows(runs)[0] == ["", "net-0", "net-1"]
    assert setting_differences(runs) == [["macs", "0.5", "0.4"]]
    said = comparison_data(runs)
    assert said["comparable"] and said["runs"][1]["reached"] is None and said["settings"] == {"macs": ["0.5", "0.4"]}


def test_a_setting_is_the_same_whether_a_recipe_says_it_or_leaves_it_out(tmp_path):
    recipe = settings()["recipe"]
    said = {**recipe, "recovery": {"lr": 0.02}, "goals": {"macs": "50%"}, "output": {"run_dir": "elsewhere"}}
    longer = {**recipe, "train": {"epochs": 3}}
    assert setting_differences(runs_of(tmp_path, {}, {"recipe": said})) == []
    assert setting_differences(runs_of(tmp_path / "longer", {}, {"recipe": longer})) == [["train.epochs", "", "3"]]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": "other.Net", "fingerprint": "0"}, r"compress different models: mine\.Net and other\.Net"),
        ({"fingerprint": "0"}, r"compress different models of another size: mine\.Net and mine\.Net"),
        (
            {"recipe": {"data": {"name": "cifar10"}}},
            r"on different data: data\.name is 'digits' and 'cifar10'",
        ),
        (
            {"recipe": {"data": {"name": "digits", "size": None}}},
            r"on different data: data\.size is not set and None",
        ),
        ({"recipe": None}, "evaluated on different data: one of them has no recipe, so its data are unknown"),
        (
            {"task": {"metric": "f1", "higher_is_better": True, "worst": None}},
            "have different metrics: accuracy and f1",
        ),
        (
            {"baseline": {"metric": 0.98, "macs": 2_000_000, "parameters": 40_000, "size": 161_000}},
            r"start from different originals: their accuracy is 97\.00.% and 98\.00.%, so the weights",
        ),
        (
            {"environment": settings()["environment"] | {"threads": 8}},
            "were timed on different machines or threads",
        ),
    ],
)
def test_what_can_not_be_compared(tmp_path, change, why):
    runs = runs_of(tmp_path, {}, change)
    found = obstacles(runs)
    assert len(found) == 1
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(found[0])
    assert "Not comparable:" in Page(compare_page(runs)).said
    assert not comparison_data(runs)["comparable"]


def test_the_page_overlays_the_runs(tmp_path):
    text = compare_page(runs_of(tmp_path, {}, {}, {}, {}))
    page = Page(text)
    for place in range(4):
        assert text.count(f"line run-{place}") == 2
    assert len(page.all("id")) == len(set(page.all("id")))
    assert "The runs have the same settings." in page.said


def test_other_groups_are_not_drawn_in_one_chart(tmp_path):
    runs = runs_of(tmp_path, {}, {"prefix": "net.", "fingerprint": "0"})
    assert "one chart can't show their divergence" in Page(compare_page(runs)).said


def test_nothing_of_a_run_becomes_markup(tmp_path):
    text = compare_page(runs_of(tmp_path, {"prefix": HOSTILE}, {"prefix": HOSTILE, "model": HOSTILE}))
    assert text.count("<script") == 1 and "<img" not in text


def test_names_tell_the_runs_apart(tmp_path):
    folders = [tmp_path / "a" / "net", tmp_path / "b" / "net", tmp_path / "other"]
    runs = [read_run(write_run(folder)) for folder in folders]
    assert names(runs[:1]) == ["net"]
    assert names(runs[:2]) == ["a/net", "b/net"]
    assert names([runs[0], runs[0]]) == ["net (1)", "net (2)"]


@pytest.mark.parametrize("count", [1, 5])
def test_too_few_and_too_many(tmp_path, count):
    with pytest.raises(ConfigError, match=f"a comparison needs 2 to 4 run folders, got {count}"):
        compare_page(runs_of(tmp_path, *({} for _ in range(count))))
