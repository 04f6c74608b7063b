"""Language modelling: each token in a block of text is predicted from those before it."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from idap.data.layout import check_count, check_path, check_share, parts_in
from idap.data.rows import read_text
from idap.data.tensors import TensorLoader
from idap.data.tokens import check_length, check_tokens, token_numbers
from idap.errors import ConfigError, TaskError
from idap.training.batch import Batch, Inputs, Outputs, default_logits
from idap.training.task import Task

if TYPE_CHECKING:
    from torchmetrics import Metric

Measure = Literal["perplexity", "token_accuracy"]
SUFFIXES = (".txt", ".text", ".md", ".gz")


def language(  # noqa: PLR0913 - one argument per key of a recipe
    path: str | Path,
    *,
    tokenizer: str | None = None,
    length: int = 128,
    batch_size: int = 16,
    metric: Measure = "perplexity",
    val_share: float = 0.1,
    test_share: float = 0.1,
    use_cache: bool | None = None,
    vocabulary: int | None = None,
    positions: int | None = None,
) -> Task:
    """Load a text, for a model that predicts the next token.

    Args:
        path: a text file in UTF-8, compressed with gzip or not, or a folder with train.txt, and optionally val.txt and
            test.txt.
        tokenizer: a folder of transformers, a name on the hub, or "bytes"; if left out of a recipe, the model's.
        length: tokens in a block; a shorter rest at the end of a part is not used.
        batch_size: blocks in a batch.
        metric: "perplexity", the exponential of the mean loss over all tokens, lower is better, or "token_accuracy",
            the share of tokens that are predicted correctly.
        val_share: share of the tokens, after the training tokens, that is used for validation if there is no val.txt.
        test_share: share of the tokens, at the end of the text, that is used for the test if there is only one file.
        use_cache: passed to the model; False keeps models of transformers from returning keys and values. None: nothing
            is passed.
        vocabulary: number of tokens in the model's vocabulary.
        positions: largest number of tokens in a text that the model can read.

    Returns:
        A `Task`; batches are int64 `(B, length)`, the model gives logits `(B, length, V)`.

    Raises:
        TaskError: a file or the tokenizer is missing, or a part is shorter than a block.
        ConfigError: a setting is out of range.
    """
    check_count("length", length, 2)
    if metric not in ("perplexity", "token_accuracy"):
        raise ConfigError(f"metric must be 'perplexity' or 'token_accuracy', got {metric!r}.")
    if tokenizer is None:
        raise ConfigError(
            'no tokenizer is given: set data.tokenizer to a folder of transformers, or to "bytes" for a model of 256 '
            "tokens."
        )
    parts, notes = _parts(check_path(path, "a text file, or a folder with train.txt"), tokenizer, val_share, test_share)
    blocks = {part: _blocks(tokens, length, part, path) for part, tokens in parts.items()}
    check_tokens(max(int(tokens.max()) for tokens in blocks.values()), vocabulary)
    check_length(length, positions, "length")
    test = TensorLoader((blocks["test"],), batch_size) if "test" in blocks else None
    train = TensorLoader((blocks["train"],), batch_size, shuffle=True)
    val = TensorLoader((blocks["val"],), batch_size)
    return language_modelling(train, val, test=test, metric=metric, use_cache=use_cache, notes=notes)


def language_modelling(
    train: Iterable[Batch],
    val: Iterable[Batch],
    *,
    test: Iterable[Batch] | None = None,
    metric: Measure = "perplexity",
    use_cache: bool | None = None,
    notes: tuple[str, ...] = (),
) -> Task:
    """Build the task of predicting the next token.

    Args:
        train: training batches `(tokens,)` with tokens `(B, T)`, int64, all of which count.
        val: validation batches.
        test: test batches, which are used only once, at the end.
        metric: as for `language`.
        use_cache: as for `language`.
        notes: what a reader of the run should know.
    """

    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        logits, following = _shift(outputs, batch)
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())

    def token_accuracy(outputs: Outputs, batch: Batch) -> Tensor:
        logits, following = _shift(outputs, batch)
        return (logits.argmax(-1) == following).float().mean()

    def update(found: "Metric", outputs: Outputs, batch: Batch) -> None:
        found.update(*_shift(outputs, batch))

    def inputs(batch: Batch) -> Inputs:
        return (batch[0],), {} if use_cache is None else {"use_cache": use_cache}

    if metric == "token_accuracy":
        return Task(
            train=train, val=val, test=test, loss=loss, metric=token_accuracy, metric_name="token accuracy",
            inputs=inputs, notes=notes,
        )  # fmt: skip
    from torchmetrics.text import Perplexity  # noqa: PLC0415 - slow to import

    return Task(
        train=train, val=val, test=test, loss=loss, metric=Perplexity(), metric_name="perplexity",
        higher_is_better=False, update=update, inputs=inputs, notes=notes,
    )  # fmt: skip


def _parts(
    path: Path, tokenizer: str, val_share: float, test_share: float
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tokens of each part, and notes about them."""
    if path.is_dir():
        files = parts_in(path, lambda file: file.is_file() and file.suffix in SUFFIXES, "a .txt file")
        parts = {part: token_numbers(read_text(file), tokenizer) for part, file in files.items()}
        test_share = 0.0
    else:
        parts = {"train": token_numbers(read_text(path), tokenizer)}
        check_share("test_share", test_share)
    if "val" in parts:
        return parts, ()
    check_share("val_share", val_share)
    if val_share + test_share >= 1:
        raise ConfigError(f"val_share and test_share are {val_share:g} and {test_share:g}; none is left for train.")
    tokens = parts["train"]
    total = len(tokens)
    end = total - round(test_share * total)
    start = end - round(val_share * total)
    parts["train"], parts["val"] = tokens[:start], tokens[start:end]
    if test_share:
        parts["test"] = tokens[end:]
    last = f", the last {total - end:,} for the test at the end" if test_share else ""
    note = f"the first {start:,} of {total:,} tokens are used for training, the next {end - start:,} for validation"
    return parts, (f"{note}{last}",)


def _blocks(tokens: Tensor, length: int, part: str, path: str | Path) -> Tensor:
    count = len(tokens) // length
    if not count:
        raise TaskError(
            f"{path}: the {part} part has {len(tokens)} tokens, fewer than one block of {length}. Give more text, or a "
            "smaller data.length."
        )
    return tokens[: count * length].reshape(count, length)


def _shift(outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits of all tokens but the last, and the tokens that follow."""
    logits, tokens = default_logits(outputs), batch[0]
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise TaskError(
            f"the model's logits have shape {tuple(logits.shape)} for tokens of shape {tuple(tokens.shape)}; language "
            f"modelling expects ({tokens.shape[0]}, {tokens.shape[1]}, V)."
        )
    if int(tokens.max()) >= logits.shape[-1]:
        raise TaskError(
            f"token {int(tokens.max())} is not among the model's {logits.shape[-1]} tokens; the tokenizer belongs to "
            "another model."
        )
    return logits[:, :-1], torch.as_tensor(tokens[:, 1:])
