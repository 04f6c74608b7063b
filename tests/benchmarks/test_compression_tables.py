"""Tables are written from as many rows as there are, and go between their marks."""

import pytest

from benchmarks.ablation import QUESTIONS
from benchmarks.bench import stages
from benchmarks.compression_tables import ablation, contest, equal_latency, kinds, mean, phases, saving
from benchmarks.equal_latency import at
from benchmarks.report import put
from idap.steps import Removal, Step

SPEED = {
    batch: {"ratio": 9.0, "processor_ratio": 2.0, "processor": {"original": 4.0, "compressed": 2.0}}
    for batch in ("1", "64")
}


def row(**changed):
    times = {"seconds": 70.0, "processor_s": 12.0, "peak_gib": 1.5}
    base = {"macs_ratio": 2.0, "parameters_ratio": 3.0, "before": 80.0, "after": 90.0, "latency_ms": SPEED}
    return (
        base
        | {"compression": times, "recovery": times, "stages": {}, "protocol": "cpu", "macs": 50, "parameters": 10}
        | changed
    )


def original(network):
    return {"network": network, "target": "original", "method": "original", "accuracy": 93.39}


class TestContest:
    def test_each_network_and_cost_has_a_table(self):
        rows = [original("a"), row(network="a", target="1/3", method="x"), row(network="a", target="1/2", method="x")]
        found = "\n".join(contest([*rows, original("b")]))
        assert found.count("#### a") == 2
        assert "#### b" not in found
        assert "| x | 1 | 2.00x fewer | 3.00x fewer | 80.00 | **90.00** | 2.00 / 2.00 | 12 | 12 | 1.50 |" in found

    def test_seeds_of_a_method_share_a_line(self):
        rows = [row(network="a", target="1/3", method="x", after=after) for after in (88.0, 90.0)]
        found = [line for line in contest([original("a"), *rows]) if line.startswith("| x")]
        assert len(found) == 1
        assert found[0].startswith("| x | 2 |")
        assert "**89.00 ± 1.41**" in found[0]

    def test_protocols_have_tables_of_their_own_and_the_best_method_comes_first(self):
        same = {"network": "a", "target": "1/3"}
        rows = [
            row(**same, method="x", after=80.0),
            row(**same, method="y"),
            row(**same, method="z", protocol="cpu, old"),
        ]
        found = contest([original("a"), *rows])
        assert [line[:3] for line in found if line[:2] == "| " and line[2] in "xyz"] == ["| y", "| x", "| z"]
        assert [line for line in found if line.startswith("####")][1].endswith(", old")

    def test_a_gpu_is_judged_by_the_clock_on_the_wall(self):
        times = {batch: {"ratio": 9.0} for batch in ("1", "64")}
        rows = [original("a"), row(network="a", target="1/3", method="x", protocol="gpu", latency_ms=times)]
        assert "| 9.00 / 9.00 | 70 | 70 |" in "\n".join(contest(rows))

    def test_nothing_measured_is_nothing_written(self):
        assert contest([original("a")]) == []


def test_the_mean_of_one_has_no_deviation():
    assert mean([{"x": 1.0}], lambda row: row["x"]) == "1.00"
    assert mean([{"x": 1.0}, {"x": 3.0}], lambda row: row["x"], 1) == "2.0 ± 1.4"


def test_settings_stand_below_their_question_whenever_measured():
    keys = [("defaults", "defaults"), ("order", "one"), ("growth", "two"), ("order", "three")]
    found = ablation([row(question=question, setting=setting) for question, setting in keys])
    assert [line.split(" | ")[1] for line in found[2:]] == ["defaults", "one", "three", "two"]


def test_a_network_tells_what_each_stage_took():
    taken = {"filters": {"units": {"channels": 5}, "parts": []}, "layers": {"units": {}, "parts": ["layer2.1"]}}
    whole = {"accuracy": 99.0, "macs": 100, "parameters": 20}
    found = kinds([row(network="a", original=whole, stages=taken), row(network="b", original=whole)])
    assert "100 → 50" in found[2]
    assert found[2].endswith("| 5 channels | `layer2.1` |")
    assert found[3].endswith("| none | none |")


def test_only_accepted_steps_count():
    def step(stage, removed, *, accepted=True):
        numbers = {"macs": 1, "parameters": 1, "metric": 0.9, "reason": "", "error": 0.0, "seconds": 1.0}
        return Step(index=0, stage=stage, removed=(removed,), accepted=accepted, **numbers)

    units = Removal(name="conv", kind="channels", units=(1, 4), left=6, divergence=(0.1, 0.2))
    block = Removal(name="layer1.1", kind="block", units=(), left=0, divergence=(0.3, 0.3))
    steps = [
        step("filters", units),
        step("layers", block, accepted=False),
        step("layers", block),
        step("filters", units),
    ]
    assert stages(steps) == {
        "filters": {"steps": 2, "units": {"channels": 4}, "parts": []},
        "layers": {"steps": 1, "units": {}, "parts": ["layer1.1"]},
    }


def test_kinds_of_work_are_shares_of_the_whole():
    rows = [
        {"images": 0, "seconds": {"cut": 1.0, "rebalance": 3.0}, "own_share": 0.25},
        {"images": 5000, "seconds": {"recovery": 6.0, "cut": 2.0}, "own_share": 0.25},
    ]
    titles, _, first, second, *_ = phases(rows)
    assert titles == "| recovery after each change | seconds | cut | rebalance | recovery | work of our own |"
    assert first == "| none | 4 | 25.0 % | 75.0 % | 0.0 % | **25.0 %** |"
    assert second == "| 5,000 images | 8 | 25.0 % | 0.0 % | 75.0 % | **25.0 %** |"


class TestPut:
    def test_what_is_around_the_marks_stays(self):
        page = put("above\n<begin>\nold\n<end>\nbelow\n", "<begin>", "<end>", ["new"])
        assert page == "above\n<begin>\n\nnew\n\n<end>\nbelow\n"
        assert put(page, "<begin>", "<end>", ["new"]) == page

    def test_a_page_without_marks_is_named(self):
        with pytest.raises(LookupError, match="<begin>"):
            put("nothing", "<begin>", "<end>", [])


def test_no_setting_is_measured_under_two_names():
    settings = [(question, setting) for question, variants in QUESTIONS.items() for setting in variants]
    variants = [repr(variant) for each in QUESTIONS.values() for variant in each.values()]
    assert len(set(settings)) == len(settings)
    twice = {variant for variant in variants if variants.count(variant) > 1}
    assert not twice


def test_what_is_kept_at_one_latency():
    row = {"network": "a", "batch": 16, "share": 0.6, "measure": "accuracy", "original": 93.0}
    row |= {"kept": {"macs": 90.0, "table": 91.234}}
    norms = {"macs": 0.51234, "table": 0.5, "steps": 0.52}
    worse = {"macs": 0.6, "table": 0.5, "steps": 0.52}
    found = equal_latency(
        [row, *({**row, "measure": "share of the norms", "original": 1.0, "kept": kept} for kept in (norms, worse))]
    )
    assert found[0] == "| network | batch | latency | kept is | original | macs | table | steps |"
    assert found[2] == "| a | 16 | 0.6 | accuracy | 93.00 | 90.00 | 91.23 |  |"
    assert found[3] == "| a | 16 | 0.6 | share of the norms | 1.0000 | 0.5123 | 0.5000 | 0.5200 |"
    assert found[-2] == "A way with the latency table keeps more in 2 of 3 rows."


def test_lines_of_different_ways_are_parallel():
    lines = {"macs": [[0.5, 50.0], [0.6, 60.0]], "table": [[0.55, 60.0], [0.65, 70.0]]}
    assert at(lines, 0.7) == pytest.approx({"macs": 70.0, "table": 75.0})
    lines["table"] = [[0.6, 66.0]]  # a single cut takes its slope from the others
    assert at(lines, 0.5) == pytest.approx({"macs": 50.0, "table": 56.0})


def test_seconds_of_saving():
    names = ("megabytes", "save_s", "load_s", "save_and_load_s", "load_meta_s", "build_s")
    found = saving([{"network": "a"} | {name: place for place, name in enumerate(names)}])
    assert found[2] == "| a | 0 | 1 | 2 | 3 | 4 | 5 |"
