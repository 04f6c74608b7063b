"""Make a model ready for inference: fold batch norms, and remove dropouts and modules that only return their input."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from idap.errors import ExportError
from idap.graph.ir import SPECIAL_OPS, Graph, Node, Ref
from idap.graph.rules.flow import arguments, base_name
from idap.graph.run import forget_cached
from idap.graph.trace import trace
from idap.surgery.compare import fresh_inputs, largest_difference, outputs_of
from idap.surgery.rewritten import original_class
from idap.surgery.stand_ins import Pass

TOLERANCE = 1e-4
_ONLY_IN_TRAINING = frozenset({"DropPath", "StochasticDepth"})
"""Classes of timm, torchvision and transformers that drop whole branches while they train."""

_TORCH_NORMS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


@dataclass(frozen=True, kw_only=True)
class Finalized:
    """What `finalize` changed in a model; modules are named by their paths in the original model.

    Attributes:
        folded: batch norm -> the convolution or linear layer into which it was folded.
        kept: batch norm -> why it was not folded.
        silenced: dropouts and stand-ins of removed blocks that became an `nn.Identity`.
        gone: identities that were removed from their `nn.Sequential`; the others there keep their names.
        difference: the largest difference from the original's outputs, divided by the largest output.
    """

    folded: Mapping[str, str]
    kept: Mapping[str, str]
    silenced: tuple[str, ...]
    gone: tuple[str, ...]
    difference: float


@dataclass(frozen=True)
class _Change:
    """The change of one module.

    Attributes:
        path: path of the module.
        into: the layer into which a batch norm is folded; "" for other modules.
        then: children of the module that must still be called, in order.
        leave: whether the module is removed from its container.
    """

    path: str
    into: str = ""
    then: tuple[str, ...] = ()
    leave: bool = False


def finalize(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> tuple[nn.Module, Finalized]:
    """Make a copy of a model that computes the same in evaluation mode with fewer modules; do not train it further.

    A batch norm is folded into the convolution or linear layer before it if the traced graph shows that nothing else
    reads that layer's output. The copy is compared with the model on the example inputs and on random ones like them.

    Args:
        model: any module that `torch.export` can export; it is left as it was.
        args: positional example inputs, always a tuple.
        kwargs: keyword example inputs.
        tolerance: largest relative difference allowed.

    Returns:
        The copy, in evaluation mode, and what was changed.

    Raises:
        TraceError: the model could not be exported on the example inputs.
        ExportError: the copy differs from the model; names the module that makes the difference.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()).eval()
        >>> small, report = finalize(model, (torch.randn(2, 3, 5, 5),))
        >>> [type(module).__name__ for module in small], dict(report.folded), report.silenced
        (['Conv2d', 'ReLU'], {'1': '0'}, ('2',))
    """
    kwargs = dict(kwargs or {})
    graph = trace(model, args, kwargs)
    plan = _Plan(model, graph)
    finished = _apply(model, plan.changes)
    inputs = [(args, kwargs), fresh_inputs(model, args, kwargs, batch=None, seed=0)]
    error = _difference(model, finished, inputs)
    if not error <= tolerance:
        for change in plan.changes:
            alone = _difference(model, _apply(model, [change]), inputs)
            if not alone <= tolerance:
                what = f"folding it into {change.into!r}" if change.into else "taking it out"
                raise ExportError(
                    f"module {change.path!r} of {type(model).__name__} can't be finalized: {what} changes the outputs "
                    f"by {alone:.2g} of the largest value, allowed is {tolerance:g}. Use the model as it is, or pass a "
                    "larger tolerance if the difference is rounding."
                )
        raise ExportError(
            f"the finalized {type(model).__name__} differs by {error:.2g} of the largest output, allowed is "
            f"{tolerance:g}, though no change of a single module differs by so much; use the model as it is."
        )
    changes = plan.changes
    return finished, Finalized(
        folded={change.path: change.into for change in changes if change.into},
        kept=plan.kept,
        silenced=tuple(path for path in plan.silenced),
        gone=tuple(change.path for change in changes if change.leave),
        difference=error,
    )


class _Plan:
    """Finds the changes that can be made to a model.

    Attributes:
        changes: one per changed module.
        kept: batch norm -> why it can't be folded.
        silenced: modules that become an identity, without batch norms and modules that already are identities.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self._graph = graph
        self._users = graph.users()
        self._modules = dict(model.named_modules())
        self._shared = set(graph.module_aliases.values())
        self.kept: dict[str, str] = {}
        self.silenced: list[str] = []
        self.changes = [*self._folds(), *self._silences()]

    def _folds(self) -> Iterator[_Change]:
        for node in self._graph.nodes.values():
            path = node.owner
            norm = self._modules.get(path)
            if node.op not in SPECIAL_OPS and base_name(node.op) == "batch_norm" and isinstance(norm, _BatchNorm):
                found = self._fold(node, path, norm)
                if isinstance(found, _Change):
                    yield found
                else:
                    self.kept[path] = found

    def _fold(self, node: Node, path: str, norm: _BatchNorm) -> _Change | str:
        """The change that folds a batch norm, or why it can't be folded."""
        given = arguments(node)
        before = self._graph.nodes[given["input"].name]
        layer = self._modules.get(before.owner)
        if given["running_mean"] is None or given["training"]:
            return "it has no running statistics"
        if not isinstance(layer, _ConvNd | nn.Linear) or base_name(before.op)[:4] not in ("conv", "line"):
            return "no convolution or linear layer comes before it"
        if self._users[before.name] != [node.name] or before.name in self._graph.outputs:
            return f"the output of {before.owner!r} is read elsewhere too"
        if not self._alone(path) or not self._owns_its_weights(before, layer):
            return "its module or the layer before it is shared, has hooks, or its tensors are used elsewhere"
        if isinstance(layer, _ConvTransposeNd) and layer.groups > 1:
            return f"{before.owner!r} is a transposed convolution with groups"
        wanted = 2 if isinstance(layer, nn.Linear) else layer.weight.ndim
        if len(before.shape) != wanted:
            return f"the output of {before.owner!r} has {len(before.shape)} dimensions, a batch norm reads the second"
        then = self._after(node, path, norm)
        if then is None:
            return f"a {type(norm).__name__} does more than normalise"
        return _Change(path, before.owner, then, leave=not then and self._may_leave(path))

    def _owns_its_weights(self, before: Node, layer: nn.Module) -> bool:
        """Whether a layer computes with its own parameters, which nothing else reads."""
        given = arguments(before)
        if original_class(type(layer)) is not type(layer) or before.owner in self._shared:
            return False
        for name in ("weight", "bias"):
            used = given[name]
            if used is None:
                continue
            node = self._graph.nodes[used.name] if isinstance(used, Ref) else None
            if node is None or node.target != f"{before.owner}.{name}" or self._users[node.name] != [before.name]:
                return False
        return True

    def _after(self, node: Node, path: str, norm: nn.Module) -> tuple[str, ...] | None:
        """The children that a norm with its own forward calls after normalising; None if it does anything else."""
        if type(norm).forward in _TORCH_NORMS:
            return ()
        own = [n.name for n in self._graph.nodes.values() if n.owner == path and n.op not in SPECIAL_OPS]
        (call,) = self._graph.modules[path].calls
        if own != [node.name] or original_class(type(norm)) is not type(norm):
            return None
        stream, then = node.name, []
        for name, _ in norm.named_children():
            calls = self._graph.modules[f"{path}.{name}"].calls
            if len(calls) != 1 or calls[0].input != stream or calls[0].gives != ("stream",):
                return None
            stream = calls[0].output
            then.append(name)
        return tuple(then) if stream == call.output else None

    def _silences(self) -> Iterator[_Change]:
        for path, module in self._modules.items():
            plain = type(module) is Pass and (module.takes, module.gives) == (0, ("stream",))
            silent = isinstance(module, _DropoutNd) or type(module).__name__ in _ONLY_IN_TRAINING or plain
            if path == "" or not (silent or type(module) is nn.Identity) or not self._hands_on(path):
                continue
            leave = self._may_leave(path)
            if silent:
                self.silenced.append(path)
            if silent or leave:
                yield _Change(path, leave=leave)

    def _hands_on(self, path: str) -> bool:
        """Whether a module is called, each time only takes and returns a stream, and no hook or other code uses it."""
        calls = self._graph.modules[path].calls
        alike = all(call.takes == 0 and call.gives == ("stream",) for call in calls)
        return bool(calls) and alike and self._free(path)

    def _alone(self, path: str) -> bool:
        return self._free(path) and len(self._graph.modules[path].calls) == 1

    def _free(self, path: str) -> bool:
        module, seen = self._modules[path], self._graph.modules[path]
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        return not hooked and not seen.read_by and path not in self._shared

    def _may_leave(self, path: str) -> bool:
        """Whether a module lies in a Sequential that is always run as a whole."""
        above = path.rpartition(".")[0]
        container = self._modules[above]
        if type(container).forward is not nn.Sequential.forward or above in self._shared:
            return False
        calls = self._graph.modules[above].calls
        return bool(calls) and len(calls) == len(self._graph.modules[path].calls)


@torch.no_grad()
def _apply(model: nn.Module, changes: list[_Change]) -> nn.Module:
    finished = copy.deepcopy(model).eval()
    modules = dict(finished.named_modules())
    for module in modules.values():
        forget_cached(module)
    for change in changes:
        if change.into:
            _fold_into(modules[change.into], modules[change.path])
        above, _, name = change.path.rpartition(".")
        if change.leave:
            del modules[above]._modules[name]
        else:
            kept = [modules[f"{change.path}.{child}"] for child in change.then]
            modules[above]._modules[name] = (
                kept[0] if len(kept) == 1 else nn.Sequential(*kept) if kept else nn.Identity()
            )
    return finished.eval()


def _fold_into(layer: nn.Module, norm: nn.Module) -> None:
    """W' = W γ / √(σ² + ε), b' = (b − μ) γ / √(σ² + ε) + β, by torch's own functions."""
    weight: Any = layer.weight
    bias: Any = layer.bias
    mean: Any = norm.running_mean
    variance: Any = norm.running_var
    eps: Any = norm.eps
    gamma: Any = norm.weight
    beta: Any = norm.bias
    if isinstance(layer, nn.Linear):
        layer.weight, layer.bias = fuse_linear_bn_weights(weight, bias, mean, variance, eps, gamma, beta)
    else:
        across = isinstance(layer, _ConvTransposeNd)
        layer.weight, layer.bias = fuse_conv_bn_weights(weight, bias, mean, variance, eps, gamma, beta, across)


def _difference(model: nn.Module, other: nn.Module, inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> float:
    return max(
        largest_difference(model, lambda args, kwargs: outputs_of(other, args, kwargs), each)[0] for each in inputs
    )
