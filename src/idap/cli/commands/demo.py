"""`idap demo`: train and compress two small networks on embedded data."""

import typer

from idap.cli.failure import GOAL_MISSED, Outcome, null_console
from idap.cli.options import Debug, Fast, Json, Out, Quiet, Seed, Verbose

EXAMPLES = ("idap demo", "idap demo --fast --out runs/demo")
DOCUMENT = {
    "network": "name of the network; the document is a list with one item per network",
    "reached": "whether every goal was reached",
    "message": "what was reached, or why a goal was missed",
    "parameters": "`before` and `after`: number of parameters",
    "macs": "`before` and `after`: multiply-adds for one sample",
    "metric_name": "name of the metric",
    "val": "`before` and `after`: the metric on the validation data",
    "test": "`before` and `after`: the metric on the test data, which is used only once; null if there is none",
    "latency": "`before` and `after`: median seconds of one forward pass; null if it was not measured",
    "batch": "number of samples in that pass",
}


def demo_command(
    *,
    fast: Fast = False,
    seed: Seed = 0,
    out: Out = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train two small networks on handwritten digits, compress them, and show what happened.

    A residual network and a vision transformer lose half of their multiply-adds for at most one point of accuracy.
    The demonstration needs no download and takes about two minutes.
    """
    outcome = Outcome(
        command="idap demo",
        where="the embedded digits",
        as_json=as_json,
        quiet=quiet,
        verbose=verbose,
        debug=debug,
        stopped="Nothing was kept." if out is None else f"{out} holds the finished part; choose another --out.",
    )
    with outcome.report():
        from idap.cli.demo import run_demo  # noqa: PLC0415 - torch is slow to import

        console = null_console() if quiet else outcome.console
        results = run_demo(console, outcome.progress(), fast=fast, seed=seed, out=out)
        outcome.document = [each.to_json() for each in results]
    if not all(each.reached for each in results):
        raise typer.Exit(GOAL_MISSED)
