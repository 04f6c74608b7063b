"""Small networks in plain PyTorch: two for 8×8 digits, and the CIFAR-10 residual networks of He et al. (2016)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut.

    Args:
        inner: input channels C.
        outer: output channels D.
        stride: stride of the first convolution.
        shortcut: module that maps `(B, C, H, W)` to the shape of the output.
    """

    def __init__(self, inner: int, outer: int, stride: int, *, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, D, H/stride, W/stride)`."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class DigitsResNet(nn.Module):
    """A residual CNN for `(B, 1, 8, 8)`; each stage after the first halves the image and doubles the channels.

    Args:
        width: number of channels of the first stage.
        blocks: number of blocks of each stage.
        num_classes: number of outputs.
    """

    def __init__(self, width: int = 16, blocks: Sequence[int] = (2, 2, 2), num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages: list[nn.Module] = []
        inner = width
        for number, count in enumerate(blocks):
            outer = width * 2**number
            stages.append(_projection_stage(inner, outer, count, stride=1 if number == 0 else 2))
            inner = outer
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inner, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, 1, 8, 8)` to logits `(B, num_classes)`."""
        x = self.stages(self.stem(x))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


class Attention(nn.Module):
    """Self-attention whose heads can be removed, since its code uses only `num_heads` and `head_dim`.

    Args:
        dim: width of the stream D.
        heads: number of heads, a divisor of `dim`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens `(B, N, D)` to `(B, N, D)`."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, head_dim)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them.

    Args:
        dim: width of the stream D.
        hidden: width between the layers.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens `(B, N, D)` to `(B, N, D)`."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each added to the stream.

    Args:
        dim: width of the stream D.
        heads: number of attention heads.
        mlp: width inside the MLP.
    """

    def __init__(self, dim: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens `(B, N, D)` to `(B, N, D)`."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class DigitsViT(nn.Module):
    """A vision transformer for `(B, 1, 8, 8)` with a class token and learned positions.

    Args:
        dim: width of the stream.
        depth: number of blocks.
        heads: number of attention heads of each block, a divisor of `dim`.
        mlp: width inside each MLP.
        patch: side of a patch in pixels, a divisor of 8.
        num_classes: number of outputs.
    """

    def __init__(
        self, *, dim: int = 48, depth: int = 6, heads: int = 4, mlp: int = 96, patch: int = 2, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        # Not the usual 0.02: positions that start so small are not learned from a thousand images (val 93 %, not 99 %).
        self.positions = nn.Parameter(torch.randn(1, 1 + (8 // patch) ** 2, dim) * 0.5)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, mlp) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, 1, 8, 8)` to logits `(B, num_classes)`."""
        patches = self.embed(x).flatten(2).transpose(1, 2)  # (B, N, dim)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), patches], dim=1)
        tokens = self.norm(self.blocks(tokens + self.positions))
        logits: Tensor = self.head(tokens[:, 0])
        return logits


class SubsampledShortcut(nn.Module):
    """Option A of He et al.: every second pixel, and zeros in the new channels; it has no parameters.

    Args:
        extra: number of new channels, half of them before and half behind the old ones.
    """

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.before = extra // 2
        self.behind = extra - extra // 2  # two numbers, so that each side can shrink on its own

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C + extra, H/2, W/2)`."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.behind))


class CifarResNet(nn.Module):
    """The residual network of He et al. for `(B, 3, 32, 32)`: stages of 16, 32 and 64 channels, option-A shortcuts.

    Args:
        blocks_per_stage: number of blocks of each stage: 3 for ResNet-20, 9 for ResNet-56.
        num_classes: number of outputs.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _padding_stage(16, 16, blocks_per_stage, stride=1)
        self.layer2 = _padding_stage(16, 32, blocks_per_stage, stride=2)
        self.layer3 = _padding_stage(32, 64, blocks_per_stage, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, 3, 32, 32)` to logits `(B, num_classes)`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.pool(x).flatten(1))
        return logits


def cifar_resnet20(num_classes: int = 10) -> CifarResNet:
    """Build the CIFAR-10 ResNet-20 with random weights.

    Args:
        num_classes: number of outputs.

    Returns:
        A `CifarResNet` of 269,722 parameters with 10 classes.
    """
    return CifarResNet(3, num_classes)


def cifar_resnet56(num_classes: int = 10) -> CifarResNet:
    """Build the CIFAR-10 ResNet-56 with random weights.

    Args:
        num_classes: number of outputs.

    Returns:
        A `CifarResNet` of 853,018 parameters with 10 classes.
    """
    return CifarResNet(9, num_classes)


def _projection_stage(inner: int, outer: int, count: int, *, stride: int) -> nn.Sequential:
    shortcut: nn.Module = nn.Identity()
    if stride != 1 or inner != outer:
        shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride=stride, bias=False), nn.BatchNorm2d(outer))
    first = BasicBlock(inner, outer, stride, shortcut=shortcut)
    return nn.Sequential(first, *(BasicBlock(outer, outer, 1, shortcut=nn.Identity()) for _ in range(count - 1)))


def _padding_stage(inner: int, outer: int, count: int, *, stride: int) -> nn.Sequential:
    shortcut: nn.Module = nn.Identity() if inner == outer else SubsampledShortcut(outer - inner)
    first = BasicBlock(inner, outer, stride, shortcut=shortcut)
    return nn.Sequential(first, *(BasicBlock(outer, outer, 1, shortcut=nn.Identity()) for _ in range(count - 1)))
