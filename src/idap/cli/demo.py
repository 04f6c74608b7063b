"""The demonstration: train two small networks on real scans, compress both, show the results, check the files."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from idap.cli.commands.compress import compare
from idap.cli.tables import Comparison, comparison_table
from idap.compress.config import Config, FilterStage, LayerStage
from idap.compress.result import Result
from idap.compress.run import compress
from idap.data.tensors import TensorLoader, digits
from idap.errors import CheckpointError
from idap.models.nets import DigitsResNet, DigitsViT
from idap.progress import Progress
from idap.record import MEASURED, RunFolder
from idap.saving.checkpoint import load
from idap.training.batch import default_inputs
from idap.training.evaluate import keep_modes
from idap.training.fit import fit
from idap.training.recovery import Recovery
from idap.training.task import Task, classification

MAX_DROP, MACS = 0.01, 0.5


@dataclass(frozen=True)
class Network:
    """One network of the demonstration.

    Attributes:
        title: the name that is shown.
        folder: name of its run folder.
        build: builds it with new weights.
        training: the training from scratch.
        recovery: the recovery after each cut.
    """

    title: str
    folder: str
    build: Callable[[], nn.Module]
    training: Recovery
    recovery: Recovery


@dataclass(frozen=True)
class NetworkResult:
    """The result of one network.

    Attributes:
        title: title of the network.
        reached: whether every goal was reached.
        message: what was reached, or why a goal was missed.
        numbers: the numbers before and after.
    """

    title: str
    reached: bool
    message: str
    numbers: Comparison

    def to_json(self) -> dict[str, Any]:
        """The same as dicts and lists."""
        about = {"network": self.title, "reached": self.reached, "message": self.message}
        return about | self.numbers.to_json()


def networks(*, fast: bool, seed: int) -> tuple[Network, ...]:
    """The networks with their settings, which were tuned on the validation data."""
    short = 0.5 if fast else 1.0
    adamw = {"optimizer": "adamw", "weight_decay": 0.05, "seed": seed}
    return (
        Network(
            "a residual CNN",
            "resnet",
            DigitsResNet,
            Recovery(epochs=8 * short, lr=0.05, seed=seed),
            Recovery(epochs=3 * short, lr=0.02, seed=seed),
        ),
        Network(
            "a vision transformer",
            "vit",
            DigitsViT,
            Recovery(epochs=20 * short, lr=3e-3, **adamw),  # type: ignore[arg-type]
            Recovery(epochs=4 * short, lr=1.5e-3, **adamw),  # type: ignore[arg-type]
        ),
    )


def run_demo(
    console: Console, progress: Progress, *, fast: bool = False, seed: int = 0, out: Path | None = None
) -> list[NetworkResult]:
    """Train, compress, compare, save and reload two small networks.

    Args:
        console: prints the text between the bars.
        progress: shows the bars, and one line per decision.
        fast: train for half the time; the accuracies are lower.
        seed: seed of all random numbers.
        out: folder for the runs, new or empty; None: they are written to a temporary folder and removed at the end.

    Returns:
        The result of each network.

    Raises:
        CheckpointError: a saved model did not give the same outputs after loading.
    """
    splits = digits(seed=seed)
    task = classification(splits.train, splits.val, num_classes=splits.num_classes, test=splits.test)
    parts = (splits.train, splits.val, splits.test)
    sizes = [len(part.tensors[0]) for part in parts if isinstance(part, TensorLoader)]
    console.print(
        f"Handwritten digits from scikit-learn, 8x8 pixels: {sizes[0]} for training, {sizes[1]} for validation, "
        f"{sizes[2]} for one test at the end.\nGoals: at most {MAX_DROP * 100:g} point of validation accuracy lost, "
        f"at most {MACS:.0%} of the multiply-adds."
    )
    with tempfile.TemporaryDirectory(prefix="idap-demo-") as temporary:
        folder = out or Path(temporary)
        results = [
            _run_network(network, task, folder / network.folder, console, progress, seed)
            for network in networks(fast=fast, seed=seed)
        ]
        if out is not None:
            console.print(
                f"\nThe runs are in {out}; idap.load(folder/'model', freshly_built) loads a model.", markup=False
            )
    return results


def _run_network(
    network: Network, task: Task, folder: Path, console: Console, progress: Progress, seed: int
) -> NetworkResult:
    console.print()
    console.rule(Text(f"{network.title} ({network.build.__name__})", style="bold"), align="left", characters="─")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = network.build()
    fit(model, task, network.training, progress=progress, title="train")
    config = Config(
        max_drop=MAX_DROP,
        macs=MACS,
        recovery=network.recovery,
        filters=FilterStage(first_share=0.15, steps=8),
        layers=LayerStage(removals=3),
        seed=seed,
    )
    with progress.phase("compress", None):
        result = compress(model, task, config, run_dir=folder, progress=progress)
    console.print()
    numbers = compare(model, result, task, progress)
    RunFolder(folder).keep(MEASURED, numbers.to_json())
    console.print(comparison_table(numbers))
    console.print(
        Text(f"{result.message[:1].upper()}{result.message[1:]}.", style="green" if result.reached else "yellow")
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        reloaded = load(folder / "model", network.build())
    worst = _largest_difference(result, reloaded, task)
    if worst:
        raise CheckpointError(f"the model loaded from {folder / 'model'} differs from the saved one by {worst:g}")
    console.print(
        "Saved as safetensors + plan.json and loaded into a freshly built original: the outputs are the same."
    )
    return NetworkResult(network.title, result.reached, result.message, numbers)


@torch.no_grad()
def _largest_difference(result: Result, reloaded: nn.Module, task: Task) -> float:
    worst = 0.0
    with keep_modes(result.model), keep_modes(reloaded):
        for batch in task.batches("test"):
            args, kwargs = default_inputs(batch)
            worst = max(worst, float((result.model(*args, **kwargs) - reloaded(*args, **kwargs)).abs().max()))
    return worst
