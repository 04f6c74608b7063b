"""Data sets and models so small that a run over them takes seconds; nothing here is downloaded."""

import gzip
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

WORDS = ("good", "fine", "great", "bad", "poor", "awful", "the", "film", "was", "very")


def write_image(file, colour, *, size=(24, 20), noise=0):
    """A coloured image with a little noise, `size` is width and height."""
    file.parent.mkdir(parents=True, exist_ok=True)
    dice = np.random.default_rng(noise)
    pixels = np.clip(np.array(colour) + dice.integers(-20, 20, (size[1], size[0], 3)), 0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(file)


def image_folder(folder, *, parts=("train", "val", "test"), count=12):
    """Red cats and blue dogs."""
    for part in parts:
        for name, colour in (("cat", (200, 40, 40)), ("dog", (40, 40, 200))):
            for number in range(count):
                write_image(folder / part / name / f"{number}.png", colour, noise=number)
    return folder


def mask_folder(folder, *, parts=("train", "val", "test"), count=8, size=(16, 16)):
    """Images whose left part is red; the mask is 1 there, 0 elsewhere, and 255 in one corner."""
    for part in parts:
        (folder / part / "images").mkdir(parents=True)
        (folder / part / "masks").mkdir()
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
            border = 3 + number % 8
            pixels[:, :border, 0] += 150
            mask = np.zeros((size[1], size[0]), dtype=np.uint8)
            mask[:, :border] = 1
            mask[-1, -1] = 255
            Image.fromarray(pixels).save(folder / part / "images" / f"{number}.png")
            Image.fromarray(mask).save(folder / part / "masks" / f"{number}.png")
    return folder


def sentence(number):
    """A sentence and whether it is kind."""
    dice = np.random.default_rng(number)
    kind = bool(dice.integers(2))
    word = WORDS[dice.integers(3) + (0 if kind else 3)]
    return " ".join(["the film was", *["very"] * int(dice.integers(3)), word]), "positive" if kind else "negative"


def table(file, *, count=64, split=True, header=("sentence", "label")):
    """Sentences with labels; the suffix of the file tells the form, `.gz` packs it."""
    rows = []
    for number in range(count):
        part = ("train", "train", "dev", "test")[number % 4]
        values = dict(zip(header, sentence(number), strict=True))
        rows.append({"split": part, **values} if split else values)
    name = file.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        mark = "\t" if name.endswith(".tsv") else ","
        text = "".join(mark.join(row) + "\n" for row in [list(rows[0]), *(row.values() for row in rows)])
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def tokenizer(folder: Path):
    """A tokenizer that knows the words above."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: place for place, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    inner = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    made.save_pretrained(folder)
    return made


def classifier_folder(folder: Path, *, labels=("negative", "positive"), tokens=True):
    """A tiny BERT that classifies, with its tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    if tokens:
        tokenizer(folder)
    return folder


def language_folder(folder: Path, *, vocabulary=256):
    """A tiny GPT-2 of 256 tokens, for bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def text_file(file, *, lines=120):
    """Sentences, one per line; `.gz` packs it."""
    text = "".join(f"{sentence(number)[0]}\n" for number in range(lines)).encode()
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return file


def idx(array):
    """The bytes of an idx file of unsigned bytes."""
    array = np.asarray(array, dtype=np.uint8)
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def grey_images(count, seed=0):
    """Grey images of 8x8 pixels whose bright half tells one of two classes."""
    dice = np.random.default_rng(seed)
    images, labels = dice.integers(0, 80, (count, 8, 8), dtype=np.uint8), np.arange(count) % 2
    images[labels == 1, :4] += 150
    return images, labels.astype(np.uint8)
