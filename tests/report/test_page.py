"""The page of a run as text: it says everything, loads nothing, and never turns data of the run into markup."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from idap.record import RESULT, RunFolder
from idap.report.contents import Block
from idap.report.flow import Section, sections_of
from idap.report.markup import VOID
from idap.report.page import run_page, shell_command
from idap.report.reading import read_run
from idap.report.timeline import stretches
from idap.steps import Curve
from tests.report.runs import HOSTILE, REACHED, decision, settings, steps, write_run


class Page(HTMLParser):
    """Checks that elements are nested well, and collects what a page names and says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def said(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def page_of(folder, **changes) -> Page:
    return Page(run_page(read_run(write_run(folder, **changes))))


def test_it_says_what_was_reached(tmp_path):
    said = page_of(tmp_path / "net").said
    for part in (
        "Net, compressed",
        "✓ Goals reached Every goal was reached.",
        "accuracy ≥ 96.00 % : 96.60 %, budget kept",
        "at most 50 % of the multiply-adds : 48.0 % left",
        "multiply-adds 960 k −52.0 % from 2.00 M",
        "latency, batch of 64 2.50 ms −37.5 % from 4.00 ms",
        "accuracy (test) 96.00 % −0.50 points from 96.50 %",
        "idap compress 'my net.toml'",
        "cd '/home/me/my nets'",
        "20 → 9 neurons (−55 %)",
        "removed whole",
    ):
        assert part in said, part


def test_every_decision_is_in_the_table(tmp_path):
    said = page_of(tmp_path / "net").said
    assert said.count("rolled back") >= 1
    assert "outside the budget; next step 5.0% of the units" in said
    assert "12 neurons, of 2 groups blocks.0.fc: −8, 12 left" in said
    assert "nothing; the last accepted state was trained further" in said
    assert "block blocks.1" in said


def test_a_run_under_way_says_so(tmp_path):
    said = page_of(tmp_path / "net", finished=False, decided=steps()[:2]).said
    assert "… Not finished The run is under way or was stopped: 2 decisions so far, 1 kept." in said
    assert f"idap resume {tmp_path / 'net'}" in said
    by_hand = page_of(tmp_path / "own", finished=False, decided=[], recipe=None).said
    assert f"# with idap.compress(..., run_dir='{tmp_path / 'own'}', resume=True)" in by_hand
    assert "at most 50 % of the multiply-adds : 80.0 % left" in said


def test_a_run_without_any_decision_has_a_page(tmp_path):
    said = page_of(tmp_path / "net", finished=False, decided=[]).said
    assert "0 decisions so far" in said and "There is no decision yet." in said
    assert "Trade-off" not in said


def test_what_was_missed_says_why(tmp_path):
    folder = write_run(tmp_path / "net")
    why = "multiply-adds came down to 60.0%, not to 50.0%: every further step left the accuracy budget"
    RunFolder(folder).keep(RESULT, REACHED | {"reached": False, "message": why, "macs": 1_200_000, "metric": 0.95})
    said = Page(run_page(read_run(folder))).said
    assert f"✗ Goals not reached M{why[1:]}." in said
    assert "95.00 %, budget not kept" in said
    assert "✗ at most 50 % of the multiply-adds : 60.0 % left" in said


def test_nothing_of_a_run_becomes_markup(tmp_path):
    hostile = settings(prefix=HOSTILE)
    hostile |= {
        "model": f"mine.{HOSTILE}",
        "task": {"metric": HOSTILE, "higher_is_better": True, "worst": 0.9},
        "recipe": {"model": {"build": HOSTILE, HOSTILE: HOSTILE}},
        "config": hostile["config"] | {"criterion": HOSTILE, HOSTILE: 3},
        "environment": {key: [HOSTILE] if key == "command" else HOSTILE for key in hostile["environment"]},
        "preparation": {HOSTILE: 1.0},
    }
    text = run_page(read_run(write_run(tmp_path / "net", prefix=HOSTILE, **hostile)))
    page = Page(text)
    assert text.count("<script") == 1 and text.count("<img") == 0
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in "".join(page.words)


def test_it_loads_nothing(tmp_path):
    text = run_page(read_run(write_run(tmp_path / "net")))
    page = Page(text)
    assert all(value.startswith(("#", "data:")) for name in ("href", "src") for value in page.all(name))
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    policy = next(value for value in page.all("content") if "src" in value)
    assert policy.startswith("default-src 'none'; ") and "script-src 'sha256-" in policy and "unsafe-eval" not in policy


def test_every_picture_has_words_and_numbers(tmp_path):
    text = run_page(read_run(write_run(tmp_path / "net")))
    page = Page(text)
    pictures = [value for _, name, value in page.attributes if name == "role" and value == "img"]
    assert len(pictures) == 5
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    for named in page.all("aria-labelledby"):
        assert set(named.split()) <= set(ids)
    assert text.count("<summary>The numbers</summary>") == 5  # both curves of recovery share one


def test_it_says_where_the_average_of_weights_was_kept(tmp_path):
    first, *others = steps()
    assert "97.13 %" not in page_of(tmp_path / "plain").said
    averaged = replace(first, curve=replace(first.curve, average=0.9713))
    assert "97.13 %" in page_of(tmp_path / "net", decided=[averaged, *others]).said


def test_a_long_run_stays_small(tmp_path):
    groups = {f"layer{i // 10}.{i % 10}.conv": {"kind": "channels", "size": 256, "stream": False} for i in range(100)}
    many = [decision(i, 1 - i / 120, 0.97, *((name, 2, 200 - i) for name in groups)) for i in range(60)]
    long = Curve(title="recovery", steps=9000, losses=(0.123456,) * 40, metrics=tuple((i * 100, 0.9) for i in range(8)))
    many = [replace(step, curve=long) for step in many]
    folder = write_run(tmp_path / "net", decided=many, groups=groups, blocks={})
    assert len(run_page(read_run(folder)).encode()) < 500_000


def test_parts_of_the_network_in_their_order():
    def block(*groups, contains=()):
        return Block(kind="block", contains=contains, groups=groups)

    blocks = {"a.x": block("a.1"), "a": block("a.1", "a.2", contains=("a.x",)), "b": block(), "c": block("c.1")}
    assert sections_of(["stem", "a.1", "a.2", "c.1", "head"], blocks) == [
        Section("", ("stem",)),
        Section("a", ("a.1", "a.2")),
        Section("b", ()),
        Section("c", ("c.1",)),
        Section("", ("head",)),
    ]
    assert sections_of([], {"only": block()}) == [Section("only", ())]


def test_the_time_adds_up(tmp_path):
    found = stretches(read_run(write_run(tmp_path / "net")))
    assert [stretch.label for stretch in found] == [
        "start", "filters 0", "filters 1", "filters 2", "layers 3", "final 4", "end",
    ]  # fmt: skip
    assert sum(stretch.length for stretch in found) == pytest.approx(sum(REACHED["seconds"].values()))
    assert found[-1].seconds == pytest.approx({"measurement": 1.0, "judging": 0.4})


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        (["C:/venv/Scripts/idap.exe", "demo"], "idap demo"),
        (["-c"], "python"),
        ([], "python"),
        (["train.py", "--lr", "a b"], "python train.py --lr 'a b'"),
    ],
)
def test_the_command_as_it_was_typed(arguments, typed):
    assert shell_command(arguments) == typed
