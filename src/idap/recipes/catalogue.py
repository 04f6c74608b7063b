"""Lists of the models, data sets, criteria and recipes that have names; imports none of the libraries."""

import difflib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from idap.errors import ConfigError

FOLDER = Path(__file__).resolve().parent / "shipped"


def shipped_recipes() -> dict[str, Path]:
    """List the recipes of the package.

    Returns:
        Name -> file, in the order of the names.

    Example:
        >>> "digits_resnet" in shipped_recipes()
        True
    """
    return {file.stem: file for file in sorted(FOLDER.glob("*.toml"))}


def summary(file: Path) -> str:
    """The first line of a recipe's first comment."""
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def recipe_path(path: str | Path) -> Path:
    """Find a recipe by its file, or by the name of one that comes with the package.

    Args:
        path: a path or a name; a file is preferred to a recipe of that name.

    Returns:
        The path of the file, which need not exist.
    """
    path = Path(path)
    named = path.name.removesuffix(".toml") if path.parent == Path() else ""
    return path if path.exists() else shipped_recipes().get(named, path)


@dataclass(frozen=True)
class Entry:
    """One model, data set, criterion or recipe.

    Attributes:
        name: as it is written in a recipe or on the command line.
        about: a description of one line; "" if there is none.
    """

    name: str
    about: str


OWN_MODELS: Mapping[str, str] = {
    "digits_resnet": "a residual network for 8x8 images, 175,000 parameters",
    "digits_vit": "a vision transformer for 8x8 images, 115,000 parameters",
    "cifar_resnet20": "ResNet-20 for CIFAR-10, 270,000 parameters",
    "cifar_resnet56": "ResNet-56 for CIFAR-10, 850,000 parameters",
}
DATA_SETS: Mapping[str, str] = {
    "digits": "1,797 handwritten digits of 8x8 pixels, part of scikit-learn",
    "cifar10": "CIFAR-10 in two .npz files",
    "mnist": "MNIST in a .npz file, or in the four idx files",
    "fashion_mnist": "Fashion-MNIST in a .npz file, or in the four idx files",
    "imagefolder": "images in one folder per class",
    "csv": "texts with labels in CSV, TSV or JSON Lines",
    "text": "a text, to predict the next token",
    "masks": "images with masks, to predict the class of each pixel",
}
CRITERIA: Mapping[str, str] = {
    "innovation": "flow that the next layers would lose even after a refit on the other units; the default",
    "relative": "squared change of the flow behind a part, relative to its squared size; also for whole blocks",
    "fluctuation": "like relative, for the variation from sample to sample; also for whole blocks",
    "paper": "the formulas of the IDAP++ paper; also for whole blocks",
    "share": "share of the flow that passes a unit; also for whole blocks",
    "activation": "mean size of a unit's output",
    "taylor": "first-order change of the loss; needs labels",
    "fisher": "squared gradient of the loss; needs labels",
    "magnitude": "Euclidean norm of the weights",
    "magnitude_l1": "sum of the sizes of the weights",
    "bn_scale": "scale of the batch norm behind a unit",
    "fpgm": "distance of a filter from the others of its layer",
    "random": "random scores, as a baseline",
}
SCHEMES: Mapping[str, str] = {
    "idap": "small networks that come with idap",
    "torchvision": "torchvision's models",
    "timm": "timm's models",
    "hf": "models of transformers with weights: hf:FOLDER, or hf:NAME on the hub",
    "transformers": "model types of transformers, in their default configuration, without weights: for inspection",
    "python": "your own model: python:FILE.py:NAME of a class, a function without arguments, or a module",
}


def models(schemes: Sequence[str] = ("idap", "torchvision", "timm", "transformers")) -> list[Entry]:
    """List the models that have a name, in the order of the schemes, then alphabetically.

    Args:
        schemes: the schemes to list; packages that are not installed have no models.

    Returns:
        An entry per model, named `scheme:name`.

    Example:
        >>> [entry.name for entry in models(["idap"])][:2]
        ['idap:cifar_resnet20', 'idap:cifar_resnet56']
    """
    return [Entry(f"{scheme}:{name}", about) for scheme in schemes for name, about in sorted(_FOUND[scheme]().items())]


def data_sets() -> list[Entry]:
    """List the data sets that have a name."""
    about = "your own data: a function that returns a Task, or an object like idap.data.tensors.Splits"
    own = Entry("python:FILE.py:NAME", about)
    return [*_entries(DATA_SETS), own]


def criteria() -> list[Entry]:
    """List the criteria that have a name."""
    return _entries(CRITERIA)


def recipes(folder: Path = Path()) -> list[Entry]:
    """List the recipes that come with idap, and those in a folder and its `recipes/`.

    Args:
        folder: folder with recipes of the user; by default the working folder.

    Returns:
        An entry per file, described by its first comment.
    """
    files = [*folder.glob("*.toml"), *folder.glob("recipes/*.toml"), *shipped_recipes().values()]
    found = {file.resolve(): file for file in reversed(files)}
    about = {file: _first_comment(file) for file in found.values() if _is_recipe(file)}
    return sorted((Entry(str(file), line) for file, line in about.items()), key=lambda entry: entry.name)


LISTS: Mapping[str, tuple[Callable[[], list[Entry]], str]] = {
    "models": (models, "networks by name, for --model and model.build"),
    "data": (data_sets, "data sets by name, for data.name"),
    "criteria": (criteria, "criteria of divergence, for --criterion and compress.criterion"),
    "recipes": (recipes, "TOML files for idap compress"),
}


def find_entries(kind: str, words: Sequence[str] = ()) -> list[Entry]:
    """List one kind of names.

    Args:
        kind: models, data, criteria or recipes.
        words: words that the name or its description must contain, in upper or lower case.

    Returns:
        The entries that contain all words.

    Raises:
        ConfigError: there is no such kind.

    Example:
        >>> [entry.name for entry in find_entries("criteria", ["LOSS"])]
        ['taylor', 'fisher']
    """
    if kind not in LISTS:
        near = difflib.get_close_matches(kind, LISTS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"the lists are {', '.join(LISTS)}."
        raise ConfigError(f"there is no list of {kind!r}; {advice}")
    low = [word.lower() for word in words]
    return [entry for entry in LISTS[kind][0]() if all(word in f"{entry.name} {entry.about}".lower() for word in low)]


def _entries(table: Mapping[str, str]) -> list[Entry]:
    return [Entry(name, about) for name, about in table.items()]


def _is_recipe(file: Path) -> bool:
    return re.search(r"^\[model\]\s*$", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) is not None


def _first_comment(file: Path) -> str:
    first = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""


_REGISTERED = re.compile(
    r"^@register_model\b(?:\((?:name=[\"'](?P<name>[^\"']+)[\"'])?\))?\s*\n"  # the decorator, with or without a name
    r"(?:@[^\n]*(?:\([^)]*\))?[^\n]*\n|[ )][^\n]*\n)*"  # further decorators
    r"def (?P<function>\w+)\(.*?\)(?:\s*->\s*[^\n]*?)?:[ \t]*(?:#[^\n]*)?\n"
    r"(?:\s+r?\"\"\"\s*(?P<about>[^\n]*))?",
    re.MULTILINE | re.DOTALL,
)


def _registry_models(package: str, folder: str) -> dict[str, str]:
    """The models in the registry of a package: name -> first line of the docstring."""
    return {
        found["name"] or found["function"]: _plain(found["about"] or "")
        for text in _sources(package, f"{folder}/**/*.py")
        for found in _REGISTERED.finditer(text)
    }


def _model_types() -> dict[str, str]:
    """The model types of transformers: name -> class of the configuration."""
    found: dict[str, str] = {}
    for text in _sources("transformers", "models/auto/*.py"):
        if "\nCONFIG_MAPPING_NAMES" in text:
            found |= re.findall(r'"([^"]+)"[,:] "((?!AutoConfig")\w+Config)"', text)
    return found


def _sources(package: str, pattern: str) -> Iterator[str]:
    # Look in the usual places first: other finders may import packages, which takes time.
    spec = PathFinder.find_spec(package) or importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return
    for file in sorted(Path(spec.origin).parent.glob(pattern)):
        yield file.read_text(encoding="utf-8", errors="replace")


def _plain(line: str) -> str:
    """The first line of a docstring without its markup.

    >>> _plain('ResNet-50 from `Deep Residual Learning <https://arxiv.org>`__.')
    'ResNet-50 from Deep Residual Learning'
    """
    line = re.sub(r"`+([^`<]*?)\s*(?:<[^`]*)?`+_*", r"\1", line.removesuffix('"""').strip())
    return line.strip(" `.:")


_FOUND: Mapping[str, Callable[[], Mapping[str, str]]] = {
    "idap": lambda: OWN_MODELS,
    "torchvision": lambda: _registry_models("torchvision", "models"),
    "timm": lambda: _registry_models("timm", "models"),
    "transformers": _model_types,
}
