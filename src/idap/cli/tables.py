"""The closing table: what a model was before and what it is after."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Plain numbers of two models; each pair is (before, after).

    Attributes:
        parameters: number of parameters.
        macs: multiply-adds for one sample.
        metric_name: what `val` and `test` are.
        val: metric on the data that decided.
        test: metric on data that was looked at once; None where there is none.
        latency: median seconds of one forward pass; None where it was not measured.
        batch: samples of that pass.
    """

    parameters: tuple[int, int]
    macs: tuple[int, int]
    metric_name: str
    val: tuple[float, float]
    test: tuple[float, float] | None = None
    latency: tuple[float, float] | None = None
    batch: int = 1

    def to_json(self) -> dict[str, Any]:
        """The numbers with the names before and after."""
        return {
            name: dict(zip(("before", "after"), value, strict=True)) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def comparison_table(numbers: Comparison, title: str = "") -> Table:
    """Draw the closing table.

    Args:
        numbers: of the two models.
        title: stands above the table.

    Returns:
        A rich table with a row per number: before, after, change.
    """
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    table.add_row("parameters", *(f"{count:,}" for count in numbers.parameters), _share(numbers.parameters))
    table.add_row("MACs per sample", *(_short(count) for count in numbers.macs), _share(numbers.macs))
    if numbers.latency is not None:
        label = f"latency, batch of {numbers.batch}"
        table.add_row(label, *(f"{seconds * 1000:.2f} ms" for seconds in numbers.latency), _share(numbers.latency))
    table.add_row(f"{numbers.metric_name} (validation)", *metric_cells(numbers.metric_name, numbers.val))
    if numbers.test is not None:
        table.add_row(f"{numbers.metric_name} (test)", *metric_cells(numbers.metric_name, numbers.test))
    return table


def _short(count: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return str(count)


def _share(pair: tuple[float, float]) -> str:
    before, after = pair
    return f"{(after - before) / before:+.1%}".replace("-", "−") if before else ""


def metric_cells(name: str, values: Sequence[float]) -> list[str]:
    """Write values of a metric, and of two the change.

    >>> metric_cells("accuracy", [0.975, 0.97]), metric_cells("perplexity", [12.345678])
    (['97.50%', '97.00%', '−0.50 points'], ['12.35'])
    """
    accuracy = name == "accuracy"
    cells = [f"{value:.2%}" if accuracy else f"{value:.4g}" for value in values]
    if len(values) == 2:
        change = values[1] - values[0]
        cells.append((f"{change * 100:+.2f} points" if accuracy else f"{change:+.4g}").replace("-", "−"))
    return cells
