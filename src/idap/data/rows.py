"""Reads the rows of CSV, TSV and JSON Lines files, compressed with gzip or not, and finds their columns."""

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from idap.data.layout import PACKED, check_path, find_part, parts_in
from idap.errors import ConfigError, TaskError

SUFFIXES = (".csv", ".tsv", ".jsonl")
KNOWN: Mapping[str, tuple[str, ...]] = {
    "label": ("label", "labels", "class", "target", "category", "sentiment", "y"),
    "text": ("text", "sentence", "sentence1", "premise", "question", "question1", "review", "content", "title"),
    "pair": ("text_pair", "text2", "sentence2", "hypothesis", "question2", "answer"),
    "split": ("split", "part", "set"),
}
"""Kind of column -> names that are found without a setting, in the order of the search."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns; None if there is no such column."""

    text: str
    label: str
    pair: str | None
    split: str | None

    def __str__(self) -> str:
        texts = f"column {self.text!r}" if self.pair is None else f"columns {self.text!r} and {self.pair!r}"
        split = f", the parts in {self.split!r}" if self.split is not None else ""
        return f"the texts are in {texts}, the labels in {self.label!r}{split}"


@dataclass(frozen=True)
class Row:
    """One sample, and its place in a file, for errors."""

    text: str
    pair: str | None
    label: str
    where: str


def read_parts(path: str | Path, wanted: Mapping[str, str | None]) -> tuple[dict[str, list[Row]], Columns]:
    """Read a table, or a folder of one table per part.

    Args:
        path: a `.csv`, `.tsv` or `.jsonl` file, with `.gz` or not, or a folder with train, val and test.
        wanted: "text", "pair", "label" and "split" -> the column's name, None to look for it.

    Returns:
        Part -> its rows (only "train" if neither a column nor a folder names parts), and the columns.

    Raises:
        TaskError: a file is missing or broken, or a row lacks a value.
        ConfigError: a column does not exist, or is not found.
    """
    place = check_path(path, "a .csv, .tsv or .jsonl file, or a folder with train.tsv and so on")
    if place.is_file():
        records = list(read_records(place))
        columns = find_columns(list(records[0][1]), wanted, str(place))
        return _by_split(records, columns, place), columns
    parts = parts_in(place, lambda file: file.is_file() and _suffix(file) in SUFFIXES, "a .csv, .tsv or .jsonl file")
    read = {part: list(read_records(file)) for part, file in parts.items()}
    columns = find_columns(list(read["train"][0][1]), {**wanted, "split": None}, str(parts["train"]), splits=False)
    return {part: [_row(each, columns) for each in records] for part, records in read.items()}, columns


def read_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a table row by row.

    Args:
        file: CSV with quotes where they are needed, TSV without, or JSON Lines; the suffix decides.

    Yields:
        The place of a row, such as `data.csv, line 3`, and column -> value.

    Raises:
        TaskError: the file has another suffix, is empty or broken, or rows differ in their columns.
    """
    suffix = _suffix(file)
    if suffix not in SUFFIXES:
        raise TaskError(f"{file} is not a known kind of table, expected {', '.join(SUFFIXES)}, with .gz or without.")
    text = read_text(file)
    read = (
        _json_lines(text, file)
        if suffix == ".jsonl"
        else _read_separated(text, file, "\t" if suffix == ".tsv" else ",")
    )
    empty = True
    for row in read:
        empty = False
        yield row
    if empty:
        expected = "one object per line" if suffix == ".jsonl" else "a header and rows below it"
        raise TaskError(f"{file} holds no rows; expected {expected}.")


def read_text(file: Path) -> str:
    """Read a text in UTF-8, compressed with gzip or not.

    Raises:
        TaskError: it can't be read.
    """
    try:
        content = file.read_bytes()
        return (gzip.decompress(content) if file.suffix in PACKED else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{file} can't be read: {error}.") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{file} is not a text in UTF-8 ({error.reason} at byte {error.start}); convert it.") from error


def find_columns(
    header: Sequence[str], wanted: Mapping[str, str | None], where: str, *, splits: bool = True
) -> Columns:
    """Find the columns of texts, pairs, labels and parts.

    Args:
        header: names of the columns.
        wanted: as for `read_parts`.
        where: file that the errors name.
        splits: whether a column may name the part of each row.

    Raises:
        ConfigError: a column that is named does not exist, or one that is needed is not found.

    Example:
        >>> str(find_columns(["split", "label", "sentence"], {}, "sst2.tsv"))
        "the texts are in column 'sentence', the labels in 'label', the parts in 'split'"
    """
    lower = {name.strip().lower(): name for name in header}
    found: dict[str, str | None] = {}
    for kind in ("label", "split", "text", "pair") if splits else ("label", "text", "pair"):
        named = wanted.get(kind)
        if named is not None and named not in header:
            near = difflib.get_close_matches(named, header, n=1)
            advice = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(
                f"{where} has no column {named!r} (data.{kind}); its columns are {', '.join(map(repr, header))}{advice}"
            )
        guessed = next((lower[name] for name in KNOWN[kind] if name in lower), None)
        # A pair is searched for only if the text is: a setting that names only the text means a single text.
        looked_for = kind != "pair" or wanted.get("text") is None
        found[kind] = named if named is not None else guessed if looked_for else None
    others = [name for name in header if name not in found.values()]
    if found["text"] is None and found["label"] is not None and len(others) == 1:
        found["text"] = others[0]
    for kind in ("label", "text"):
        if found[kind] is None:
            raise ConfigError(
                f"{where}: it is not clear which column holds the {kind}s; the columns are "
                f"{', '.join(map(repr, header))}. Set data.{kind} = {json.dumps((others or list(header))[0])}, or "
                "another of them."
            )
    text, label = found["text"], found["label"]
    assert text is not None and label is not None
    return Columns(text=text, label=label, pair=found["pair"], split=found.get("split"))


def _by_split(records: Sequence[tuple[str, dict[str, Any]]], columns: Columns, file: Path) -> dict[str, list[Row]]:
    if columns.split is None:
        return {"train": [_row(record, columns) for record in records]}
    parts: dict[str, list[Row]] = {}
    for record in records:
        where, values = record
        part = find_part(str(values.get(columns.split)))
        if part is None:
            raise TaskError(
                f"{where}: {columns.split!r} is {values.get(columns.split)!r}, expected train, val (or dev) or test."
            )
        parts.setdefault(part, []).append(_row(record, columns))
    if "train" not in parts:
        raise TaskError(f"{file}: no row has {columns.split!r} = 'train'.")
    return parts


def _row(record: tuple[str, dict[str, Any]], columns: Columns) -> Row:
    where, values = record
    for name in (columns.text, columns.label, *([] if columns.pair is None else [columns.pair])):
        if values.get(name) is None:
            raise TaskError(f"{where}: there is no value for {name!r}.")
    pair = None if columns.pair is None else str(values[columns.pair])
    return Row(str(values[columns.text]), pair, _label(values[columns.label]), where)


def _label(value: Any) -> str:
    # JSON has true, false and numbers; 1.0 and 1 are one label.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _read_separated(text: str, file: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise TaskError(f"{file}: two columns have the same name; its header is {', '.join(map(repr, header))}.")
        for row in reader:
            if not row:
                continue
            where = f"{file}, line {reader.line_num}"
            if len(row) != len(header):
                raise TaskError(f"{where}: it has {len(row)} values, the header {len(header)} columns.")
            yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise TaskError(f"{file}, line {reader.line_num}: {error}.") from error


def _json_lines(text: str, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(f"{where} is not JSON: {error}.") from error
        if not isinstance(found, dict):
            raise TaskError(f"{where} is {type(found).__name__}, expected an object with the columns as keys.")
        yield where, found


def _suffix(file: Path) -> str:
    return (file.with_suffix("") if file.suffix in PACKED else file).suffix.lower()
