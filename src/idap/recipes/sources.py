"""Data sets by name, with their keys, classes and shapes.

A new one gets a row here, its loader in `idap.data`, and its name in `idap.recipes.catalogue.DATA_SETS`.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idap.data.images import class_names, imagefolder
from idap.data.language import language
from idap.data.masks import mask_classes, masks
from idap.data.mnist import mnist, mnist_classes
from idap.data.sentences import label_names, sentences
from idap.data.tensors import cifar10, digits
from idap.models.pretrained import Head
from idap.recipes.sections import DataSection
from idap.script import PREFIX, is_script

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A data set by name.

    Attributes:
        build: returns a `Task`, or splits of images to classify, with train, val, test and num_classes; its arguments
            are keys of `[data]`.
        what: a description of one line.
        head: the kind of head that a model of transformers needs for it.
        path: what PATH is; "" if the data set has no path.
        classes: counts the classes, from the same arguments; None if outputs are not classes.
        shape: returns the shape of one sample, from the same arguments; None if it is known only from the data.
        bounded: whether the metric lies between 0 and 1, so that a drop above 1 is a mistake.
    """

    build: Callable[..., Any]
    what: str
    head: Head
    path: str = ""
    classes: Callable[..., int] | None = None
    shape: Callable[..., Shape | None] | None = None
    bounded: bool = True

    def key_names(self) -> list[str]:
        """The keys of `[data]` that this data set has, in order."""
        hidden = {"labels_like", "vocabulary", "positions", "use_cache"}  # these values come from the model
        return [name for name in inspect.signature(self.build).parameters if name not in hidden]


def _ten_classes() -> int:
    return 10


def _square(size: int = 224) -> Shape:
    return (3, size, size)


def _mask_shape(size: Any = None) -> Shape | None:
    if size is None:
        return None
    return (3, size, size) if isinstance(size, int) else (3, *size)


_MNIST = Source(
    mnist,
    "grey images in the format of MNIST",
    "image",
    path="a .npz file, or a folder with the four idx files",
    classes=mnist_classes,
)
SOURCES: Mapping[str, Source] = {
    "digits": Source(
        digits, "1,797 handwritten digits of 8x8 pixels, part of scikit-learn", "image", classes=_ten_classes,
        shape=lambda: (1, 8, 8),
    ),
    "cifar10": Source(
        cifar10, "CIFAR-10 in two .npz files", "image", path="the folder of the two files", classes=_ten_classes,
        shape=lambda: (3, 32, 32),
    ),
    "mnist": _MNIST,
    "fashion_mnist": _MNIST,
    "imagefolder": Source(
        imagefolder, "images in one folder per class", "image", path="a folder with train/CLASS/*.jpg",
        classes=lambda path: len(class_names(path)), shape=_square,
    ),
    "csv": Source(
        sentences, "texts with labels in CSV, TSV or JSON Lines", "sequence",
        path="a .csv, .tsv or .jsonl file, or a folder of them",
        classes=lambda path, text=None, pair=None, label=None, split=None, labels=None: len(
            label_names(path, text=text, pair=pair, label=label, split=split, labels=labels)
        ),
    ),
    "text": Source(
        language, "a text, to predict the next token", "language",
        path="a text file, or a folder of them", bounded=False,
    ),
    "masks": Source(
        masks, "images with masks, to predict the class of each pixel", "segmentation",
        path="a folder with train/images and train/masks",
        classes=lambda path, classes=None, ignore=255: classes or mask_classes(path, ignore=ignore), shape=_mask_shape,
    ),
}  # fmt: skip


def parse_data(text: str) -> dict[str, str | None] | None:
    """Parse the name of data on the command line: NAME, NAME:PATH or python:FILE:FUNCTION.

    Args:
        text: the value of `--data`.

    Returns:
        "name" and "path" (None: there is no path); None if the text is only a path.

    Example:
        >>> parse_data("csv:reviews.tsv"), parse_data("digits"), parse_data("/data/images")
        ({'name': 'csv', 'path': 'reviews.tsv'}, {'name': 'digits', 'path': None}, None)
    """
    name, colon, path = text.partition(":")
    if is_script(text):
        return {"name": text, "path": None}
    if name not in SOURCES or (not colon and Path(text).exists()):
        return None
    return {"name": name, "path": path or None}


def advise_name(text: str) -> str:
    """Advise what to write instead of a value that does not name data.

    Args:
        text: the value of `--data`, if nothing else names the data.

    Example:
        >>> advise_name("imagefolders:pets")
        "--data 'imagefolders:pets' names no data set; did you mean imagefolder:pets?"
    """
    name, colon, path = text.partition(":")
    near = difflib.get_close_matches(name, SOURCES, n=1) if colon or not Path(text).exists() else []
    if near:
        advice = f"did you mean {near[0]}{colon}{path}?"
    elif Path(text).exists() and _kind(Path(text)) is not None:
        advice = f"did you mean {_kind(Path(text))}:{text}?"
    else:
        forms = [f"{key}:PATH" if source.path else key for key, source in SOURCES.items()]
        advice = f"write NAME:PATH, one of {', '.join(forms)}, or {PREFIX}FILE.py:FUNCTION."
    return f"--data {text!r} names no data set; {advice}"


def _kind(path: Path) -> str | None:
    """The data set that a path probably holds, guessed from the names of its files; None if that is unclear."""
    names = [path.name] if path.is_file() else [inner.name for inner in path.iterdir()] if path.is_dir() else []
    if any(name.removesuffix(".gz").endswith((".csv", ".tsv", ".jsonl")) for name in names):
        return "csv"
    if any(name.removesuffix(".gz").endswith(".txt") for name in names):
        return "text"
    if "train" in names:
        return "masks" if (path / "train" / "masks").is_dir() else "imagefolder"
    return None


def call_with(function: Callable[..., Any], keys: Mapping[str, Any]) -> Any:
    """Call a function with those keys that it has as parameters."""
    known = inspect.signature(function).parameters
    return function(**{key: value for key, value in keys.items() if key in known})


def data_problems(data: DataSection) -> list[str]:
    """Describe the problems of `[data]`, before the data are read."""
    if is_script(data.name):
        return []
    if data.name not in SOURCES:
        near = difflib.get_close_matches(data.name, SOURCES, n=1)
        advice = f"; did you mean {near[0]}?" if near else ""
        return [f"data.name is {data.name!r}, expected {', '.join(SOURCES)} or {PREFIX}file.py:function{advice}"]
    source = SOURCES[data.name]
    known = source.key_names()
    problems = [
        f"data.{key} is not a key of {data.name}, which takes {', '.join(known)}"
        for key in data.as_table()
        if key not in ("name", "path", *known)
    ]
    if source.path and data.path is None:
        problems.append(f"data.path is missing: give {source.path}, or pass --data {data.name}:PATH")
    if not source.path and data.path is not None:
        problems.append(f"data.path is not a key of {data.name}, which takes {', '.join(known)}")
    return problems
