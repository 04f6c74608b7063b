"""`idap bench`: measure latency, memory and size of a compressed model and its original, on this machine."""

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from idap.cli.failure import Outcome
from idap.cli.options import (
    Batches,
    ChannelsLast,
    DataPath,
    Debug,
    Engines,
    InputShapes,
    Json,
    OriginalSpec,
    Quiet,
    Repeats,
    RunOrModel,
    TaskSpec,
    Threads,
    Trust,
    Verbose,
)
from idap.cli.subject import check_code, model_and_inputs, recipe_of

if TYPE_CHECKING:
    from idap.cost.latency import Latency
    from idap.deploy.bench import Bench


EXAMPLES = (
    "idap bench runs/net --batch 1 --batch 16",
    "idap bench small --model idap:digits_vit --engine eager --engine onnxruntime",
)
NARROW = 80
"""Width of a terminal, in characters, below which the table leaves out quartiles and memory; --json has them."""
DOCUMENT = {
    "rows": "for each engine and batch size: `engine`, `batch`, `latency` and `memory` of both models, and `ratio`: "
    "the latency of the compressed model as a share of the original's",
    "size": "bytes of the tensors in a saved file: of the original, then of the compressed model",
    "subnormal": "number of weights so near to 0 that processors compute slowly with them: of the original, then of "
    "the compressed model",
    "threads": "number of CPU threads",
    "device": "device on which both models ran",
    "channels_last": "whether images were laid out with their channels last",
}


def bench_command(  # noqa: PLR0913 - one argument per option
    folder: RunOrModel,
    *,
    model: OriginalSpec = None,
    task: TaskSpec = None,
    data: DataPath = None,
    input_shape: InputShapes = None,
    batch: Batches = None,
    engine: Engines = None,
    threads: Threads = None,
    channels_last: ChannelsLast = False,
    repeats: Repeats = 50,
    trust: Trust = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a compressed model and its original in turn, on this machine.

    Both run alternately in one process, under the same conditions: compare the ratios, not the seconds. If the run was
    made elsewhere and its recipe names Python code, the command asks before it runs that code.
    """
    outcome = Outcome(
        command="idap bench", where=str(folder), as_json=as_json, quiet=quiet, verbose=verbose, debug=debug
    )
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences torch's profiler on stderr
    with outcome.report():
        from idap.deploy.bench import bench  # noqa: PLC0415 - torch is slow to import
        from idap.recipes.runs import model_folder, recipe_of_run  # noqa: PLC0415 - as above
        from idap.saving.checkpoint import load  # noqa: PLC0415 - as above

        place = model_folder(folder)
        recipe = recipe_of(model, task, data) if model is not None else recipe_of_run(folder)
        if model is None:
            check_code(outcome, folder, {}, trust=trust)
        spec = model or (recipe.network.build if recipe is not None else "")
        original, args, kwargs = model_and_inputs(spec, recipe, input_shape or [], weights=False)
        found = bench(
            original.eval(),
            load(place, original).eval(),
            args,
            kwargs,
            batches=batch or [1],
            engines=engine or ["eager"],  # type: ignore[arg-type]
            threads=threads,
            channels_last=channels_last,
            repeats=repeats,
            progress=outcome.progress(),
        )
        outcome.document = _document(found)
        if not (as_json or quiet):
            _show(outcome.console, found)


def _document(found: "Bench") -> dict[str, Any]:
    rows = [asdict(row) | {"ratio": row.ratio} for row in found.rows]
    return asdict(found) | {"rows": rows}


def _show(console: Console, found: "Bench") -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("engine", no_wrap=True)
    narrow = console.width < NARROW
    for name in ("batch", "original, ms", "compressed, ms", "ratio", *([] if narrow else ["memory, MB"])):
        table.add_column(name, justify="right")
    for row in found.rows:
        cells = [row.engine, str(row.batch), *(_time(each, spread=not narrow) for each in row.latency)]
        memory = "" if row.memory is None else " → ".join(f"{count / 1e6:.1f}" for count in row.memory)
        table.add_row(*cells, f"{row.ratio:.2f}", *([] if narrow else [memory]))
    console.print(table)
    layout = ", channels last" if found.channels_last else ""
    threads = f"{found.threads} {'thread' if found.threads == 1 else 'threads'}"
    sizes = " → ".join(f"{count / 1e6:.2f} MB" for count in found.size)
    console.print(
        f"Medians{'' if narrow else ' (and quartiles)'} of one forward pass on {found.device}, {threads}{layout}. "
        f"Weights: {sizes}.",
        soft_wrap=not console.is_terminal,
    )
    if found.subnormal[1]:
        console.print(
            f"{found.subnormal[1]:,} weights of the compressed model are subnormal, which makes processors slow; save "
            "it again to have them written as 0.",
            soft_wrap=not console.is_terminal,
        )


def _time(latency: "Latency", *, spread: bool) -> str:
    if not spread:
        return _digits(latency.median)
    low, high = (_digits(seconds) for seconds in latency.spread)
    return f"{_digits(latency.median)} ({low} to {high})"


def _digits(seconds: float) -> str:
    """Format seconds as milliseconds, without decimals from 100 ms on."""
    return f"{1000 * seconds:.2f}" if seconds < 0.1 else f"{1000 * seconds:.0f}"
