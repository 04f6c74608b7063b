"""`idap inspect`: what may be removed from a model, what can't, and what it all costs."""

import json
from dataclasses import replace
from pathlib import Path

import typer
from rich.console import Console

from idap.cli.divergence_view import Profile, profile, profile_tree
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
    Spec,
    TaskSpec,
    WeightsPath,
    WithDivergence,
)
from idap.cli.structure_view import StructureView, structure_tree, survey
from idap.cli.subject import model_and_inputs, recipe_of
from idap.errors import ConfigError
from idap.record import write_json


def inspect_command(  # noqa: PLR0913 - one argument per option
    spec: Spec,
    *,
    input_shape: InputShapes = None,
    contract: Contracts = None,
    no_swap: NoSwap = False,
    members: Members = False,
    divergence: WithDivergence = False,
    criterion: CriterionName = None,
    task: TaskSpec = None,
    data: DataPath = None,
    weights: WeightsPath = None,
    out: ProfileFile = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show groups of coupled units, removable blocks, what can't shrink and why, and the cost of each.

    With --divergence also how much each part changes the flow of information on the calibration data.
    """
    outcome = Outcome(command="idap inspect", where=spec, as_json=as_json, debug=debug)
    with outcome.reported():
        if divergence:
            replaced = {"task.build": task, "data.path": data, "model.weights": weights}
            found = _profile(spec, replaced, criterion, contract, swap=not no_swap)
            if out is not None:
                write_json(out, found.to_json())
        else:
            view = _view(spec, input_shape or [], contract, swap=not no_swap)
    if divergence and as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    elif divergence:
        Console(highlight=False).print(profile_tree(found))
    elif as_json:
        typer.echo(json.dumps(view.to_json(), indent=1))
    else:
        Console(highlight=False).print(structure_tree(view, members=members))


def _view(spec: str, shapes: list[str], contracts: list[str] | None, *, swap: bool) -> StructureView:
    import torch  # noqa: PLC0415 - slow to import

    from idap.cost.count import CostModel  # noqa: PLC0415 - torch is slow to import
    from idap.graph.trace import trace  # noqa: PLC0415 - as above
    from idap.structure.analysis import analyze  # noqa: PLC0415 - as above

    model, args, kwargs = model_and_inputs(spec, recipe_of(spec), shapes)
    structure = analyze(trace(model, args, kwargs), contracts=contracts, swap=swap, required=False)
    batch = next((len(leaf) for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.Tensor) and leaf.dim()), 1)
    return survey(type(model).__name__, structure, CostModel(structure, batch))


def _profile(
    spec: str,
    replaced: "dict[str, str | Path | None]",
    criterion: str | None,
    contract: list[str] | None,
    *,
    swap: bool,
) -> Profile:
    """Measure the divergence of a recipe's model, or of a model beside a task, on its calibration data."""
    from idap.compress.profile import profile as measured  # noqa: PLC0415 - torch is slow to import
    from idap.zoo.recipe import read_recipe  # noqa: PLC0415 - as above

    recipe_file = spec if spec.endswith(".toml") else None
    if recipe_file is None and replaced["task.build"] is None:
        raise ConfigError("divergence is measured on data: inspect a recipe, or name the data with --task.")
    changes = [] if criterion is None else [f"compress.criterion={criterion}"]
    fields = replaced if recipe_file is not None else {**replaced, "model.build": spec}
    recipe = read_recipe(recipe_file, changes, replaced=fields)
    config = replace(recipe.config(), swap=swap, contracts=None if contract is None else tuple(contract))
    structure, found = measured(recipe.model(), recipe.task(), config)
    return profile(structure, found, config.calibration_batches)
