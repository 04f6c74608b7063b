"""A tiny residual net, data that it can learn in a second, and settings that compress it in another."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from idap.compress.config import Config, FilterStage, LayerStage
from idap.progress import Silent
from idap.training.recovery import Recovery
from idap.training.task import Task, classification

CLASSES = 3


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Net(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 12)
        self.blocks = nn.Sequential(*(Residual(12, 20) for _ in range(blocks)))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples around one centre per class, far enough apart to be told, not so far that it is trivial."""
    dice = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(7)) * 1.3
    labels = torch.randint(0, CLASSES, (count,), generator=dice)
    return centres[labels] + torch.randn(count, 6, generator=dice), labels


def batches(count: int, seed: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    samples, labels = clusters(count, seed)
    return list(zip(samples.split(size), labels.split(size), strict=True))


def shuffling_loader(count: int, seed: int) -> DataLoader:
    return DataLoader(TensorDataset(*clusters(count, seed)), batch_size=32, shuffle=True)


def task(**changes: object) -> Task:
    return classification(**({"train": batches(256, 1), "val": batches(128, 2), "num_classes": CLASSES} | changes))


def train_net(blocks: int = 3) -> nn.Module:
    """A net that names nearly all samples rightly."""
    torch.manual_seed(0)
    net = Net(blocks)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    for _ in range(8):
        for samples, labels in batches(256, 1):
            optimizer.zero_grad()
            F.cross_entropy(net(samples), labels).backward()
            optimizer.step()
    return net.eval()


def config(**changes: object) -> Config:
    """Goals that are easy to reach, and short recoveries."""
    settings = {
        "max_drop": 0.05,
        "macs": 0.5,
        "filters": FilterStage(steps=5, first_share=0.2),
        "layers": LayerStage(removals=2, against="nothing"),  # so that both stages have something to do
        "filters_share": 0.4,
        "recovery": Recovery(epochs=1, lr=0.02),
        "calibration_batches": 2,
    }
    return Config(**(settings | changes))


def snapshot(model: nn.Module) -> tuple[dict[str, object], dict[str, object]]:
    """Everything by which a user would notice that a model was touched: numbers, and the rest."""
    tensors = {
        "state": copy.deepcopy(model.state_dict()),
        "gradients": [torch.zeros(0) if p.grad is None else p.grad.clone() for p in model.parameters()],
    }
    others = {
        "identities": [id(tensor) for tensor in [*model.parameters(), *model.buffers()]],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }
    return tensors, others


def assert_untouched(model: nn.Module, before: tuple[dict[str, object], dict[str, object]]) -> None:
    tensors, others = snapshot(model)
    assert_close(tensors, before[0], rtol=0, atol=0)
    assert others == before[1]


def unsettle(model: nn.Module) -> nn.Module:
    """The same model in the middle of its life: odd modes, gradients, a frozen parameter."""
    model.train()
    model.blocks[1].eval()
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    model.head.bias.requires_grad_(False)
    return model


class Noting(Silent):
    """Keeps what it hears; may fail at one line or phase, as an interrupt would."""

    def __init__(self, fail_at: str = "never") -> None:
        self.lines: list[str] = []
        self.phases: list[str] = []
        self.fail_at = fail_at

    def phase(self, title: str, total: int | None):
        self.phases.append(title)
        if self.fail_at in title:
            raise KeyboardInterrupt
        return super().phase(title, total)

    def say(self, line: str) -> None:
        self.lines.append(line)
