"""`idap demo`: the whole story on embedded data."""

import typer
from rich.console import Console

from idap.cli.failure import GOAL_MISSED, Outcome
from idap.cli.options import Debug, Fast, Out, Seed
from idap.cli.progress import listener


def demo_command(*, fast: Fast = False, seed: Seed = 0, out: Out = None, debug: Debug = False) -> None:
    """Train two small networks on handwritten digits, compress them, and show what happened.

    A residual network and a vision transformer lose half of their multiply-adds for at most one point of accuracy.
    Needs no download and about two minutes.
    """
    console = Console(highlight=False)
    outcome = Outcome(command="idap demo", where="the embedded digits", debug=debug, run_dir=out)
    with outcome.reported():
        from idap.cli.demo import run_demo  # noqa: PLC0415 - torch is slow to import

        reached = run_demo(console, listener(console), fast=fast, seed=seed, out=out)
    if not reached:
        raise typer.Exit(GOAL_MISSED)
