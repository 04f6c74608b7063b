"""The model that a command looks at, and inputs for it: from a spec, a recipe, a task or shapes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from idap.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from idap.zoo.recipe import Recipe

    Subject = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def recipe_of(spec: str, task: str | None = None, data: Path | None = None) -> "Recipe | None":
    """The recipe that a spec names, or that it makes together with a task or data; None for a model alone.

    Raises:
        ConfigError: the recipe is wrong.
    """
    if not spec.endswith(".toml") and task is None and data is None:
        return None
    from idap.zoo.recipe import read_recipe  # noqa: PLC0415 - imports torch

    replaced = {"task.build": task, "data.path": data}
    if spec.endswith(".toml"):
        return read_recipe(spec, replaced=replaced)
    return read_recipe(None, replaced={**replaced, "model.build": spec})


def model_and_inputs(spec: str, recipe: "Recipe | None", shapes: list[str], *, weights: bool = True) -> "Subject":
    """Build a model and inputs for it.

    Args:
        spec: of the model; a recipe goes before it.
        recipe: as `recipe_of` found it.
        shapes: of the positional inputs, as text; empty: those of the model's family, or of the task's data.
        weights: whether the recipe's weights are loaded.

    Returns:
        The model in evaluation mode, positional and keyword inputs.

    Raises:
        ConfigError: the model can't be built, or what it takes is not known.
    """
    from idap.zoo.resolve import build_model, example_inputs  # noqa: PLC0415 - imports torch

    inputs = tuple(_input(text) for text in shapes)
    model = build_model(spec) if recipe is None else recipe.model(weights=weights)
    if inputs:
        return model, inputs, {}
    known = example_inputs(spec, model) if recipe is None else recipe.example_inputs(model)
    if known is not None:
        return model, *known
    if recipe is None:
        raise ConfigError(
            f"what {spec} takes is not known; say it: --input-shape 1,3,32,32, once per input; "
            "or give its --task or --data."
        )
    args, kwargs = recipe.task().example("cpu")
    return model, args, kwargs


def _input(text: str) -> "Tensor":
    import torch  # noqa: PLC0415 - slow to import

    sizes, _, kind = text.partition(":")
    try:
        shape = tuple(int(size) for size in sizes.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--input-shape {text!r} is not a shape; write sizes with commas, as in 1,3,32,32."
        ) from error
    if kind not in ("", "int") or min(shape) < 1:
        raise ConfigError(f"--input-shape {text!r} is not a shape; write sizes above 0, and :int for whole numbers.")
    return torch.zeros(shape, dtype=torch.int64 if kind else torch.float32)
