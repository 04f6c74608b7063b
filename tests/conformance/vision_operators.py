"""Make torchvision importable beside a CPU build of torch, for this project's own environments only.

The registry's torchvision is built for CUDA. Its compiled operators don't load beside a CPU torch, and importing it
then fails where it registers shapes for two of them. Defining those two schemas first is enough: nothing that is
tested or measured here calls them.

Run as a script, as `make` does, it installs itself into the environment that runs it, so that every Python there
defines the schemas just before torchvision is imported, and does nothing else.
"""

import importlib.abc
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

_KEPT: list[Any] = []
"""A library takes its definitions back when it is collected."""


def make_importable() -> None:
    """Define the schemas that `import torchvision` looks for, once."""
    import torch

    if _KEPT or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing, and defines the schemas when someone looks for torchvision."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Called for every import that is not cached."""
        if fullname == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            make_importable()


def install() -> None:
    """Copy this file into the environment, with a line that is run whenever Python starts there."""
    packages = Path(sysconfig.get_path("purelib"))
    shutil.copyfile(__file__, packages / "_vision_operators.py")
    line = "import sys, _vision_operators; sys.meta_path.insert(0, _vision_operators.BeforeTorchvision())\n"
    (packages / "_vision_operators.pth").write_text(line)


if __name__ == "__main__":
    install()
