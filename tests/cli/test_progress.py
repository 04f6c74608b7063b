"""Bars on a terminal, plain lines elsewhere, nothing when quiet."""

import io

import pytest
from rich.console import Console

from idap.cli.progress import HEARTBEAT, Bars, Lines, listener
from idap.progress import Silent
from tests.cli.statuses import status

DECISION = "filters 3: removed 50 channels in 2 groups, divergence 0.0039 to 0.0068 | MACs 86.1% | accepted: within"


def terminal(width=80):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def pipe():
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def ascii_file():
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)


def output_of(file):
    return file.buffer.getvalue().decode("ascii")


def area(bars):
    """What is on the terminal below the lines that stay."""
    console = bars._console
    lines = console.render_lines(bars._bars.get_renderable(), pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


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

    @pytest.mark.parametrize(
        ("width", "shown"),
        [
            (
                60,
                [
                    "filters 3 | 2 accepted | 0:40 | about 1 min left | ▁▃▅▇█",
                    "MACs 80.0% → 50.0% | accuracy 0.9080 ≥ 0.9000 | 20% used",
                    "filters 3: recovery    ━━━━     12/24 --:-- loss 0.512",
                ],
            ),
            (
                120,
                [
                    "filters 3 | 2 accepted | 0:40 | about 1 min to the target | divergence ▁▃▅▇█",
                    "MACs 80.0% → 50.0% | parameters 90.0% | accuracy 0.9080, at least 0.9000 | 20% of the budget used",
                    "filters 3: recovery    ━━━━━━━━━━━━             12/24 --:-- loss 0.512",
                ],
            ),
        ],
    )
    def test_where_the_run_stands_is_above_the_bars(self, width, shown):
        now = 0.0
        bars = Bars(terminal(width), clock=lambda: now)
        with bars.phase("compress", None):
            bars.show(status(step=0, accepted=0, macs=1.0))
            with bars.phase("filters 3: recovery", 24) as phase:
                for _ in range(12):
                    phase.advance("loss 0.512")
                now = 40.0
                bars.show(status())
                assert area(bars) == shown

    def test_with_the_outermost_phase_it_goes_and_what_was_said_stays(self):
        bars = Bars(terminal(120))
        with bars.phase("compress", None):
            with bars.phase("measure", None):
                bars.show(status())
            assert area(bars)[0].startswith("filters 3 | 2 accepted")
            assert area(bars)[2].startswith("compress")
            bars.say(DECISION)
        assert area(bars) == []
        assert not bars._bars.live.is_started
        assert DECISION in bars._console.file.getvalue()
        with bars.phase("evaluate test", 1):
            assert len(area(bars)) == 1

    @pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 100, 120, 200])
    @pytest.mark.parametrize("groups", [0, 1, 200])
    def test_no_line_is_wrapped_at_any_width(self, width, groups):
        bars = Bars(terminal(width))
        with bars.phase("compress", None), bars.phase("rebalance", 1000) as phase:
            phase.advance("stages.2.0.a_long_name_of_a_module.and_its_parameter.weight")
            bars.show(status(profile=tuple(range(groups)), metric_name="mean intersection over union"))
            shown = area(bars)
        assert len(shown) == 3
        assert max(map(len, shown)) <= width

    def test_a_terminal_that_knows_only_ascii(self):
        file = ascii_file()
        bars = Bars(Console(file=file, force_terminal=True, width=60, color_system=None))
        with bars.phase("compress", None), bars.phase("rebalance", 1000) as phase:
            phase.advance("stages.2.0.a_long_name_of_a_module.and_its_parameter.weight")
            bars.show(status())
            bars._bars.refresh()
            bars.say("block b stays: Größe 3 … 4")
        shown = output_of(file)
        assert "filters 3 | 2 accepted" in shown
        assert "divergence .-+#@" in shown
        assert "MACs 80.0% -> 50.0% | accuracy 0.9080 >= 0.9000 | 20% used" in shown
        assert "block b stays: Gr??e 3 ? 4" in shown

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

    def test_a_sign_of_life_says_where_the_run_stands(self):
        now = 0.0
        console = pipe()
        lines = Lines(console, clock=lambda: now)
        with lines.phase("compress", None), lines.phase("recovery", 4) as phase:
            lines.show(status())
            now = HEARTBEAT
            phase.advance("loss 0.5")
        with lines.phase("evaluate test", 4) as phase:
            now = 2 * HEARTBEAT
            phase.advance()
        assert console.file.getvalue() == (
            "recovery: 1/4, loss 0.5 | MACs 80.0% → 50.0% | parameters 90.0% | accuracy 0.9080, at least 0.9000 | "
            "20% of the budget used\nevaluate test: 1/4\n"
        )

    def test_a_file_that_knows_only_ascii(self):
        now = 0.0
        file = ascii_file()
        lines = Lines(Console(file=file, width=40), clock=lambda: now)
        with lines.phase("recovery", 4) as phase:
            lines.show(status())
            now = HEARTBEAT
            phase.advance()
        lines.say("Größe")
        assert "recovery: 1/4 | MACs 80.0% -> 50.0% | " in output_of(file)
        assert output_of(file).endswith("Gr??e\n")
