"""Plain networks written for this catalogue: generators, detectors, and one small net for each awkward detail."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.conformance.attention_blocks import CLASSES, AttentionBlock, EinsumAttention, PatchNet, WindowAttention
from tests.conformance.case import Case, Inputs, image

VOCABULARY = 211


def conv(inner: int, outer: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm and ReLU."""
    layer = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outer), nn.ReLU(inplace=True))


def pooled_head(width: int) -> nn.Sequential:
    """Global average pooling and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def dcgan_generator() -> nn.Module:
    """From a latent vector to an image of 32 pixels by transposed convolutions."""
    layers: list[nn.Module] = []
    widths = (23, 72, 48, 28)
    for number, (inner, outer) in enumerate(pairwise(widths)):
        stride, padding = (1, 0) if number == 0 else (2, 1)
        layers += [nn.ConvTranspose2d(inner, outer, 4, stride, padding, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1, bias=False), nn.Tanh())


def dcgan_discriminator() -> nn.Module:
    """From an image of 32 pixels to one score by strided convolutions."""
    layers: list[nn.Module] = [nn.Conv2d(3, 28, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for inner, outer in ((28, 48), (48, 72)):
        layers += [nn.Conv2d(inner, outer, 4, 2, 1, bias=False), nn.BatchNorm2d(outer), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(72, 1, 4, bias=False), nn.Sigmoid(), nn.Flatten(0))


class UNet(nn.Module):
    """Skip connections by concatenation, upsampling by transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 28, 44)
        self.down = nn.ModuleList(
            nn.Sequential(conv(inner, outer), conv(outer, outer)) for inner, outer in pairwise((3, *widths))
        )
        self.middle = nn.Sequential(conv(44, 68), conv(68, 68))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(inner, outer, 2, 2) for inner, outer in ((68, 44), (44, 28), (28, 16))
        )
        self.merge = nn.ModuleList(nn.Sequential(conv(2 * width, width), conv(width, width)) for width in widths[::-1])
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up, merge, skip in zip(self.up, self.merge, skips[::-1], strict=True):
            x = merge(torch.cat((skip, up(x)), dim=1))
        return self.head(x)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit: one half passes, the other is convolved, then the halves are interleaved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        depthwise = nn.Sequential(nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False), nn.BatchNorm2d(half))
        self.branch = nn.Sequential(conv(half, half, 1), depthwise, conv(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        x = torch.cat((kept, self.branch(changed)), dim=1)
        batch, width, height, breadth = x.shape
        return x.view(batch, 2, width // 2, height, breadth).transpose(1, 2).reshape(batch, width, height, breadth)


class YoloShuffle(nn.Module):
    """A shuffling backbone, a feature pyramid, and three grids of boxes."""

    def __init__(self) -> None:
        super().__init__()
        widths, neck = (40, 64, 88), 36
        self.stem = conv(3, 24, stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(conv(inner, outer, stride=2), ShuffleUnit(outer), ShuffleUnit(outer))
            for inner, outer in pairwise((24, *widths))
        )
        self.lateral = nn.ModuleList(conv(width, neck, 1) for width in widths)
        self.smooth = nn.ModuleList(conv(neck, neck) for _ in widths)
        self.heads = nn.ModuleList(nn.Conv2d(neck, 3 * (5 + CLASSES), 1) for _ in widths)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        maps = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            maps.append(lateral(x))
        for level in (1, 0):
            maps[level] = maps[level] + F.interpolate(maps[level + 1], scale_factor=2, mode="nearest")
        grids = []
        for features, smooth, head in zip(maps, self.smooth, self.heads, strict=True):
            boxes = head(smooth(features))
            batch, _, height, breadth = boxes.shape
            grids.append(boxes.view(batch, 3, 5 + CLASSES, height, breadth).permute(0, 1, 3, 4, 2).contiguous())
        return tuple(grids)


def normalised(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """A convolutional classifier whose weights are all parametrized."""
    return lambda: nn.Sequential(
        wrap(nn.Conv2d(3, 20, 3, padding=1)),
        nn.ReLU(),
        wrap(nn.Conv2d(20, 36, 3, 2, 1)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        wrap(nn.Linear(36, 52)),
        nn.ReLU(),
        wrap(nn.Linear(52, CLASSES)),
    )


class StandardizedConv(nn.Conv2d):
    """Each filter is brought to mean zero and variance one before it is applied."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        spread = self.weight.std(dim=(1, 2, 3), keepdim=True) + 1e-5
        return self._conv_forward(x, (self.weight - mean) / spread, self.bias)


def weight_standardisation() -> nn.Module:
    """Standardised convolutions with group norm."""
    return nn.Sequential(
        StandardizedConv(3, 24, 3, padding=1),
        nn.GroupNorm(4, 24),
        nn.ReLU(),
        StandardizedConv(24, 40, 3, 2, 1),
        nn.GroupNorm(8, 40),
        nn.ReLU(),
        pooled_head(40),
    )


class Recurrent(nn.Module):
    """A sentence classifier that reads the last output of a recurrent network."""

    def __init__(self, recurrent: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 44)
        self.recurrent = recurrent
        self.hidden = nn.Linear(width, 52)
        self.head = nn.Linear(52, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        outputs, _ = self.recurrent(self.embedding(ids))
        return self.head(torch.relu(self.hidden(outputs[:, -1])))


def lstm() -> nn.Module:
    """Two bidirectional LSTM layers."""
    return Recurrent(nn.LSTM(44, 36, 2, batch_first=True, bidirectional=True), 72)


class Language(nn.Module):
    """A language model; a module given to it sits between the embedding and the head, which may be tied."""

    def __init__(self, body: nn.Module, classes: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 60)
        self.body = body
        self.head = nn.Linear(60, classes or VOCABULARY, bias=False)
        if classes is None:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)))


def transformer_encoder() -> nn.Module:
    """The encoder of torch.nn under a classifier of tokens."""
    layer = nn.TransformerEncoderLayer(60, 5, 132, batch_first=True)
    return Language(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), CLASSES)


def super_resolution() -> nn.Module:
    """Two upsamplings by pixel shuffle."""
    up = [nn.Conv2d(28, 28 * 4, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(28)]
    return nn.Sequential(conv(3, 28), *up, conv(28, 20), nn.Conv2d(20, 3 * 4, 3, padding=1), nn.PixelShuffle(2))


class Shared(nn.Module):
    """One block is called twice, and its result concatenated with the input of the second call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 28)
        self.block = nn.Sequential(conv(28, 44), conv(44, 28))
        self.head = pooled_head(56)

    def forward(self, x: Tensor) -> Tensor:
        first = self.block(self.stem(x))
        return self.head(torch.cat((first, self.block(first)), dim=1))


class InPlace(nn.Module):
    """Operators that write into their input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = conv(3, 28), nn.Conv2d(28, 28, 3, padding=1), nn.Conv2d(28, 28, 1)
        self.gain = nn.Parameter(torch.rand(28, 1, 1))
        self.head = pooled_head(28)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.left(x).mul_(self.gain)
        y += x
        y.relu_().add_(self.right(x).sigmoid_(), alpha=0.5)
        y[:, :, 0].zero_()
        return self.head(y)


@dataclass
class Prediction:
    """What the dataclass model returns."""

    labels: Tensor
    embedding: Tensor


torch.export.register_dataclass(Prediction)

STRUCTURES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "tuple": lambda labels, embedding: (labels, embedding),
    "dict": lambda labels, embedding: {"labels": labels, "embedding": embedding},
    "dataclass": Prediction,
}


class Structured(nn.Module):
    """Returns labels and an embedding in a tuple, a dictionary or a dataclass."""

    def __init__(self, structure: str) -> None:
        super().__init__()
        self.structure = STRUCTURES[structure]
        self.trunk = nn.Sequential(conv(3, 20), conv(20, 36, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.embed = nn.Linear(36, 52)
        self.label = nn.Linear(52, CLASSES)

    def forward(self, x: Tensor) -> object:
        embedding = self.embed(self.trunk(x))
        return self.structure(self.label(torch.relu(embedding)), embedding)


def group_norm() -> nn.Module:
    """Grouped convolution, group norm and SiLU."""
    stem = (nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU())
    grouped = (nn.Conv2d(32, 48, 3, 2, 1, groups=4), nn.GroupNorm(6, 48), nn.SiLU())
    return nn.Sequential(*stem, *grouped, nn.Conv2d(48, 40, 1), nn.GroupNorm(1, 40), pooled_head(40))


def _images() -> Inputs:
    return (image(32),), {}


def _latents() -> Inputs:
    return (torch.randn(2, 23, 1, 1),), {}


def _sentences() -> Inputs:
    return (torch.randint(0, VOCABULARY, (2, 13)),), {}


def _heads(width: int) -> nn.Module:
    return nn.MultiheadAttention(width, 5, batch_first=True)


CASES: tuple[Case, ...] = (
    Case("written:dcgan_generator", dcgan_generator, _latents),
    Case("written:dcgan_discriminator", dcgan_discriminator, _images),
    Case("written:unet", UNet, _images),
    Case("written:yolo_shuffle", YoloShuffle, lambda: ((image(64),), {})),
    Case("written:weight_norm", normalised(parametrizations.weight_norm), _images),
    Case("written:spectral_norm", normalised(parametrizations.spectral_norm), _images),
    Case("written:weight_standardisation", weight_standardisation, _images),
    Case("written:lstm", lstm, _sentences, notes="two layers, bidirectional"),
    Case("written:gru", lambda: Recurrent(nn.GRU(44, 36, batch_first=True), 36), _sentences),
    Case("written:multihead_attention", lambda: PatchNet(_heads), _images),
    Case("written:transformer_encoder", transformer_encoder, _sentences),
    Case("written:pixel_shuffle", super_resolution, _images),
    Case("written:window_attention", lambda: PatchNet(lambda width: WindowAttention(width, 5, 8, 4)), _images),
    Case("written:einsum_attention", lambda: PatchNet(lambda width: EinsumAttention(width, 5, 16)), _images),
    Case("written:shared_module", Shared, _images),
    Case("written:tied_embedding", lambda: Language(AttentionBlock(60, EinsumAttention(60, 5, 16))), _sentences),
    Case("written:returns_tuple", lambda: Structured("tuple"), _images),
    Case("written:returns_dict", lambda: Structured("dict"), _images, ("labels",), "the embedding may shrink"),
    Case("written:returns_dataclass", lambda: Structured("dataclass"), _images),
    Case("written:group_norm", group_norm, _images),
    Case("written:in_place", InPlace, _images),
    Case("written:class_and_register_tokens", lambda: PatchNet(_heads, registers=3), _images),
)
