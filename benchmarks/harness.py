"""What the scripts that compress and train share: rows that are measured once, clocks, one recovery for all, CIFAR-10.

A script that imports more of idap than this file and `subjects` imports one of them first.
"""

import copy
import fcntl
import hashlib
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.subjects import ROOT, Subject, read_cifar10  # makes torchvision importable
from idap import Recovery, fit
from idap.cost.latency import measure_latency
from idap.data.tensors import IMAGENET_MEAN, IMAGENET_STD, TensorLoader, crop_and_flip, normalise
from idap.files import write_json
from idap.training.evaluate import evaluate, keep_modes
from idap.training.task import Task, classification

RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "torch-pruning")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LATENCY = {1: 40, 64: 12}
"""Batch size -> timed passes of each model."""


class Rows:
    """The rows of a result file; each is written as soon as it is known, and none is measured twice.

    Several processes may measure rows of one file at the same time; of a row that two measured the first counts.

    Args:
        path: of the file; what it holds is read.
        keys: names of the fields that say which row it is.
        about: what else the file says: question, settings.
    """

    def __init__(self, path: Path, keys: Sequence[str], about: Mapping[str, Any]) -> None:
        self.path, self.keys, self.about = path, tuple(keys), dict(about)
        self.rows = self._on_disk()

    def _on_disk(self) -> list[dict[str, Any]]:
        return json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def find(self, **wanted: object) -> dict[str, Any] | None:
        """The latest row with these values, None if there is none."""
        return next(
            (row for row in reversed(self.rows) if all(row.get(name) == value for name, value in wanted.items())), None
        )

    def measure(self, key: Mapping[str, Any], numbers: Callable[[], Mapping[str, Any]]) -> None:
        """Measure a row and write the file, unless the row is there."""
        if set(key) != set(self.keys):
            raise ValueError(f"a row is named by {', '.join(self.keys)}, found {', '.join(key)}.")
        self.rows = self._on_disk()
        if self.find(**key) is not None:
            return
        row = {**key, **numbers()}
        print(json.dumps(row), flush=True)
        with _alone(self.path):
            self.rows = self._on_disk()
            if self.find(**key) is None:
                self.rows.append(row)
                self.write()

    def write(self) -> None:
        """Write what is known, whole or not at all."""
        write_json(self.path, {**self.about, **_circumstances(), "rows": self.rows})


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time reads a file and writes it."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _circumstances() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_hidden, sys.argv[1:])]),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": {
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "device": device or "cpu",
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _hidden(argument: str) -> str:
    """Folders of this machine say nothing to others."""
    return Path(argument).name if Path(argument).is_absolute() or argument.startswith("..") else argument


@dataclass
class Clock:
    """What a part of a row took; filled when the part ends.

    Attributes:
        seconds: wall-clock time, which other processes on the machine lengthen.
        processor: processor time of this process.
        peak_gib: most resident memory of this process during the part (VmHWM), libraries and data included; NaN where
            the system can't tell.
    """

    seconds: float = 0.0
    processor: float = 0.0
    peak_gib: float = field(default=float("nan"))

    def row(self) -> dict[str, float]:
        """As a part of a row."""
        return {
            "seconds": round(self.seconds, 1),
            "processor_s": round(self.processor, 1),
            "peak_gib": round(self.peak_gib, 3),
        }


@contextmanager
def timed() -> Iterator[Clock]:
    """Measure time and peak memory of what happens within."""
    clock, wall, processor = Clock(), time.perf_counter(), time.process_time()
    if CLEAR.exists():
        CLEAR.write_text("5")  # from here on, the peak is a new one
    try:
        yield clock
    finally:
        clock.seconds, clock.processor = time.perf_counter() - wall, time.process_time() - processor
        clock.peak_gib = _peak()


def _peak() -> float:
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM:")), float("nan"))


Scale = tuple[Sequence[float], Sequence[float]]


def cifar_task(
    data: Path,
    *,
    train: int | None,
    val: int,
    calibration: int,
    batch: int,
    seed: int,
    scale: Scale = (IMAGENET_MEAN, IMAGENET_STD),
) -> Task:
    """CIFAR-10: what a row learns from, what decides, and what divergence is measured on.

    Public weights know every training image by heart, so those can't tell how much a network lost: some test images
    decide, the same for every seed, and nothing is reported on these.

    Args:
        data: the folder of the data sets.
        train: images to learn from, cropped and mirrored at random; None: all training images.
        val: so many test images decide, `divided` says which.
        calibration: the first so many images to learn from, unaugmented.
        batch: images of a batch.
        seed: draws them all.
        scale: mean and deviation of each colour, that the network was trained with.
    """
    images, labels = read_cifar10(data, "train")
    held, answers = read_cifar10(data, "test")
    deciding, _ = divided(len(answers), val)
    learnt = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:train]
    scaled = partial(normalise, mean=scale[0], std=scale[1])

    return classification(
        train=TensorLoader(
            (images[learnt], labels[learnt]),
            batch,
            shuffle=True,
            augment=lambda pixels: scaled(crop_and_flip(pixels)),
        ),
        val=TensorLoader((scaled(held[deciding]), answers[deciding]), batch),
        calibration=TensorLoader((scaled(images[learnt[:calibration]]), labels[learnt[:calibration]]), batch),
        num_classes=10,
    )


def divided(count: int, val: int) -> tuple[Tensor, Tensor]:
    """Places of the test images that decide, and of those that are reported on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:val], order[val:].sort().values


def reported(subject: Subject, val: int) -> Subject:
    """A classifier of images that is judged on the test images that do not decide."""
    images, labels = (torch.cat(parts) for parts in zip(*subject.test, strict=True))
    _, places = divided(len(labels), val)
    size = len(subject.test[0][0])
    return replace(subject, test=list(zip(images[places].split(size), labels[places].split(size), strict=True)))


class Remembering(nn.Module):
    """A teacher that never answers twice: rows with the same seed are shown the same images in the same order.

    Args:
        teacher: in evaluation mode, so that its answers depend on the images alone.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self._known: dict[bytes, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """The teacher's logits, kept by the pixels."""
        key = hashlib.sha256(images.cpu().contiguous().numpy().tobytes()).digest()
        if key not in self._known:
            self._known[key] = self.teacher(images)
        return self._known[key]


@dataclass(frozen=True)
class Recovered:
    """What a training made of a cut model.

    Attributes:
        model: the best state by the deciding images, the untrained one among them; or the last one.
        quality: of that state on the deciding images.
        averaged: whether that state is the average of the untrained and the trained weights.
        losses: mean of each epoch.
        clock: what it took.
    """

    model: nn.Module
    quality: float
    averaged: bool
    losses: tuple[float, ...]
    clock: Clock


def recover(model: nn.Module, teacher: nn.Module, task: Task, recovery: Recovery, *, best: bool = True) -> Recovered:
    """Train a copy of a cut model beside the original, the same way for every row, and keep its best state.

    Weights are laid out with the channels last meanwhile, which convolutions on a CPU are faster with.

    Args:
        model: that was cut.
        teacher: the original.
        task: gives the images.
        recovery: how to train.
        best: False keeps the last state instead.
    """
    trained = copy.deepcopy(model)
    with timed() as clock:
        for each in (trained, teacher):
            each.to(memory_format=torch.channels_last)
        report = fit(trained, task, recovery, teacher=teacher, judge=partial(evaluate, task=task) if best else None)
        for each in (trained, teacher):
            each.to(memory_format=torch.contiguous_format)
    quality = evaluate(trained, task) if report.best is None else report.best
    return Recovered(trained, quality, report.averaged, tuple(round(loss, 4) for loss in report.losses), clock)


def latencies(original: nn.Module, model: nn.Module, sample: Tensor) -> dict[str, dict[str, Any]]:
    """Time both models in turn, for each batch size of LATENCY.

    Args:
        original: what the model was made of.
        model: the smaller one.
        sample: one input `(1, ...)`, on the models' device.

    Returns:
        Batch size -> milliseconds of both (median and quartiles) and how many times faster the model is; on a CPU the
        same for processor time, which other processes on the machine hardly lengthen.
    """
    found = {}
    models = {"original": original, "compressed": model}
    for batch, repeats in LATENCY.items():
        inputs = sample.expand(batch, *sample.shape[1:]).contiguous()
        times = measure_latency(models, (inputs,), repeats=repeats, warmup=3)
        numbers: dict[str, Any] = {
            name: [round(1000 * value, 3) for value in (time.median, *time.spread)] for name, time in times.items()
        }
        numbers["ratio"] = round(times["original"].median / times["compressed"].median, 3)
        if not inputs.is_cuda:
            processor = _processor_times(models, inputs, repeats)
            numbers["processor"] = {name: round(1000 * value, 3) for name, value in processor.items()}
            numbers["processor_ratio"] = round(processor["original"] / processor["compressed"], 3)
        found[str(batch)] = numbers
    return found


@torch.no_grad()
def _processor_times(models: Mapping[str, nn.Module], inputs: Tensor, repeats: int) -> dict[str, float]:
    """Median processor time of this process for one pass of each model, in seconds; the models take turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            with keep_modes(model):
                start = time.process_time()
                model(inputs)
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}
