"""Write a recipe from five answers: the data, the model, its weights, and two goals."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from idap.errors import ConfigError
from idap.recipes.recipe import make_recipe
from idap.recipes.sources import SOURCES, parse_data
from idap.script import is_script

MODELS: Mapping[str, str] = {
    "digits": "idap:digits_resnet",
    "cifar10": "idap:cifar_resnet20",
    "mnist": "idap:digits_resnet",
    "fashion_mnist": "idap:digits_resnet",
    "imagefolder": "torchvision:resnet18",
    "csv": "hf:distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    "text": "hf:distilbert/distilgpt2",
    "masks": "torchvision:lraspp_mobilenet_v3_large",
}
"""Data -> the model that is used if none is named."""

_KEYS: Mapping[str, tuple[str, ...]] = {
    "cifar10": ("batch_size = 128", "augment = true                 # crop and mirror the training images"),
    "imagefolder": (
        "size = 224                     # side of the square that the model sees",
        "batch_size = 32",
        "workers = 2                    # processes that read images",
    ),
    "csv": (
        "max_length = 128               # tokens of a text; longer texts are truncated",
        "batch_size = 32",
        '# text = "sentence"            # columns with unusual names must be given',
        '# label = "label"',
    ),
    "text": (
        "length = 128                   # tokens of a block",
        "batch_size = 8",
        'metric = "perplexity"          # lower is better; or "token_accuracy"',
    ),
    "masks": (
        "size = [180, 240]              # height and width to which images and masks are resized",
        "batch_size = 8",
        "workers = 2                    # processes that read images",
    ),
}
"""Data -> the lines of its section that are often changed."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers from which a recipe is written.

    Attributes:
        data: NAME, NAME:PATH or python:FILE.py:FUNCTION.
        model: a spec; None: the usual model for the data.
        weights: a file; None: the model comes with weights, or is trained first.
        max_drop: how much worse the metric may get, as in a recipe: "2%", "0.02" or "none".
        macs: share of the multiply-adds that may stay: "50%" or "0.5".
    """

    data: str = "digits"
    model: str | None = None
    weights: str | None = None
    max_drop: str = "2%"
    macs: str = "50%"


def compose_recipe(answers: Answers, out: Path) -> str:
    """Write the text of a recipe.

    Args:
        answers: the content; paths are relative to the working folder.
        out: the file of the recipe; paths below its folder are written relative to it, so that both can be moved
            together, and other paths are absolute.

    Returns:
        TOML with comments, checked like a recipe that is read.

    Raises:
        ConfigError: an answer is wrong.
    """
    named = parse_data(answers.data)
    if named is None:
        raise ConfigError(
            f"--data {answers.data} names no data set; write NAME or NAME:PATH with one of {', '.join(SOURCES)}, or "
            "python:FILE.py:FUNCTION."
        )
    kind = str(named["name"])
    if answers.model is None and kind not in MODELS:
        raise ConfigError(f"--model is missing: there is no usual model for {kind}.")
    model = answers.model or MODELS[kind]
    sections = [
        _head(answers, model, out),
        _model(model, answers.weights, out),
        _data(kind, named["path"], out),
        *([_TRAIN[_family(kind, model)]] if _needs_training(model, answers.weights) else []),
        _goals(kind, answers),
        _stages(_family(kind, model)),
    ]
    text = "\n\n".join(sections) + "\n"
    try:
        make_recipe(tomllib.loads(text), str(out))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"an answer is not valid in TOML: {error}.") from error
    return text


def _head(answers: Answers, model: str, out: Path) -> str:
    return (
        f"# {model} on {answers.data}, compressed. Written by idap recipe new.\n"
        "#\n"
        f"#   idap compress {out}\n"
        f"#   idap compress {out} --set goals.macs=40% --run-dir runs/smaller\n"
        "#\n"
        "# A key that is left out has its default; docs/recipes.md lists all keys. Paths are relative to this file."
    )


def _model(model: str, weights: str | None, out: Path) -> str:
    lines = ["[model]", f"build = {_text(_relative_spec(model, out))}"]
    if weights is not None:
        lines.append(f"weights = {_text(_place(weights, out))}   # tensors, without code")
    elif model.startswith("hf:"):
        lines.append("# a model of transformers comes with its weights")
    else:
        lines.append('# weights = "my_model.safetensors"   # or a checkpoint without code; then remove [train]')
    return "\n".join(lines)


def _data(kind: str, path: str | None, out: Path) -> str:
    source = SOURCES.get(kind)
    lines = [
        "[data]",
        f"name = {_text(_relative_spec(kind, out))}" + (f"   # {source.what}" if source is not None else ""),
    ]
    if path is not None:
        lines.append(f"path = {_text(_place(path, out))}")
    return "\n".join([*lines, *_KEYS.get(kind, ())])


def _goals(kind: str, answers: Answers) -> str:
    # Perplexity has no natural scale, so the budget is a share of the original's.
    goal = "max_relative_drop" if kind == "text" else "max_drop"
    meaning = "share by which perplexity may rise" if kind == "text" else "how much worse the metric may get"
    return "\n".join(
        [
            "[goals]",
            f'{goal} = {_number(answers.max_drop)}   # {meaning}; 0.02 and "2%" are the same; "none" allows anything',
            f"macs = {_number(answers.macs)}   # multiply-adds that may stay; also parameters, size and latency",
        ]
    )


_TRAIN: Mapping[str, str] = {
    "small": (
        "[train]                        # a model without weights is trained first; remove this if it has some\n"
        "epochs = 8\nlr = 0.05"
    ),
    "images": (
        "[train]                        # a model without weights is trained first; remove this if it has some\n"
        "epochs = 30\nlr = 0.05"
    ),
    "attention": (
        "[train]                        # a model without weights is trained first; remove this if it has some\n"
        'epochs = 20\nlr = 0.003\noptimizer = "adamw"'
    ),
}

_RATES: Mapping[str, tuple[str, str]] = {
    "small": ("epochs = 3\nlr = 0.02", "epochs = 6"),
    "images": ("epochs = 2\nlr = 0.01", "epochs = 5"),
    "attention": ('epochs = 2\nlr = 0.001\noptimizer = "adamw"', "epochs = 5"),
    "pretrained": ('epochs = 0.2\nlr = 3e-5\noptimizer = "adamw"', "epochs = 1"),
}


def _stages(family: str) -> str:
    after, final = _RATES[family]
    return (
        "[filters]                      # stage 1: each step removes a share of the channels, neurons and heads left\n"
        'steps = 6\nfirst_share = "15%"\n\n'
        "[layers]                       # stage 2: each step removes one residual branch or whole block\n"
        "removals = 2\n\n"
        f"[recovery]                     # training after each step, with the original network as teacher\n{after}\n\n"
        f"[final]                        # training of the result; other keys are as in [recovery]\n{final}"
    )


def _needs_training(model: str, weights: str | None) -> bool:
    """Whether the model is trained first: it has no weights. A model of the user's own code may have some."""
    return weights is None and not model.startswith("hf:") and not is_script(model)


def _family(kind: str, model: str) -> str:
    """The family of models that are trained alike."""
    if model.startswith("hf:"):
        return "pretrained"
    if "vit" in model or kind in ("text", "masks"):
        return "attention"
    return "small" if kind in ("digits", "mnist", "fashion_mnist") else "images"


def _relative_spec(spec: str, out: Path) -> str:
    """A spec whose paths are relative to the recipe."""
    if is_script(spec) and ".py:" in spec:
        return f"python:{_place(spec.removeprefix('python:'), out)}"
    folder = spec.removeprefix("hf:")
    return f"hf:{_place(folder, out)}" if spec.startswith("hf:") and Path(folder).expanduser().is_dir() else spec


def _place(path: str, out: Path) -> str:
    """A path as it is written in the recipe: relative if it lies below the recipe's folder."""
    place, folder = Path(path).expanduser().absolute(), out.expanduser().absolute().parent
    return place.relative_to(folder).as_posix() if place.is_relative_to(folder) else str(place)


def _number(written: str) -> str:
    """A number as it is, anything else as text."""
    try:
        return repr(float(written))
    except ValueError:
        return _text(written)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
