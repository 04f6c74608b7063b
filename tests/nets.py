"""Tiny nets that carry their own answers: which groups and blocks a correct analysis finds in them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idap.graph.trace import trace
from idap.structure.analysis import Structure, analyze

Expected = Mapping[str, tuple[str, int]]


@dataclass(frozen=True)
class Net:
    """A model, inputs for it, and what may be removed from it.

    Attributes:
        name: for test ids.
        make: builds the model; call `model` for one with weights that hide nothing.
        args: positional example inputs.
        groups: name of each group -> its kind and size, in the order of the network.
        blocks: names of the branches and blocks, in the order of the network.
        kwargs: keyword example inputs.
        swap: whether modules may be rewritten where their code can't come to the sizes of a cut.
    """

    name: str
    make: Callable[[], nn.Module]
    args: tuple[Any, ...]
    groups: Expected
    blocks: tuple[str, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    swap: bool = False

    def model(self, seed: int = 0) -> nn.Module:
        """Build the model in eval mode with random weights and statistics, none of them zero or one."""
        torch.manual_seed(seed)
        model = self.make().eval()
        return randomised(model, seed)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every floating tensor random values: statistics and scales too, which start as zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.rand(tensor.shape, generator=generator) - 0.5
            fan = max(1, tensor[0].numel()) if tensor.dim() > 1 else 1
            if name.endswith(("running_var", "scale", "gamma")):
                tensor.copy_(noise + 1)
            else:
                tensor.copy_(noise * 3 / fan**0.5 if tensor.dim() > 1 else noise + 0.3)
    return model


def images(channels: int = 3, size: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def sequence(width: int, length: int = 5, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))


def tokens(vocabulary: int = 11, length: int = 5, batch: int = 2) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------------- plain


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.GELU(), nn.Linear(5, 3))


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Sequential(nn.Linear(6 * 2 * 2, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.features(x), 1)
        return self.classifier(x)


class ConvAndLinear1d(nn.Module):
    """One-dimensional convolutions, one slope per channel, and a mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 6, 3, padding=1)
        self.act1 = nn.PReLU(6)
        self.conv2 = nn.Conv1d(6, 4, 3, stride=2)
        self.act2 = nn.PReLU()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.conv2(self.act1(self.conv1(x))))
        return self.head(x.mean(-1))


class GroupNormNet(nn.Module):
    """Group norm over 3 parts of 4 channels: whole parts may go, and places within the parts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.norm1 = nn.GroupNorm(3, 12)
        self.conv2 = nn.Conv2d(12, 6, 3, padding=1)
        self.norm2 = nn.GroupNorm(1, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.conv1(x)))
        x = F.silu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class InstanceNormNet(nn.Module):
    """Instance norm without weights: its only trace of the width is a plain int."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.norm1 = nn.InstanceNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3)
        self.norm2 = nn.InstanceNorm2d(5, affine=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.1)
        x = F.elu(self.norm2(self.conv2(x)))
        return self.head(x.amax((2, 3)))


# ------------------------------------------------------------------------------------------------- residual, convs


class Basic(nn.Module):
    """The basic block of ResNet; a projection shortcut where the width or the stride changes."""

    def __init__(self, inside: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inside != width:
            self.downsample = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, inside: int, middle: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
            if stride != 1 or inside != outside
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet(nn.Module):
    def __init__(self, *blocks: nn.Module, stem: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(stem)
        self.layers = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.fc(self.pool(self.layers(x)).flatten(1))


class PadLiteral(nn.Module):
    """The shortcut of the CIFAR ResNets: every second place, and zero channels by amounts that the code writes out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)


class PadHeld(nn.Module):
    """The same with the amounts in two attributes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class CifarBlock(nn.Module):
    def __init__(self, inside: int, width: int, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, 2 if shortcut else 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut or nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class InvertedResidual(nn.Module):
    def __init__(self, inside: int, hidden: int, outside: int) -> None:
        super().__init__()
        self.use_res = inside == outside
        self.conv = nn.Sequential(
            *(nn.Conv2d(inside, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, outside, 1, bias=False), nn.BatchNorm2d(outside)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res else self.conv(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(InvertedResidual(4, 8, 4), InvertedResidual(4, 10, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.hardswish(self.stem(x))).mean([2, 3]))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(scale))))


class SENet(nn.Module):
    """A branch whose last layer is gated, and a block whose code lies open in its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.expand = nn.Conv2d(6, 10, 1)
        self.se = SqueezeExcite(10, 4)
        self.project = nn.Conv2d(10, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        x = x + self.project(self.se(F.silu(self.expand(x))))
        return self.head(x)


class GroupedNet(nn.Module):
    """Grouped convolutions, 4 and 2 parts: both the parts and the places within them are units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.conv3 = nn.Conv2d(12, 6, 1)
        self.conv4 = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.head(F.relu(self.conv4(F.relu(self.conv3(x)))))


class ShuffleUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            *(nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True)),
            *(nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False), nn.BatchNorm2d(half)),
            *(nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, dim=1)
        out = torch.cat((kept, self.branch(worked)), dim=1)
        batch, channels, height, width = out.size()
        out = out.view(batch, 2, channels // 2, height, width)
        return torch.transpose(out, 1, 2).contiguous().view(batch, channels, height, width)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.units = nn.Sequential(ShuffleUnit(8), ShuffleUnit(8))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(F.relu(self.stem(x))))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(4 + 3 * i), nn.ReLU(), nn.Conv2d(4 + 3 * i, 3, 3, padding=1)) for i in range(2)
        )
        self.norm = nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = F.relu(self.norm(torch.cat(features, 1)))
        return self.head(F.adaptive_avg_pool2d(x, (1, 1)).squeeze(-1).squeeze(-1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 4, 3, padding=1)
        self.down2 = nn.Conv2d(4, 6, 3, padding=1)
        self.down3 = nn.Conv2d(6, 8, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(8, 5, 2, stride=2)
        self.merge1 = nn.Conv2d(5 + 6, 7, 3, padding=1)
        self.merge2 = nn.Conv2d(7 + 4, 6, 3, padding=1)
        self.up2 = nn.ConvTranspose2d(6, 6, 3, padding=1, groups=2)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.down1(x))
        two = F.relu(self.down2(F.max_pool2d(one, 2)))
        three = F.relu(self.down3(F.max_pool2d(two, 2)))
        x = F.relu(self.merge1(torch.cat([self.up1(three), two], dim=1)))
        x = F.interpolate(x, size=one.shape[-2:], mode="bilinear", align_corners=False)
        x = self.up2(F.relu(self.merge2(torch.cat([x, one], dim=1))))
        return self.head(x)


# ----------------------------------------------------------------------------------------------------- transformers


class FusedAttention(nn.Module):
    """As in timm: one projection for q, k and v, and torch's fused attention with a scale of its own."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, head_dim
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        x = x.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim)
        return self.proj(x)


class WrittenAttention(nn.Module):
    """As in Hugging Face: three projections, scores written out."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, head_dim
        self.scale = head_dim**-0.5
        self.q_proj = nn.Linear(width, heads * head_dim)
        self.k_proj = nn.Linear(width, heads * head_dim)
        self.v_proj = nn.Linear(width, heads * head_dim)
        self.out_proj = nn.Linear(heads * head_dim, width)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        scores = torch.matmul(q, k.transpose(-2, -1)) * self.scale
        x = torch.matmul(scores.softmax(dim=-1), v)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class EinsumAttention(nn.Module):
    """Heads by einsum, and a scale that forward computes from the head width: fixed unless it is written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1) for part in self.qkv(x).chunk(3, dim=-1))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        x = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
        return self.out(x.reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(F.gelu(self.fc1(x))))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class PreNorm(nn.Module):
    def __init__(self, width: int, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = feed_forward

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PostNorm(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class LayerScale(PreNorm):
    """Pre-norm with a learned factor per channel on each branch, held by the block itself."""

    def __init__(self, width: int, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__(width, attention, feed_forward)
        self.gamma1 = nn.Parameter(torch.full((width,), 0.5))
        self.gamma2 = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attn(self.norm1(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, inside: int, width: int, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(inside, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class VisionTransformer(nn.Module):
    """Patches by convolution, a class token and learned positions."""

    def __init__(self, width: int, *blocks: nn.Module) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, width))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class TorchEncoder(nn.Module):
    """torch.nn's own encoder; its attention can shrink only where it is rewritten."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.embed = nn.Linear(4, 8)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Hybrid(nn.Module):
    """A convolutional stem, then a transformer block on its places, and back to a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1))
        self.block = PreNorm(8, FusedAttention(8, 2, 3), FeedForward(8, 10))
        self.norm = nn.GroupNorm(1, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        batch, channels, height, width = x.shape
        flat = self.block(x.flatten(2).permute(0, 2, 1))
        x = flat.permute(0, 2, 1).reshape(batch, channels, height, width)
        return self.head(self.norm(x))


class LanguageModel(nn.Module):
    """Tied embedding and output head; tokens in, a dict out, mask by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.positions = nn.Embedding(5, 8)
        self.block = PreNorm(8, CausalAttention(8, 2), SwiGLU(8, 6))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *, mask: Tensor) -> dict[str, Tensor]:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed(ids) + self.positions(places)
        x = self.block(x) * mask[..., None]
        return {"logits": self.head(self.norm(x)), "mask": mask}


class CausalAttention(nn.Module):
    """Fused attention that leaves its scale to torch: the head width is fixed unless the scale is written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.dim)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(-2))


class Recurrent(nn.Module):
    """Two layers in both directions, that start from zeros, and a mean over time."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 5)
        self.recurrent = kind(5, 6, batch_first=True, **settings)
        self.head = nn.Linear(6 * (2 if self.recurrent.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(x))[0].mean(1))


# ------------------------------------------------------------------------------------------------------------ odd


class Shared(nn.Module):
    """A parameter used twice (plainly and transposed) and a submodule called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.weight))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(x @ self.weight)


class InPlace(nn.Module):
    """Writes into parts of a tensor that it made from sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 6)
        self.two = nn.Linear(4, 6)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one(x), self.two(x)
        both = one.new_zeros(x.shape[0], one.shape[1] + two.shape[1])
        both[:, : one.shape[1]] = one
        both[:, one.shape[1] :].add_(two).mul_(0.5)
        return self.head(both.sigmoid_())


class ScaleFromShape(nn.Module):
    """Computes numbers from sizes in forward: those sizes must stay, unless the numbers are written out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.fc2 = nn.Linear(6, 5)
        self.width = 7
        self.fc3 = nn.Linear(5, self.width)
        self.fc4 = nn.Linear(self.width, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x)) * x.shape[-1] ** -0.5
        x = F.relu(self.fc3(x).view(-1, self.width)) / self.width
        return self.head(F.relu(self.fc4(x)))


# -------------------------------------------------------------------------------------------------------- answers


def _channels(**sizes: int) -> Expected:
    return {name.replace("__", ".").replace("_second", "#2"): ("channels", size) for name, size in sizes.items()}


def _attention(path: str, heads: int, width: int, hidden: int, first: str = "qkv") -> Expected:
    """The groups within one transformer block; a width or hidden size of 0 stands for one that can't shrink."""
    sizes = {
        f"{path}.attn.{first}:heads": ("heads", heads),
        f"{path}.attn.{first}:head-width": ("head width", width),
        f"{path}.mlp.fc1": ("neurons", hidden),
    }
    return {name: answer for name, answer in sizes.items() if answer[1]}


def _torch_attention(path: str, heads: int, width: int, hidden: int) -> Expected:
    """The groups within one layer of torch's own encoder."""
    return {
        f"{path}.self_attn:heads": ("heads", heads),
        f"{path}.self_attn:head-width": ("head width", width),
        f"{path}.linear1": ("neurons", hidden),
    }


def _both(path: str, *, pre: bool = True) -> tuple[str, ...]:
    """The branches of a transformer block, and the block itself."""
    branches = ("norm1…attn", "norm2…mlp") if pre else ("attn", "mlp")
    return (*(f"{path}.{branch}" for branch in branches), path)


_WITHOUT_REWRITING = (
    Net("mlp", mlp, (sequence(4),), {"0": ("neurons", 6), "2": ("neurons", 5)}),
    Net("vgg", VGG, (images(),), {**_channels(features__0=4, features__4=6), "classifier.0": ("neurons", 8)}),
    Net("conv1d", ConvAndLinear1d, (sequence(9, 3),), _channels(conv1=6, conv2=4)),
    Net("group norm", GroupNormNet, (images(),), _channels(conv1=3, conv1_second=4, conv2=6)),
    Net("instance norm", InstanceNormNet, (images(),), _channels(conv1=6, conv2=5)),
    Net(
        "resnet basic",
        lambda: ResNet(Basic(4, 4), Basic(4, 4), Basic(4, 6, 2), Basic(6, 6), stem=4, width=6),
        (images(),),
        _channels(
            conv=4, layers__0__conv1=4, layers__1__conv1=4, layers__2__conv1=6, layers__2__conv2=6, layers__3__conv1=6
        ),
        ("layers.0", "layers.1", "layers.3"),
    ),
    Net(
        "resnet bottleneck",
        lambda: ResNet(Bottleneck(4, 3, 8), Bottleneck(8, 3, 8), Bottleneck(8, 5, 10, 2), stem=4, width=10),
        (images(),),
        _channels(
            **{"conv": 4, "layers__0__conv1": 3, "layers__0__conv2": 3, "layers__0__conv3": 8},
            **{"layers__1__conv1": 3, "layers__1__conv2": 3},
            **{"layers__2__conv1": 5, "layers__2__conv2": 5, "layers__2__conv3": 10},
        ),
        ("layers.1",),
    ),
    Net(  # the four channels that the padding adds can't go: the code writes how many they are
        "cifar literal",
        lambda: ResNet(CifarBlock(4, 4), CifarBlock(4, 8, PadLiteral()), CifarBlock(8, 8), stem=4, width=8),
        (images(),),
        _channels(conv=4, layers__0__conv1=4, layers__1__conv1=8, layers__2__conv1=8),
        ("layers.0", "layers.2"),
    ),
    Net(  # those before and those after are counted by two attributes, so they are two groups
        "cifar held",
        lambda: ResNet(CifarBlock(4, 4), CifarBlock(4, 9, PadHeld(2, 3)), CifarBlock(9, 9), stem=4, width=9),
        (images(),),
        _channels(
            **{"conv": 4, "layers__0__conv1": 4, "layers__1__conv1": 9},
            **{"layers__1__conv2": 2, "layers__1__conv2_second": 3, "layers__2__conv1": 9},
        ),
        ("layers.0", "layers.2"),
    ),
    Net(
        "mobilenet",
        MobileNet,
        (images(),),
        _channels(stem=4, blocks__0__conv__0=8, blocks__1__conv__0=10, blocks__1__conv__6=6),
        ("blocks.0",),
    ),
    Net("squeeze excite", SENet, (images(),), _channels(stem=6, expand=10, se__fc1=4), ("expand…project",)),
    Net(
        "grouped",
        GroupedNet,
        (images(),),
        _channels(conv1=4, conv1_second=2, conv2=3, conv3=2, conv3_second=3, conv4=3),
    ),
    Net(  # two chunks in a row, with a shuffle between them, leave two units of four channels each
        "shufflenet",
        ShuffleNet,
        (images(),),
        _channels(stem=2, units__0__branch__0=4, units__1__branch__0=4),
    ),
    Net("densenet", DenseNet, (images(),), _channels(stem=4, layers__0__2=3, layers__1__2=3)),
    Net(
        "unet",
        UNet,
        (images(),),
        _channels(down1=4, down2=6, down3=8, up1=5, merge1=7, merge2=2, merge2_second=3, up2=3),
    ),
    Net(
        "pre-norm, fused",
        lambda: Encoder(4, 8, *(PreNorm(8, FusedAttention(8, 2, 3), FeedForward(8, 10)) for _ in range(2))),
        (sequence(4),),
        {"embed": ("neurons", 8), **_attention("blocks.0", 2, 3, 10), **_attention("blocks.1", 2, 3, 10)},
        (*_both("blocks.0"), *_both("blocks.1")),
    ),
    Net(
        "post-norm, fused",
        lambda: Encoder(4, 8, PostNorm(8, FusedAttention(8, 2, 3), FeedForward(8, 10))),
        (sequence(4),),
        {"embed": ("neurons", 8), **_attention("blocks.0", 2, 3, 10)},
        _both("blocks.0", pre=False),
    ),
    Net(  # one attribute counts the width of q, k and v, so it is one group
        "pre-norm, written",
        lambda: Encoder(4, 8, PreNorm(8, WrittenAttention(8, 3, 4), FeedForward(8, 10))),
        (sequence(4),),
        {"embed": ("neurons", 8), **_attention("blocks.0", 3, 4, 10, "q_proj")},
        _both("blocks.0"),
    ),
    Net(
        "post-norm, written",
        lambda: Encoder(4, 8, *(PostNorm(8, WrittenAttention(8, 2, 3), FeedForward(8, 10)) for _ in range(2))),
        (sequence(4),),
        {
            "embed": ("neurons", 8),
            **_attention("blocks.0", 2, 3, 10, "q_proj"),
            **_attention("blocks.1", 2, 3, 10, "q_proj"),
        },
        (*_both("blocks.0", pre=False), *_both("blocks.1", pre=False)),
    ),
    Net(  # the scale is computed from the head width
        "einsum, swiglu",
        lambda: Encoder(4, 8, PreNorm(8, EinsumAttention(8, 2), SwiGLU(8, 6))),
        (sequence(4),),
        {"embed": ("neurons", 8), **_attention("blocks.0", 2, 0, 0), "blocks.0.mlp.w12": ("neurons", 6)},
        _both("blocks.0"),
    ),
    Net(
        "vision transformer",
        lambda: VisionTransformer(
            8,
            PreNorm(8, FusedAttention(8, 2, 4), FeedForward(8, 10)),
            LayerScale(8, FusedAttention(8, 2, 4), FeedForward(8, 10)),
        ),
        (images(),),
        {"patch": ("channels", 8), **_attention("blocks.0", 2, 4, 10), **_attention("blocks.1", 2, 4, 10)},
        (*_both("blocks.0"), *_both("blocks.1")),
    ),
    Net(  # torch's own attention asks for the width it was built with; its encoder looks into its first layer
        "torch encoder",
        TorchEncoder,
        (sequence(4),),
        {"encoder.layers.0.linear1": ("neurons", 12), "encoder.layers.1.linear1": ("neurons", 12)},
        ("encoder.layers.1",),
    ),
    Net(
        "hybrid",
        Hybrid,
        (images(),),
        {**_channels(stem__0=6, stem__3=8), **_attention("block", 2, 3, 10)},
        _both("block"),
    ),
    Net(
        "language model",
        LanguageModel,
        (tokens(),),
        {"embed": ("neurons", 8), **_attention("block", 2, 0, 0), "block.mlp.w12": ("neurons", 6)},
        _both("block"),
        kwargs={"mask": torch.ones(2, 5)},
    ),
    Net(
        "recurrent",
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        (sequence(4),),
        {"embed": ("neurons", 5), "recurrent": ("neurons", 6)},
    ),
    Net("shared", Shared, (sequence(4),), {"weight": ("neurons", 6)}),
    Net("in place", InPlace, (torch.ones(3, 4),), {"one": ("neurons", 6), "two": ("neurons", 6)}),
    Net("scale from shape", ScaleFromShape, (torch.ones(3, 4),), {"fc2": ("neurons", 5), "fc4": ("neurons", 8)}),
)

_WHERE_REWRITING_HELPS: Mapping[str, Expected] = {
    "cifar literal": _channels(
        **{"conv": 4, "layers__0__conv1": 4, "layers__1__conv1": 8},
        **{"layers__1__conv2": 2, "layers__1__conv2_second": 2, "layers__2__conv1": 8},
    ),
    "einsum, swiglu": {
        "embed": ("neurons", 8),
        **_attention("blocks.0", 2, 4, 0),
        "blocks.0.mlp.w12": ("neurons", 6),
    },
    "torch encoder": {
        "embed": ("neurons", 8),
        **_torch_attention("encoder.layers.0", 2, 4, 12),
        **_torch_attention("encoder.layers.1", 2, 4, 12),
    },
    "language model": {
        "embed": ("neurons", 8),
        **_attention("block", 2, 4, 0),
        "block.mlp.w12": ("neurons", 6),
    },
    "scale from shape": {
        "fc1": ("neurons", 6),
        "fc2": ("neurons", 5),
        "fc3": ("neurons", 7),
        "fc4": ("neurons", 8),
    },
}
"""Net -> what may be removed from it if modules may be rewritten; for all others that makes no difference."""

NETS = (
    *_WITHOUT_REWRITING,
    *(
        replace(net, name=f"{net.name}, swapped", groups=_WHERE_REWRITING_HELPS[net.name], swap=True)
        for net in _WITHOUT_REWRITING
        if net.name in _WHERE_REWRITING_HELPS
    ),
)

by_name = {net.name: net for net in NETS}
every_net = pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)


@cache
def structure_of(name: str) -> Structure:
    """The structure of a net, analysed once, with rewriting where the net says so: see `Net.swap`."""
    net = by_name[name]
    return analyze(trace(net.model(), net.args, net.kwargs), swap=net.swap)
