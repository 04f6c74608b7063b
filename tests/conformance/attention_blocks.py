"""Attention blocks and a small patch network, for the nets in `written`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLASSES = 10


class AttentionBlock(nn.Module):
    """A pre-norm block of attention and MLP, with layer scale."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList((nn.LayerNorm(width), nn.LayerNorm(width)))
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width + 4), nn.GELU(), nn.Linear(3 * width + 4, width))
        self.scales = nn.ParameterList(torch.full((width,), 0.1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        y = self.attention(y, y, y)[0] if isinstance(self.attention, nn.MultiheadAttention) else self.attention(y)
        x = x + self.scales[0] * y
        return x + self.scales[1] * self.mlp(self.norms[1](x))


class EinsumAttention(nn.Module):
    """Attention whose heads are split by a fused projection and joined by einsum."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(width, 3 * heads * size)
        self.out = nn.Parameter(torch.randn(heads, size, width) / 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.size)).unbind(2)
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * self.size**-0.5).softmax(dim=-1)
        return torch.einsum("bnhd,hdc->bnc", torch.einsum("bhnm,bmhd->bnhd", weights, v), self.out)


class WindowAttention(nn.Module):
    """Attention inside shifted windows of a grid of tokens."""

    def __init__(self, width: int, heads: int, side: int, window: int) -> None:
        super().__init__()
        self.attention = EinsumAttention(width, heads, width // heads)
        self.side, self.window = side, window

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        windows, shift = self.side // self.window, self.window // 2
        x = torch.roll(x.view(batch, self.side, self.side, width), (-shift, -shift), (1, 2))
        x = x.view(batch, windows, self.window, windows, self.window, width).transpose(2, 3)
        x = self.attention(x.reshape(-1, self.window * self.window, width))
        x = x.view(batch, windows, windows, self.window, self.window, width).transpose(2, 3)
        x = x.reshape(batch, self.side, self.side, width)
        return torch.roll(x, (shift, shift), (1, 2)).reshape(batch, count, width)


class PatchNet(nn.Module):
    """Patches of an image through attention blocks, with optional class and register tokens."""

    def __init__(self, attention: Callable[[int], nn.Module], registers: int = 0) -> None:
        super().__init__()
        width, self.registers = 60, registers
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.1 * torch.randn(1, 64, width))
        if registers:
            self.token = nn.Parameter(torch.zeros(1, 1, width))
            self.register = nn.Parameter(torch.zeros(1, registers, width))
        self.blocks = nn.Sequential(*(AttentionBlock(width, attention(width)) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        if self.registers:
            extra = (tokens.expand(x.shape[0], -1, -1) for tokens in (self.token, self.register))
            x = torch.cat((*extra, x), dim=1)
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0] if self.registers else x.mean(dim=1))
