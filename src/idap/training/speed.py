"""Make training faster without changing what is learned: precision, memory format, compilation."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from idap.errors import TaskError
from idap.training.batch import Outputs

T = TypeVar("T")


class Precision:
    """The precision of forward passes.

    Args:
        wanted: as in `Recovery`.
        device: device of the model.
    """

    def __init__(self, wanted: Literal["auto", "float32", "bf16"], device: torch.device) -> None:
        supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self._device, self.lowered = device, wanted == "bf16" or (wanted == "auto" and supported)

    def autocast(self) -> AbstractContextManager[Any]:
        """Within this context, compute in bfloat16 where that is accurate enough."""
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.lowered)

    def widen(self, outputs: Outputs) -> Outputs:
        """Convert the outputs of a forward pass to float32, so that losses are computed in full precision."""
        return tree_map(_in_float32, outputs) if self.lowered else outputs


def _in_float32(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16) else leaf


def has_convolutions(model: nn.Module) -> bool:
    """Whether a model has convolutions over two dimensions, which `channels_last` makes faster."""
    return any(
        isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and isinstance(getattr(module, "weight", None), Tensor)
        for module in model.modules()
    )


NARROW = 16
"""With fewer input channels, oneDNN writes past its memory: its block is 16 with AVX-512, 8 with AVX2."""


def channels_last_fault(model: nn.Module, device: torch.device) -> str | None:
    """The reason why a model must not be trained in channels-last format on a device; None if none is known.

    For a strided 1×1 convolution with few input channels, oneDNN computes the gradient of the weight out of bounds: the
    gradient is wrong, or the process crashes or hangs (https://github.com/uxlfoundation/oneDNN/issues/6035). After cuts
    of the streams of a residual network, its shortcuts are such convolutions.
    """
    if device.type != "cpu":
        return None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1} and max(module.stride) > 1:
            channels = module.in_channels // module.groups
            if channels < NARROW:
                return (
                    f"on a CPU, layer {name!r} (1×1, stride {max(module.stride)}, {channels} input channels) runs into "
                    "a fault of oneDNN that overwrites memory"
                )
    return None


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Within this context, store the 4-d parameters and buffers of a model in channels-last format.

    Within the context the tensors use other memory. Afterwards they use their own again, with the values that they have
    at the end.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.ndim == 4}
    held = [(tensor, tensor.data) for tensor in tensors.values()]
    for tensor, data in held:
        tensor.data = data.clone(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for tensor, data in held:
            if not torch.equal(data, tensor.data):
                data.copy_(tensor.data)
            tensor.data = data


def compile_model(model: nn.Module) -> nn.Module:
    """Compile a model's forward pass; torch compiles it at the first call, see `explain_failure`."""
    return cast(nn.Module, torch.compile(model))


def explain_failure(call: Callable[[], T]) -> T:
    """Make the first call of a compiled model.

    Raises:
        TaskError: the model can't be compiled on this machine.
    """
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415 - slow to import, and rarely needed

    try:
        return call()
    except TorchDynamoException as error:
        why = " ".join(str(error).strip().partition("\n\n")[0].split())
        raise TaskError(
            f"compile=True, but the model can't be compiled here: {type(error).__name__}: {why}. "
            "Leave out compile, or make torch.compile work on this machine."
        ) from error
