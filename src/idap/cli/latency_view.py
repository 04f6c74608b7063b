"""The latency table of a model for people: one row per group."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from idap.cost.table import LatencyTable

SHARES = (0.5, 0.25)
"""Widths that are shown, as shares of the whole group."""


def latency_document(table: "LatencyTable", steps: Mapping[str, int]) -> dict[str, Any]:
    """The table as plain data: of each group its curve and the step of its widths.

    Args:
        table: measured.
        steps: group name -> what widths worth having are a multiple of; 1 where there are no steps.
    """
    groups = {}
    for name in table.groups:
        curve = table.curve(name)
        groups[name] = {
            "step": steps[name], "widths": curve.widths, "seconds": curve.seconds, "spread": curve.spread
        }  # fmt: skip
    return {
        "batch": table.batch,
        "device": table.device,
        "threads": table.threads,
        "unmeasured": table.unmeasured,
        "groups": groups,
    }


def latency_table(table: "LatencyTable", steps: Mapping[str, int]) -> Table:
    """Draw the table: seconds of the layers of each group, what is left of them at narrower widths, and the step."""
    title = f"Latency of layers, batch of {table.batch}, {table.device}, {table.threads} threads"
    found = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("group")
    for name in ("units", "layers, ms", *(f"at {share:.0%}" for share in SHARES), "step"):
        found.add_column(name, justify="right", no_wrap=True)
    for name in table.groups:
        curve = table.curve(name)
        size, whole = curve.widths[-1], curve.seconds[-1]
        left = [f"{curve.at(max(1, round(share * size))) / whole:.0%}" for share in SHARES]
        step = str(steps[name]) if steps[name] > 1 else "none"
        found.add_row(name, str(size), f"{1000 * whole:.3g}", *left, step)
    return found
