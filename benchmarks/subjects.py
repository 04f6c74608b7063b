"""The trained networks that several benchmark scripts judge, with the data each is judged on.

subject = build("resnet20", DATA)      # any of NAMES; DATA is the folder of real data sets and weights

Needs the extra text for `llama`. A script that imports more of idap than this file does imports this file first.
"""

import argparse
import os
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.conformance import vision_operators  # noqa: E402 - the project's own environments only

vision_operators.make_importable()

from idap.data.tensors import IMAGENET_MEAN, IMAGENET_STD, normalise, read_delta_images  # noqa: E402
from idap.models.nets import cifar_resnet20, cifar_resnet56  # noqa: E402
from idap.models.weights import load_weights  # noqa: E402

Batch = Any
BATCH = 256
"""Images of a batch."""
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CONTEXT = 128
"""Tokens of a calibration text, the first of which is BOS."""
BOS = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A trained network, in eval mode, and the data that it is judged on.

    Attributes:
        name: one of NAMES.
        model: left as it is; whoever changes it copies it.
        test: batches that are only reported on, never chosen by.
        choosing: real batches to choose settings by, apart from `test`; empty for images, which have `calibration`.
        loss: gives the mean loss of `(outputs, batch)`.
        quality: gives what is reported of a model on `test`, or on other batches: see `metric`.
        metric: "accuracy" in points, higher is better; or "loss" in nats per token, lower is better.
        calibration: `calibration(count, seed)` draws that many samples and gives them in batches.
        inputs: gives the model's positional and keyword arguments of a batch.
        contracts: outputs whose shape must not change, for `analyze`.
        published: what the source of the weights, or of the data, says that `reproduce` must give.
    """

    name: str
    model: nn.Module = field(repr=False)
    test: Sequence[Batch] = field(repr=False)
    choosing: Sequence[Batch] = field(default=(), repr=False)
    loss: Callable[[Any, Batch], Tensor] = field(repr=False)
    quality: Callable[..., float] = field(repr=False)
    metric: str
    calibration: Callable[[int, int], list[Batch]] = field(repr=False)
    inputs: Callable[[Batch], tuple[tuple[Any, ...], dict[str, Any]]] = field(repr=False)
    contracts: tuple[str, ...] | None = None
    published: float

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """Call a model on one batch."""
        args, kwargs = self.inputs(batch)
        return model(*args, **kwargs)

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments to trace the model with: two samples, or the first text, of the test data."""
        first = self.test[0]
        return self.inputs({key: part[:2] for key, part in first.items()} if isinstance(first, dict) else _head(first))

    def reproduce(self) -> float:
        """Measure what `published` states: the quality of the untouched model on all that it has not seen."""
        return self.quality(self.model, [*self.choosing, *self.test])


def build(name: str, data: str | Path) -> Subject:
    """Build a subject by name.

    Args:
        name: one of NAMES.
        data: the folder with `cifar10_*.npz`, `tinystories_sample.txt` and `weights/`.
    """
    if name not in BUILDERS:
        raise ValueError(f"there is no subject {name!r}; subjects are {', '.join(BUILDERS)}.")
    return BUILDERS[name](Path(data))


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """Give a script the option `--data`, by default what the environment says."""
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("IDAP_DATA"),
        required="IDAP_DATA" not in os.environ,
        help="folder of real data sets and weights (default: environment variable IDAP_DATA)",
    )


# Images


def resnet20(data: Path) -> Subject:
    """ResNet-20 on CIFAR-10: see `_image_subject` for what is used for what."""
    model = cifar_resnet20()
    load_weights(model, data / "weights" / "cifar10_resnet20.safetensors")
    return _image_subject("resnet20", model, data, scale=(IMAGENET_MEAN, IMAGENET_STD), published=91.73)


def resnet56(data: Path) -> Subject:
    """ResNet-56 on CIFAR-10: see `_image_subject` for what is used for what."""
    model = cifar_resnet56()
    load_weights(model, data / "weights" / "cifar10_resnet56.safetensors")
    return _image_subject("resnet56", model, data, scale=(IMAGENET_MEAN, IMAGENET_STD), published=93.39)


def vit(data: Path) -> Subject:
    """A ViT on CIFAR-10: see `_image_subject` for what is used for what.

    Torch's fused inference path of transformer layers is turned off, for the whole process: it calls neither the
    linear layers nor the attention of a block, so that nothing could be seen of them.
    """
    torch.backends.mha.set_fastpath_enabled(False)
    model = CifarViT()
    load_weights(model, data / "weights" / "cifar10_vit_d128_l6.safetensors")
    return _image_subject("vit", model, data, scale=(CIFAR_MEAN, CIFAR_STD), published=73.72)


class PatchEmbedding(nn.Module):
    """Cuts an image into patches, each of which becomes a token.

    Args:
        dim: width of a token D.
        patch: side of a patch.
    """

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, 3, H, W)` to `(B, N, D)`."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class CifarViT(nn.Module):
    """A vision transformer for `(B, 3, 32, 32)` made of torch's own encoder layers, with norms behind the sums.

    Args:
        dim: width of the stream.
        depth: number of encoder layers.
        heads: attention heads of each layer.
        mlp: width inside each MLP.
        patch: side of a patch; divides 32.
        num_classes: outputs.
    """

    def __init__(
        self, *, dim: int = 128, depth: int = 6, heads: int = 8, mlp: int = 256, patch: int = 4, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (32 // patch) ** 2, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, mlp, dropout=0.0, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, 3, 32, 32)` to logits `(B, num_classes)`."""
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        logits: Tensor = self.mlp_head(self.transformer(tokens + self.pos_embed)[:, 0])
        return logits


def _image_subject(
    name: str, model: nn.Module, data: Path, *, scale: tuple[Sequence[float], Sequence[float]], published: float
) -> Subject:
    """A classifier of CIFAR-10.

    Reported on: all 10,000 test images. Calibration: images drawn by seed, without replacement and unaugmented, from
    the 50,000 training images, which the weights have seen. A script that chooses by a score does so on calibration
    images of another seed.
    """
    scaled = partial(normalise, mean=scale[0], std=scale[1])

    def calibration(count: int, seed: int) -> list[Batch]:
        images, labels = read_cifar10(data, "train")
        places = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
        return _image_batches(scaled(images[places]), labels[places])

    images, labels = read_cifar10(data, "test")
    test = _image_batches(scaled(images), labels)
    return Subject(
        name=name,
        model=model.eval(),
        test=test,
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
        quality=lambda model, batches=test: accuracy(model, batches),
        metric="accuracy",
        calibration=calibration,
        inputs=lambda batch: ((batch[0],), {}),
        published=published,
    )


@cache
def read_cifar10(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images, uint8 `(N, 3, 32, 32)`, and labels of "train" or "test"; read once."""
    return read_delta_images(data / f"cifar10_{split}.npz")


def _image_batches(images: Tensor, labels: Tensor) -> list[Batch]:
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def _head(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part[:2] for part in batch)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Points of a classifier on batches `(images, labels)`."""
    hits, count = 0, 0
    for images, labels in batches:
        hits += int((model(images).argmax(1) == labels).sum())
        count += len(labels)
    return 100 * hits / count


# Text


def llama(data: Path) -> Subject:
    """A language model of 260,032 parameters on stories of TinyStories, of which five are at hand.

    Reported on: stories 3 to 5. Choosing: stories 1 and 2. Calibration: texts of 128 tokens that the model itself
    samples by seed at temperature 1, each from BOS on, as no training text is at hand. Every story is one batch, BOS
    in front, none is cut. Perplexity is the exponential of the quality.
    """
    tokenizer = Tokenizer(data / "weights" / "stories260k_tok512.bin")
    model = _stories_model(data / "weights" / "stories260k.safetensors")
    text = (data / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    batches = [{"input_ids": torch.tensor([[BOS, *tokenizer.encode(story)]])} for story in stories]
    test = batches[2:]
    return Subject(
        name="llama",
        model=model,
        test=test,
        choosing=batches[:2],
        loss=_token_loss,
        quality=lambda model, batches=test: _mean_token_loss(model, batches),
        metric="loss",
        calibration=lambda count, seed: [
            {"input_ids": part} for part in sample(model, count, CONTEXT, seed=seed).split(16)
        ],
        inputs=lambda batch: ((), {"input_ids": batch["input_ids"]}),
        contracts=("logits",),
        published=1.266,
    )


class Tokenizer:
    """Tokens of a sentence-piece vocabulary with scores.

    Args:
        path: int32 length of the longest token, then of each token a float32 score, an int32 length and its bytes.
    """

    def __init__(self, path: Path) -> None:
        stored, place = path.read_bytes(), 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while place < len(stored):
            score, length = struct.unpack_from("<fi", stored, place)
            self.scores.append(score)
            self.pieces.append(stored[place + 8 : place + 8 + length])
            place += 8 + length
        self._numbers = {piece: number for number, piece in reversed(list(enumerate(self.pieces)))}

    def encode(self, text: str) -> list[int]:
        """Start from characters, or bytes where there is no such token, and merge the pair of the highest score.

        Returns:
            Numbers of tokens, without BOS. As in sentence-piece, the text gets a space in front.
        """
        tokens: list[int] = []
        for character in f" {text}" if text else "":
            piece = character.encode()
            # Tokens 0 to 2 are special; the 256 bytes follow.
            tokens += [self._numbers[piece]] if piece in self._numbers else [byte + 3 for byte in piece]
        while True:
            merged = [self._numbers.get(self.pieces[left] + self.pieces[right]) for left, right in pairwise(tokens)]
            places = [place for place, new in enumerate(merged) if new is not None]
            if not places:
                return tokens
            best = max(places, key=lambda place: self.scores[merged[place]])  # the first of equals
            tokens[best : best + 2] = [merged[best]]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens that `encode` gave."""
        parts = [bytes([token - 3]) if 3 <= token < 259 else self.pieces[token] for token in tokens]
        return b"".join(parts).decode(errors="replace").removeprefix(" ")


@torch.no_grad()
def sample(model: nn.Module, count: int, length: int, *, seed: int) -> Tensor:
    """Let a language model write texts at temperature 1.

    Returns:
        Tokens of shape `(count, length)`; each text starts with BOS.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((count, 1), BOS)
    past = None
    while tokens.shape[1] < length:
        outputs = model(input_ids=tokens[:, -1:], past_key_values=past, use_cache=True)
        past = outputs.past_key_values
        chosen = torch.multinomial(outputs.logits[:, -1].softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens


def _stories_model(path: Path) -> nn.Module:
    import transformers  # noqa: PLC0415 - an optional extra

    stored = load_safetensors(path.read_bytes())
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=2,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    tensors = {"model.embed_tokens.weight": stored["tok_embeddings.weight"], "model.norm.weight": stored["norm.weight"]}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for number in range(config.num_hidden_layers):
        for ours, theirs in _LAYER_NAMES.items():
            tensor = stored[f"layers.{number}.{theirs}.weight"]
            if ours in ("self_attn.q_proj", "self_attn.k_proj"):
                tensor = _halves(tensor, config.hidden_size // config.num_attention_heads)
            tensors[f"model.layers.{number}.{ours}.weight"] = tensor
    model.load_state_dict(tensors)
    return model


_LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def _halves(weight: Tensor, width: int) -> Tensor:
    """Rows of each head: the file rotates rows 2i and 2i+1 together, transformers rows i and i + width/2."""
    return weight.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


def _token_loss(outputs: Any, batch: Batch, reduction: str = "mean") -> Tensor:
    tokens = batch["input_ids"]
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def _mean_token_loss(model: nn.Module, batches: Iterable[Batch]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        total += float(_token_loss(model(input_ids=batch["input_ids"]), batch, "sum"))
        count += batch["input_ids"][:, 1:].numel()
    return total / count


BUILDERS: dict[str, Callable[[Path], Subject]] = {
    "resnet20": resnet20, "resnet56": resnet56, "vit": vit, "llama": llama,
}  # fmt: skip
NAMES = tuple(BUILDERS)
