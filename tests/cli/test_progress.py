"""Bars on a terminal, plain lines elsewhere, nothing when quiet."""

import io

import pytest
from rich.console import Console

from idap.cli.progress import HEARTBEAT, Bars, Lines, listener
from idap.progress import Silent

DECISION = "filters 3: removed 50 channels in 2 groups, divergence 0.0039 to 0.0068 | MACs 86.1% | accepted: within"


def terminal(width=80):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def pipe():
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def test_the_listener_suits_the_console():
    assert isinstance(listener(terminal()), Bars)
    assert isinstance(listener(pipe()), Lines)
    assert isinstance(listener(terminal(), quiet=True), Silent)


class TestBars:
    def test_a_bar_per_phase_with_its_note(self):
        console = terminal()
        bars = Bars(console)
        with bars.phase("recovery", 4) as phase:
            phase.advance("loss 0.5")
            bars._bars.refresh()
            with bars.phase("evaluate val", None) as inner:
                inner.advance()
                bars._bars.refresh()
        shown = console.file.getvalue()
        for part in ("recovery", "1/4", "loss 0.5", "evaluate val", "1/?"):
            assert part in shown

    def test_the_bars_go_also_after_an_error(self):
        bars = Bars(terminal())

        def fail():
            with bars.phase("outer", 1), bars.phase("inner", 1):
                raise ValueError

        with pytest.raises(ValueError):
            fail()
        assert not bars._bars.tasks
        assert not bars._bars.live.is_started
        with bars.phase("again", 1) as phase:
            phase.advance()

    @pytest.mark.parametrize(
        ("width", "lines"), [(200, [DECISION]), (80, DECISION.replace(" | ", "\n    ", 1).splitlines())]
    )
    def test_a_wide_line_is_broken_after_its_first_part(self, width, lines):
        console = terminal(width)
        Bars(console).say(DECISION)
        assert [line.rstrip() for line in console.file.getvalue().splitlines()] == lines

    def test_brackets_are_no_markup(self):
        console = terminal()
        Bars(console).say("[bold] x[0]")
        assert "[bold] x[0]" in console.file.getvalue()


class TestLines:
    def test_lines_are_not_wrapped_and_phases_are_silent(self):
        console = pipe()
        lines = Lines(console)
        with lines.phase("recovery", 4) as phase:
            phase.advance("loss 0.5")
            lines.say(DECISION)
        assert console.file.getvalue() == f"{DECISION}\n"

    def test_a_sign_of_life(self):
        now = 0.0
        console = pipe()
        lines = Lines(console, clock=lambda: now)
        with lines.phase("recovery", 4) as phase:
            phase.advance()
            now = HEARTBEAT
            phase.advance("loss 0.5")
            phase.advance("loss 0.4")
        with lines.phase("measure", None) as phase:
            now = 2 * HEARTBEAT
            phase.advance()
        assert console.file.getvalue() == "recovery: 2/4, loss 0.5\nmeasure: 1\n"
