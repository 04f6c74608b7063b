"""A short run of the fuzzer, and proof that it finds what it looks for. The long run is `make fuzz`."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import structural
from tests.fuzz.cases import KINDS, SELF
from tests.fuzz.known import cause_of
from tests.fuzz.misbehaving import CASES
from tests.fuzz.pool import run_cases, run_one
from tests.fuzz.watch import foreign_code

SHORT = 100
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(data=PLAIN)
def test_plain_data_is_written_as_json(data: object) -> None:
    assert json.loads(structural.json_text(data)) == data


@given(data=PLAIN, seed=st.integers(0, 10**6))
def test_the_same_dice_change_the_same(data: object, seed: int) -> None:
    text = json.dumps(data)
    first, second = (structural.mutate(json.loads(text), random.Random(seed)) for _ in range(2))
    assert structural.json_text(first[0]) == structural.json_text(second[0]) and first[1] == second[1]


@given(content=st.binary(max_size=40), other=st.binary(min_size=1, max_size=40), seed=st.integers(0, 10**6))
def test_bytes_are_changed_alike_too(content: bytes, other: bytes, seed: int) -> None:
    first, second = (structural.mutate_bytes(content, random.Random(seed), other) for _ in range(2))
    assert first == second and isinstance(first[0], bytes)


@pytest.mark.parametrize(
    "line", ["import os", "open('x')", "return [v for v in v0]", "return (lambda: 1)()", "global x", "v1 = v0.__dict__"]
)
def test_foreign_code_is_seen(line: str) -> None:
    assert foreign_code(f"def body(self, v0):\n    {line}").startswith("executed: generated source")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_broken_promise_is_found_and_is_that_of_its_case() -> None:
    report = run_cases([SELF], range(len(CASES)), 0)
    found = {failure.number: failure for failure in report.failures}
    assert report.cases[SELF] == len(CASES)
    for number, (action, expected) in enumerate(CASES):
        assert (number in found) == bool(expected), action.__name__
        if expected:
            assert found[number].what.startswith(expected), found[number]
            assert found[number].about == action.__name__


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_a_short_run(kind: str) -> None:
    report = run_cases([kind], range(SHORT), 0, processes=1)
    assert report.cases[kind] == SHORT
    assert sum(count for name, count in report.outcomes[kind].items() if name != "refused") > SHORT // 10
    assert [failure for failure in report.failures if not cause_of(f"{failure.signature} {failure.what}")] == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_case_is_the_same_when_it_is_run_alone(tmp_path: Path) -> None:
    report, again = run_one("indices", 7, 0, tmp_path), run_one("indices", 7, 0)
    assert report.outcomes == again.outcomes and sum(report.cases.values()) == 1
    assert any(tmp_path.iterdir())
