"""`idap inspect`: show what can be removed from a model, what can't, and what each part costs."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.tree import Tree

from idap.cli.failure import Outcome
from idap.cli.options import (
    Contracts,
    CriterionName,
    DataPath,
    Debug,
    InputShapes,
    Json,
    Members,
    NoSwap,
    ProfileFile,
    Quiet,
    Spec,
    TableBatch,
    TaskSpec,
    Verbose,
    WeightsPath,
    WithDivergence,
    WithLatency,
)
from idap.cli.subject import model_and_inputs, recipe_of
from idap.cli.tables import latency_document, latency_table
from idap.cli.views import Profile, StructureView, profile, profile_tree, structure_tree, survey
from idap.errors import ConfigError
from idap.files import write_json

if TYPE_CHECKING:
    from idap.cost.latency import LatencyTable
    from idap.recipes.recipe import Recipe

EXAMPLES = (
    "idap inspect idap:digits_vit",
    "idap inspect torchvision:resnet50 --members",
    "idap inspect python:net.py:build --input-shape 1,3,32,32",
    "idap inspect recipes/digits_resnet.toml --divergence",
    "idap inspect torchvision:resnet50 --latency --batch 16",
)
DOCUMENT = {
    "model": "class of the model",
    "macs": "multiply-adds for one sample",
    "parameters": "number of parameters",
    "prunable": "share of the parameters that have a dimension that can shrink",
    "groups": "groups of units: `name`, `kind`, `size`, `macs_share`, `members`, `crosses`",
    "blocks": "branches and blocks that can be removed whole: `name`, `kind`, `macs_share`, `contains`",
    "blocked": "dimensions that can't shrink: `tensor`, `dim`, `size`, `reason`",
    "rewritten": "modules whose forward is rewritten when their groups are cut",
}
DOCUMENT_OF_DIVERGENCE = {
    "criterion": "the criterion that gave the scores",
    "batches": "number of calibration batches",
    "groups": "`name`, `kind`, and `units`: the score of each",
    "parts": "branches and blocks: `name`, `kind`, `divergence`, and `inside`: the sum over their units",
    "unmeasured": "parts that could not be measured",
    "notes": "what the scores leave out if a group is too large to be measured whole",
}
DOCUMENT_OF_LATENCY = {
    "batch": "number of samples in a timed pass",
    "device": "device on which the layers were timed",
    "threads": "number of CPU threads",
    "unmeasured": "operators that were not timed",
    "groups": "by name: `step` (useful widths are multiples of it; 1: all are), `widths`, `seconds`, `spread`",
}


def inspect_command(  # noqa: PLR0913 - one argument per option
    spec: Spec,
    *,
    input_shape: InputShapes = None,
    contract: Contracts = None,
    no_swap: NoSwap = False,
    members: Members = False,
    divergence: WithDivergence = False,
    criterion: CriterionName = None,
    latency: WithLatency = False,
    batch: TableBatch = None,
    task: TaskSpec = None,
    data: DataPath = None,
    weights: WeightsPath = None,
    out: ProfileFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what can be removed from a model, what can't and why, and what each part costs.

    The units of a group can be removed one by one, branches and blocks only whole. A dimension that can't shrink is
    listed with the reason, often a line of the model's code. Costs are multiply-adds (MACs) for one sample.

    With --divergence, the command shows instead how much each part changes the flow of information on the calibration
    data; with --latency, how long the layers of each group take on this machine at several widths.
    """
    outcome = Outcome(command="idap inspect", where=spec, as_json=as_json, quiet=quiet, verbose=verbose, debug=debug)
    with outcome.report():
        _check_views(divergence=divergence, latency=latency, batch=batch)
        shown: Tree | Table
        if latency:
            recipe = recipe_of(spec, task, data)
            table, steps = _latency(spec, recipe, input_shape or [], contract, batch or 1, swap=not no_swap)
            outcome.document, shown = latency_document(table, steps), latency_table(table, steps)
        elif divergence:
            replaced = {"task.build": task, "data.path": data, "model.weights": weights}
            found = _profile(spec, replaced, criterion, contract, swap=not no_swap)
            if out is not None:
                write_json(out, found.to_json())
            outcome.document, shown = found.to_json(), profile_tree(found)
        else:
            view = _view(spec, recipe_of(spec, task, data), input_shape or [], contract, swap=not no_swap)
            outcome.document, shown = view.to_json(), structure_tree(view, members=members)
        if not (as_json or quiet):
            outcome.console.print(shown)


def _view(
    spec: str, recipe: "Recipe | None", shapes: list[str], contracts: list[str] | None, *, swap: bool
) -> StructureView:
    import torch  # noqa: PLC0415 - slow to import

    from idap.cost.count import CostModel  # noqa: PLC0415 - torch is slow to import
    from idap.graph.trace import trace  # noqa: PLC0415 - as above
    from idap.structure.analysis import analyze  # noqa: PLC0415 - as above

    model, args, kwargs = model_and_inputs(spec, recipe, shapes)
    structure = analyze(trace(model, args, kwargs), contracts=contracts, swap=swap, required=False)
    batch = next((len(leaf) for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.Tensor) and leaf.dim()), 1)
    return survey(type(model).__name__, structure, CostModel(structure, batch))


def _check_views(*, divergence: bool, latency: bool, batch: int | None) -> None:
    if divergence and latency:
        raise ConfigError("--divergence and --latency are two views; ask for one at a time.")
    if batch is not None and not latency:
        raise ConfigError("--batch says how many samples are timed; it needs --latency.")


def _latency(
    spec: str, recipe: "Recipe | None", shapes: list[str], contracts: list[str] | None, batch: int, *, swap: bool
) -> "tuple[LatencyTable, dict[str, int]]":
    """Measure the latency table of a model, and find its steps."""
    from idap.cost.layer_latency import measure_table  # noqa: PLC0415 - torch is slow to import
    from idap.graph.trace import trace  # noqa: PLC0415 - as above
    from idap.selection.rounding import probes, step_of  # noqa: PLC0415 - as above
    from idap.structure.analysis import analyze  # noqa: PLC0415 - as above
    from idap.surgery.compare import resize_inputs  # noqa: PLC0415 - as above

    model, args, kwargs = model_and_inputs(spec, recipe, shapes)
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ConfigError(f"{spec} is built on the meta device, without weights, so it can't be timed.")
    structure = analyze(trace(model, args, kwargs), contracts=contracts, swap=swap)
    table = measure_table(model, structure, resize_inputs(args, kwargs, batch), probes)
    return table, {name: step_of(table.curve(name)) for name in table.groups}


def _profile(
    spec: str,
    replaced: "dict[str, str | Path | None]",
    criterion: str | None,
    contract: list[str] | None,
    *,
    swap: bool,
) -> Profile:
    """Measure the divergence of a recipe's model, or of a model with a task, on its calibration data."""
    from idap.compress.prepare import profile as measure  # noqa: PLC0415 - torch is slow to import
    from idap.recipes.recipe import read_recipe  # noqa: PLC0415 - as above

    recipe_file = spec if spec.endswith(".toml") else None
    if recipe_file is None and replaced["task.build"] is None:
        raise ConfigError("divergence is measured on data: inspect a recipe, or name the data with --task.")
    changes = [] if criterion is None else [f"compress.criterion={criterion}"]
    fields = replaced if recipe_file is not None else {**replaced, "model.build": spec}
    recipe = read_recipe(recipe_file, changes, replaced=fields)
    config = replace(recipe.config(), swap=swap, contracts=None if contract is None else tuple(contract))
    structure, found = measure(recipe.model(), recipe.task(), config)
    return profile(structure, found, config.calibration_batches)
