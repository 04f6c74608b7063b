"""Text classification from tables: one text or a pair of texts per row, and a label."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from idap.data.layout import check_count, with_val
from idap.data.rows import Columns, Row, read_parts
from idap.data.tokens import check_length, check_tokens, load_tokenizer
from idap.errors import ConfigError, TaskError
from idap.training.task import Task, classification


class Sentences(Dataset[dict[str, Any]]):
    """Texts as token numbers, with their labels.

    Args:
        encoded: name of an input of the model -> a list of numbers for each text.
        labels: number of the label of each text.
    """

    def __init__(self, encoded: Mapping[str, Sequence[Sequence[int]]], labels: Sequence[int]) -> None:
        self.encoded, self.labels = encoded, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {**{name: rows[place] for name, rows in self.encoded.items()}, "labels": self.labels[place]}


class Padding:
    """Puts texts of different lengths into one batch.

    Args:
        fill: name of an input -> the number that pads a text.
        length: length of every batch; None: the length of the longest text in it.
    """

    def __init__(self, fill: Mapping[str, int], length: int | None) -> None:
        self.fill, self.length = fill, length

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return inputs `(B, T)` by name, and labels `(B,)`."""
        batch = {"labels": torch.tensor([sample["labels"] for sample in samples])}
        for name, fill in self.fill.items():
            rows = [sample[name] for sample in samples]
            length = self.length or max(map(len, rows))
            batch[name] = torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])
        return batch


def sentences(  # noqa: PLR0913 - one argument per key of a recipe
    path: str | Path,
    *,
    tokenizer: str | None = None,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    split: str | None = None,
    labels: Sequence[str] | None = None,
    max_length: int = 128,
    pad_to_max: bool = False,
    batch_size: int = 32,
    val_share: float = 0.1,
    seed: int = 0,
    labels_like: Sequence[str] | None = None,
    vocabulary: int | None = None,
    positions: int | None = None,
) -> Task:
    """Load texts with labels from a table, for a model of transformers that classifies them.

    Args:
        path: a `.csv`, `.tsv` or `.jsonl` file, with `.gz` or not, or a folder with train, val and test of that kind.
        tokenizer: a folder of transformers, or a name on the hub; if left out of a recipe, the model's.
        text: column of the texts; if left out, it is found by its name, as are the other columns.
        pair: column of the second texts, if a row holds a pair of texts.
        label: column of the labels.
        split: column that names the part of a row, if there is one file: train, val (or dev) or test.
        labels: the labels in the order of the model's outputs; if left out, those of train, sorted, numbers as numbers.
        max_length: largest number of tokens in a text; longer texts are truncated.
        pad_to_max: pad every batch to `max_length`, not to its longest text.
        batch_size: texts in a batch.
        val_share: share of the training rows that is used for validation if there is no val part.
        seed: seed of that choice.
        labels_like: names of the model's classes; their order is used if they are the labels of train.
        vocabulary: number of tokens in the model's vocabulary.
        positions: largest number of tokens in a text that the model can read.

    Returns:
        A `Task` with cross-entropy and accuracy; batches are dicts of int64 `(B, T)`, with labels `(B,)`.

    Raises:
        TaskError: a file or the tokenizer is missing, a row is broken, or a label is not in train.
        ConfigError: a column does not exist, or a setting is out of range.
    """
    check_count("batch_size", batch_size)
    check_count("max_length", max_length)
    if tokenizer is None:
        raise ConfigError("no tokenizer is given: set data.tokenizer to a folder of transformers.")
    rows, columns = _parts(path, text, pair, label, split)
    names = _check_labels(rows, _order_labels(rows["train"], labels, labels_like))
    notes = (str(columns), f"labels are {', '.join(f'{place} = {name!r}' for place, name in enumerate(names))}")
    parts, split_notes = with_val(rows, val_share, seed, "rows")
    loaded = load_tokenizer(tokenizer)
    read = {part: _encode(rows, names, loaded, max_length) for part, rows in parts.items()}
    _check_read(read, vocabulary, positions)
    padding = Padding(_fill(loaded, read["train"]), max_length if pad_to_max else None)
    loader = partial(DataLoader, batch_size=batch_size, collate_fn=padding)
    sets = {part: loader(samples, shuffle=part == "train") for part, samples in read.items()}
    task = classification(sets["train"], sets["val"], test=sets.get("test"), num_classes=len(names))
    return replace(task, notes=(*notes, *split_notes))


def label_names(
    path: str | Path,
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    split: str | None = None,
    labels: Sequence[str] | None = None,
) -> list[str]:
    """The labels of a table, in the order of the model's outputs.

    Raises:
        TaskError, ConfigError: as for `sentences`.
    """
    return _order_labels(_parts(path, text, pair, label, split)[0]["train"], labels)


def _parts(
    path: str | Path, text: str | None, pair: str | None, label: str | None, split: str | None
) -> tuple[dict[str, list[Row]], Columns]:
    return read_parts(path, {"text": text, "pair": pair, "label": label, "split": split})


def _order_labels(rows: Sequence[Row], labels: Sequence[str] | None, like: Sequence[str] | None = None) -> list[str]:
    found = {row.label for row in rows}
    by_lower = {name.lower(): name for name in found}
    if labels is None and like is not None and sorted(by_lower) == sorted(name.lower() for name in like):
        return [by_lower[name.lower()] for name in like]
    if labels is not None:
        missing = sorted(found - set(labels))
        if missing:
            row = next(row for row in rows if row.label == missing[0])
            raise ConfigError(f"{row.where}: label {row.label!r} is not in data.labels, {list(labels)}.")
        return list(labels)
    if len(found) < 2:
        raise TaskError(f"{rows[0].where}: train has the one label {rows[0].label!r}; expected two or more.")
    if all(name.lstrip("-").isdecimal() for name in found):
        numbers = sorted(map(int, found))
        if numbers == list(range(len(numbers))):
            return [str(number) for number in numbers]
        return sorted(found, key=int)
    return sorted(found)


def _check_labels(parts: Mapping[str, Sequence[Row]], names: list[str]) -> list[str]:
    for row in chain.from_iterable(parts.values()):
        if row.label not in names:
            raise TaskError(
                f"{row.where}: label {row.label!r} is not in train, whose labels are "
                f"{', '.join(map(repr, names[:8]))}{', ...' if len(names) > 8 else ''}."
            )
    return names


def _encode(rows: Sequence[Row], names: Sequence[str], tokenizer: Any, max_length: int) -> Sentences:
    pairs = None if rows[0].pair is None else [row.pair for row in rows]
    encoded = tokenizer([row.text for row in rows], pairs, truncation=True, max_length=max_length, verbose=False)
    for row, tokens in zip(rows, encoded["input_ids"], strict=True):
        if not tokens:
            raise TaskError(f"{row.where}: the text {row.text!r:.60} has no tokens; remove the row.")
    places = {name: place for place, name in enumerate(names)}
    return Sentences(dict(encoded), [places[row.label] for row in rows])


def _check_read(read: Mapping[str, Sentences], vocabulary: int | None, positions: int | None) -> None:
    """Refuse tokens that are not in the model's vocabulary, and texts that are too long for it."""
    rows = [row for part in read.values() for row in part.encoded["input_ids"]]
    check_tokens(max(map(max, rows)), vocabulary)
    check_length(max(map(len, rows)), positions, "max_length")


def _fill(tokenizer: Any, read: Sentences) -> dict[str, int]:
    """The number that pads a text, for each input."""
    if tokenizer.pad_token_id is None:
        raise TaskError(
            "the tokenizer has no token for padding, so texts of different lengths can't form a batch. Give it one: "
            "tokenizer.pad_token = tokenizer.eos_token, and save it again; the model's config needs pad_token_id too."
        )
    known = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "attention_mask": 0}
    strange = sorted(set(read.encoded) - set(known))
    if strange:
        raise TaskError(
            f"the tokenizer gives {strange[0]!r}, for which no padding is known; expected {', '.join(known)}."
        )
    return {name: known[name] for name in read.encoded}
