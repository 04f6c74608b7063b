"""Compress a network that is no classifier: an autoencoder, with a loss and a metric of its own.

python examples/custom_task.py
"""

import tempfile
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import idap
from idap.data.tensors import digits


def build_autoencoder() -> nn.Module:
    """Map `(B, 1, 8, 8)` to itself through 16 numbers."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
    decoder = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.Unflatten(1, (1, 8, 8)))
    return nn.Sequential(encoder, decoder)


def squared_error(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Compare the outputs with the images, the first part of a batch; the labels are not looked at."""
    return F.mse_loss(outputs, batch[0])


def main(epochs: float = 20.0) -> idap.Result:
    """Train, compress, save, and load again."""
    console = Console()
    splits = digits(seed=0)
    task = idap.Task(
        train=splits.train,
        val=splits.val,
        test=splits.test,
        loss=squared_error,
        metric=squared_error,
        metric_name="squared error",
        higher_is_better=False,
    )
    torch.manual_seed(0)
    model = build_autoencoder()
    idap.fit(model, task, idap.Recovery(epochs=epochs, lr=0.002, optimizer="adamw"))
    # Distillation compares class probabilities, which there are none of here: distil=0 learns from the task alone.
    recovery = idap.Recovery(epochs=epochs / 4, lr=0.001, optimizer="adamw", distil=0)
    result = idap.compress(model, task, idap.Config(max_drop=0.05, macs=0.6, recovery=recovery))
    console.print(result)
    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
        reloaded = idap.load(Path(folder), build_autoencoder())
    console.print(f"squared error on the test data: {idap.evaluate(reloaded, task, split='test'):.4f}")
    return result


if __name__ == "__main__":
    main()
