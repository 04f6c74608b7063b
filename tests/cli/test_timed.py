"""The seconds of phases, in their order, with those inside others indented."""

import pytest

from idap.cli.progress import Timed
from idap.progress import Silent


class Heard(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)

    def show(self, status):
        self.lines.append(status)


def test_phases_inside_each_other():
    told, heard = [], Heard()
    timed = Timed(heard, told.append, iter([0.0, 1.0, 1.5, 4.0]).__next__)
    with timed.phase("compress", None) as outer, timed.phase("train", 3) as inner:
        outer.advance()
        inner.advance()
    timed.say("a decision")
    timed.show("where it stands")
    assert told == ["  train: 0.50 s", "compress: 4.00 s"]
    assert heard.lines == ["a decision", "where it stands"]


def test_a_phase_that_fails_has_no_time():
    told = []
    timed = Timed(Silent(), told.append)
    with pytest.raises(ValueError, match="boo"), timed.phase("train", 1):
        raise ValueError("boo")
    with timed.phase("next", 1):
        pass
    assert len(told) == 1 and told[0].startswith("next: ")
