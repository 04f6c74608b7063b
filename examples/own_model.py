"""A network and a task of your own, for the command line.

    idap inspect python:examples/own_model.py:build_model --input-shape 1,1,8,8
    idap compress --model python:examples/own_model.py:build_model --task python:examples/own_model.py:task \
        --max-drop 0.02 --macs 0.5

A class, or any function without arguments, will do for the model; a Task, or a function that returns one, for the task.
"""

from torch import nn

import idap
from idap.data.tensors import digits

splits = digits(seed=0)
task = idap.classification(splits.train, splits.val, num_classes=10, test=splits.test)


def build_model() -> nn.Module:
    """Build and train a small CNN; yours would load its weights here, or be given them with --weights."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU()
    ).append(nn.Linear(64, 10))
    idap.fit(model, task, idap.Recovery(epochs=5, lr=0.05))
    return model
