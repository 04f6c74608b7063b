"""Texts as blocks of tokens: parts that don't overlap, perplexity over all tokens, and clear refusals."""

import math

import pytest
import torch
from torch import nn

from idap.data.language import language
from idap.errors import ConfigError, TaskError
from idap.training.check import check_task
from idap.training.evaluate import evaluate
from tests.data import small_data

BYTES = {"tokenizer": "bytes"}


class Uniform(nn.Module):
    """Every one of 256 tokens is as likely."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        return self.scale * torch.nn.functional.one_hot(tokens, 256).float()


def text_of(loader):
    return bytes(torch.cat([tokens for (tokens,) in loader]).flatten().tolist()).decode()


class TestParts:
    @pytest.mark.parametrize("name", ["t.txt", "t.txt.gz"])
    def test_one_file_is_split_in_order(self, tmp_path, name):
        task = language(small_data.text_file(tmp_path / name), length=8, **BYTES)
        whole = small_data.text_file(tmp_path / "whole").read_text()
        total = len(whole)
        val, test = text_of(task.val), text_of(task.test)
        end = total - round(0.1 * total)
        start = end - round(0.1 * total)
        assert whole[start:end].startswith(val)
        assert whole[end:].startswith(test)
        assert len(whole[start:end]) - len(val) < 8
        blocks = {bytes(block.tolist()).decode() for (tokens,) in task.train for block in tokens}
        assert blocks == {whole[at : at + 8] for at in range(0, start - 7, 8)}
        assert task.notes == (
            f"the first {start:,} of {total:,} tokens are used for training, the next {end - start:,} for validation, "
            f"the last {total - end:,} for the test at the end",
        )

    def test_a_folder(self, tmp_path):
        for part in ("train", "valid", "test"):
            small_data.text_file(tmp_path / f"{part}.txt", lines=20)
        task = language(tmp_path, length=8, **BYTES)
        assert task.notes == ()
        assert text_of(task.val) == text_of(task.test)

    def test_a_folder_without_val(self, tmp_path):
        small_data.text_file(tmp_path / "train.txt")
        task = language(tmp_path, length=8, **BYTES)
        assert task.test is None
        assert "validation" in task.notes[0]
        assert "test" not in task.notes[0]

    def test_tokens_of_a_tokenizer(self, tmp_path):
        small_data.tokenizer(tmp_path / "words")
        task = language(small_data.text_file(tmp_path / "t.txt"), length=4, tokenizer=str(tmp_path / "words"))
        assert next(iter(task.val))[0].max() < 12


class TestTask:
    def test_perplexity_of_a_model_that_knows_nothing(self, tmp_path):
        task = language(small_data.text_file(tmp_path / "t.txt"), length=8, **BYTES)
        assert not task.higher_is_better
        model = Uniform()
        assert evaluate(model, task) == pytest.approx(256, rel=1e-5)
        batch = next(iter(task.val))
        assert task.loss(task.run(model, batch), batch).item() == pytest.approx(math.log(256), rel=1e-5)
        check_task(model, task)

    def test_token_accuracy(self, tmp_path):
        class Repeats(Uniform):
            def forward(self, tokens):
                return torch.nn.functional.one_hot(tokens, 256).float()

        (tmp_path / "t.txt").write_text("aab" * 400)
        task = language(tmp_path / "t.txt", length=3, metric="token_accuracy", test_share=0.2, **BYTES)
        assert task.higher_is_better
        assert evaluate(Repeats(), task, split="test") == pytest.approx(0.5)  # aab: a->a is right, a->b is not

    @pytest.mark.parametrize(
        ("keys", "text"),
        [
            ({}, "no tokenizer is given"),
            ({**BYTES, "length": 5000}, r"the train part has .* tokens, fewer than one block of 5000"),
            ({**BYTES, "length": 1}, "length must be 2 or more"),
            ({**BYTES, "val_share": 0.6, "test_share": 0.5}, "none is left for train"),
            ({**BYTES, "val_share": 40.0}, "val_share must lie between 0 and 1"),
            ({**BYTES, "metric": "accuracy"}, "metric must be 'perplexity' or 'token_accuracy'"),
            ({**BYTES, "length": 8, "positions": 7}, r"8 tokens, and the model has 7 .*data\.length = 7, or less"),
            (
                {**BYTES, "vocabulary": 100},
                "is not among the model's 100 tokens: the tokenizer belongs to another model",
            ),
        ],
    )
    def test_what_can_be_wrong(self, tmp_path, keys, text):
        with pytest.raises((TaskError, ConfigError), match=text):
            language(small_data.text_file(tmp_path / "t.txt"), **keys)

    def test_a_missing_or_binary_file(self, tmp_path):
        with pytest.raises(TaskError, match="does not exist, expected a text file"):
            language(tmp_path / "none.txt", **BYTES)
        (tmp_path / "b.txt").write_bytes(b"ab\xff\xfe")
        with pytest.raises(TaskError, match=r"is not a text in UTF-8 .invalid start byte at byte 2"):
            language(tmp_path / "b.txt", **BYTES)

    def test_outputs_of_another_shape(self, tmp_path):
        task = language(small_data.text_file(tmp_path / "t.txt"), length=8, **BYTES)
        with pytest.raises(TaskError, match=r"language modelling expects \(16, 8, V\)"):
            evaluate(nn.Sequential(nn.Embedding(256, 4), nn.Flatten()), task)
