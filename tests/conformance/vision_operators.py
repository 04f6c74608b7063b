"""Make torchvision importable beside a CPU build of torch, for this project's own environments only.

The registry's torchvision is built for CUDA. Its compiled operators don't load beside a CPU torch, and importing it
then fails where it registers shapes for two of them. Defining those two schemas first is enough: nothing that is
tested or measured here calls them.
"""

import torch

_LIBRARIES: list[torch.library.Library] = []


def make_importable() -> None:
    """Define the schemas that `import torchvision` looks for, once."""
    if _LIBRARIES or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    )
    _LIBRARIES.append(library)
