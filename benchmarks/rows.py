"""What do both stages make of other kinds of networks? One row each, as in the tables of the paper.

    python benchmarks/rows.py --data DATA

The vision transformer for CIFAR-10 has public weights. Three small networks for MNIST, a plain CNN, one in the style of
MobileNetV2 and one in the style of DenseNet, are trained here first. Each is then cut to half of its multiply-adds by
`idap.compress`, both stages, without training in between, and recovers on 10,000 training images. What decides are
2,000 other training images for the networks trained here, and 1,000 test images for the vision transformer, whose
weights have seen all training images; the other test images are only reported on. Rows already in the results are not
measured again.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench import Bench, Protocol, ours
from benchmarks.harness import RESULTS, Rows, cifar_task, reported, timed
from benchmarks.subjects import BATCH, CIFAR_MEAN, CIFAR_STD, Subject, accuracy, add_data_argument, build
from idap import LayerStage, Recovery, fit
from idap.data.tensors import TensorLoader
from idap.training.task import Task, classification

SHARE = 1 / 2
KEYS = ("network", "seed")
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
LEARN, LEARNT = Recovery(epochs=2, lr=0.1), 20_000
"""How the networks for MNIST are trained before they are cut, and on how many images."""
PROTOCOLS = {
    "vit": Protocol(
        device="cpu",
        train=10_000,
        recovery=Recovery(epochs=1, optimizer="adamw", lr=3e-4, distil=0.9, precision="bf16"),
        val=1000,
    ),
    "mnist": Protocol(device="cpu", train=10_000, recovery=Recovery(epochs=1, lr=0.02, distil=0.9)),
}


def convolution(inner: int, outer: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the image's size but for the stride, a norm and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(inner, outer, size, stride=stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outer),
        nn.ReLU(),
    )


class SmallCnn(nn.Module):
    """Three convolutions and two linear layers for `(B, 1, 28, 28)`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            convolution(1, 16, 3), nn.MaxPool2d(2), convolution(16, 32, 3), nn.MaxPool2d(2), convolution(32, 64, 3)
        )
        self.hidden = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits `(B, 10)`."""
        logits: Tensor = self.head(F.relu(self.hidden(self.features(x).mean((2, 3)))))
        return logits


class InvertedResidual(nn.Module):
    """Expand, a depthwise convolution, project; added to the stream where the shapes allow it.

    Args:
        inner: input channels.
        outer: output channels.
        stride: of the depthwise convolution.
    """

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inner
        self.expand = convolution(inner, wide, 1)
        self.depthwise = convolution(wide, wide, 3, stride=stride, groups=wide)
        self.project = nn.Sequential(nn.Conv2d(wide, outer, 1, bias=False), nn.BatchNorm2d(outer))
        self.added = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, inner, H, W)` to `(B, outer, H/stride, W/stride)`."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.added else y


class SmallMobileNet(nn.Module):
    """A stem and six inverted residuals for `(B, 1, 28, 28)`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(1, 12, 3, stride=2)
        shapes = [(12, 12, 1), (12, 24, 2), (24, 24, 1), (24, 24, 1), (24, 40, 1), (40, 40, 1)]
        self.blocks = nn.Sequential(*(InvertedResidual(*shape) for shape in shapes))
        self.last = convolution(40, 128, 1)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits `(B, 10)`."""
        logits: Tensor = self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))
        return logits


class DenseLayer(nn.Module):
    """A bottleneck and a convolution whose result is put behind the input.

    Args:
        inner: input channels.
        growth: channels it adds.
    """

    def __init__(self, inner: int, growth: int) -> None:
        super().__init__()
        self.bottleneck = convolution(inner, 4 * growth, 1)
        self.conv = convolution(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, inner, H, W)` to `(B, inner + growth, H, W)`."""
        return torch.cat([x, self.conv(self.bottleneck(x))], dim=1)


class SmallDenseNet(nn.Module):
    """Two dense stages of four layers, with a transition between them, for `(B, 1, 28, 28)`."""

    def __init__(self, growth: int = 8) -> None:
        super().__init__()
        self.stem = convolution(1, 16, 3, stride=2)
        self.first = nn.Sequential(*(DenseLayer(16 + growth * number, growth) for number in range(4)))
        self.transition = nn.Sequential(convolution(16 + 4 * growth, 24, 1), nn.AvgPool2d(2))
        self.second = nn.Sequential(*(DenseLayer(24 + growth * number, growth) for number in range(4)))
        self.head = nn.Linear(24 + 4 * growth, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits `(B, 10)`."""
        logits: Tensor = self.head(self.second(self.transition(self.first(self.stem(x)))).mean((2, 3)))
        return logits


MNIST: dict[str, Callable[[], nn.Module]] = {
    "mnist cnn": SmallCnn, "mnist mobilenet": SmallMobileNet, "mnist densenet": SmallDenseNet,
}  # fmt: skip


@cache
def read_mnist(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Scaled images, float32 `(N, 1, 28, 28)`, and labels of "train" or "test"."""
    with np.load(data / "mnist.npz", allow_pickle=False) as stored:
        pixels, labels = torch.from_numpy(stored[f"x_{split}"]), torch.tensor(stored[f"y_{split}"], dtype=torch.int64)
    return (pixels[:, None].float() / 255 - MNIST_MEAN) / MNIST_STD, labels


def mnist_task(data: Path, protocol: Protocol, seed: int) -> Task:
    """MNIST without its test images, unaugmented."""
    images, labels = read_mnist(data, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    deciding, learnt = order[: protocol.val], order[protocol.val :][: protocol.train]

    def loader(places: Tensor, *, shuffle: bool = False) -> TensorLoader:
        return TensorLoader((images[places], labels[places]), protocol.batch, shuffle=shuffle)

    calibration = loader(learnt[: protocol.calibration])
    return classification(loader(learnt, shuffle=True), loader(deciding), calibration=calibration, num_classes=10)


def mnist_bench(name: str, data: Path, seed: int) -> Bench:
    """Train a network, and make it ready to be cut."""
    protocol = PROTOCOLS["mnist"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MNIST[name]()
    fit(model, mnist_task(data, replace(protocol, train=LEARNT), seed), replace(LEARN, seed=seed))
    images, labels = read_mnist(data, "test")
    task = mnist_task(data, protocol, seed)
    test = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    subject = Subject(
        name=name,
        model=model.eval(),
        test=test,
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
        quality=lambda judged, batches=test: accuracy(judged, batches),
        metric="accuracy",
        calibration=lambda _count, _seed: list(task.batches("calibration")),
        inputs=lambda batch: ((batch[0],), {}),
        published=float("nan"),
    )
    return Bench(subject, task, protocol, seed)


def vit_bench(data: Path, seed: int) -> Bench:
    """The public vision transformer."""
    protocol = PROTOCOLS["vit"]
    sizes = {"train": protocol.train, "val": protocol.val, "calibration": protocol.calibration}
    task = cifar_task(data, **sizes, batch=protocol.batch, seed=seed, scale=(CIFAR_MEAN, CIFAR_STD))
    return Bench(reported(build("vit", data), protocol.val), task, protocol, seed)


def measure(name: str, data: Path, seed: int, rows: Rows) -> dict[str, Any]:
    """One row: train the network if it needs it, cut it, recover."""
    with timed() as clock:
        bench = vit_bench(data, seed) if name == "vit" else mnist_bench(name, data, seed)
    sizes = {group.name: group.size for group in bench.structure.groups}
    return {
        "original": bench.original(),
        "training": clock.row(),
        "units": sum(sizes.values()),
        **bench.row(SHARE, ours(layers=LayerStage(against="nothing")), rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--networks", nargs="*", choices=["vit", *MNIST], default=["vit", *MNIST])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS / "rows.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = {
        "question": "What do both stages make of other kinds of networks?",
        "macs": SHARE,
        "protocols": {name: asdict(protocol) for name, protocol in PROTOCOLS.items()},
        "learn": {"images": LEARNT, **asdict(LEARN)},
        "memory": "peak_gib is the most resident memory of the whole process (VmHWM, set back before each part)",
    }
    rows = Rows(options.results, KEYS, about)
    for name in options.networks:
        key = {"network": name, "seed": options.seed}
        rows.measure(key, lambda n=name: measure(n, options.data, options.seed, rows))


if __name__ == "__main__":
    main()
