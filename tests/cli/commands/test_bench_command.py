"""The table of `idap bench`, on wide terminals and on narrow ones; test_commands.py measures."""

import io
import re

from rich.console import Console

from idap.cli.commands.bench import _show
from idap.cost.latency import Latency
from idap.deploy.bench import Bench, BenchRow

FOUND = Bench(
    rows=(
        BenchRow(
            engine="onnxruntime",
            batch=16,
            latency=(Latency(0.2, (0.15, 0.25)), Latency(0.1, (0.09, 0.11))),
            memory=(4_000_000, 2_000_000),
        ),
    ),
    size=(4_000_000, 2_000_000),
    subnormal=(0, 3),
    threads=1,
    device="cpu",
    channels_last=False,
)


def render_table(width):
    console = Console(width=width, force_terminal=True, no_color=True, file=io.StringIO())
    _show(console, FOUND)
    return re.sub(r"\x1b\[\d*m", "", console.file.getvalue())


def test_everything_on_a_wide_terminal():
    text = render_table(100)
    assert "200 (150 to 250)" in text and "100 (90.00 to 110)" in text
    assert "0.50" in text and "4.0 → 2.0" in text
    assert "Medians (and quartiles) of one forward pass on cpu, 1 thread. Weights: 4.00 MB → 2.00 MB." in text
    assert "3 weights of the compressed model are subnormal" in " ".join(text.split())


def test_the_medians_on_a_narrow_one():
    text = render_table(60)
    assert max(map(len, text.splitlines())) <= 60
    assert "…" not in text and "0.50" in text and "onnxruntime" in text and "quartiles" not in text
