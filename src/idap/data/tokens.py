"""Loads tokenizers of transformers, from a folder or the hub, and turns texts into token numbers."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from idap.errors import TaskError

BYTES = "bytes"
FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
"""A folder with a tokenizer holds at least one of these files."""


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer of transformers.

    Args:
        name: a folder, or a name on the hub.

    Returns:
        The tokenizer.

    Raises:
        TaskError: there is no such tokenizer, or transformers is missing.
    """
    library = _transformers(name)
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).is_file() for file in FILES):
        raise TaskError(
            f"{folder} holds no tokenizer: none of {', '.join(FILES)}. Save the model's tokenizer there with "
            "tokenizer.save_pretrained(...), or set data.tokenizer to a folder that has one."
        )
    try:
        return library.AutoTokenizer.from_pretrained(folder if folder.is_dir() else name, trust_remote_code=False)
    except Exception as error:  # whatever a broken file or a failed download raises
        raise TaskError(
            f"the tokenizer {name!r} can't be loaded: {type(error).__name__}: {_first_line(error)}. Set data.tokenizer "
            "to a folder that holds one, or to the name of one on the hub."
        ) from error


def token_numbers(text: str, tokenizer: str) -> Tensor:
    """Turn a text into the numbers of its tokens, without special tokens.

    Args:
        text: a text of any length.
        tokenizer: as for `load_tokenizer`, or "bytes": each byte of the text in UTF-8 is a token.

    Returns:
        int64 `(T,)`.

    Raises:
        TaskError: there is no such tokenizer.

    Example:
        >>> token_numbers("né", "bytes").tolist()
        [110, 195, 169]
    """
    if tokenizer == BYTES:
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() if text else torch.zeros(0).long()
    loaded = load_tokenizer(tokenizer)
    return torch.tensor(loaded(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def check_tokens(largest: int, vocabulary: int | None) -> None:
    """Refuse tokens that are not in the model's vocabulary.

    Args:
        largest: the largest token number.
        vocabulary: number of tokens in the model's vocabulary; None: not known here.

    Raises:
        TaskError: there are such tokens.
    """
    if vocabulary is not None and largest >= vocabulary:
        raise TaskError(
            f"token {largest} is not among the model's {vocabulary} tokens: the tokenizer belongs to another model. "
            "Set data.tokenizer to the model's own."
        )


def check_length(longest: int, positions: int | None, key: str) -> None:
    """Refuse texts that are longer than the model can read.

    Args:
        longest: number of tokens in the longest text.
        positions: largest number of tokens that the model can read; None, or less than 1: any number, or not known.
        key: the key of `[data]` that says how long texts may be.

    Raises:
        TaskError: there are such texts.
    """
    if positions is not None and 0 < positions < longest:
        raise TaskError(
            f"the longest text has {longest} tokens, and the model has {positions} positions. Truncate the texts: "
            f"data.{key} = {positions}, or less."
        )


def _transformers(name: str) -> ModuleType:
    try:
        import transformers  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise TaskError(
            f"the tokenizer {name!r} needs transformers, which is missing. Run: pip install 'idap[text]'"
        ) from error
    return transformers


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
