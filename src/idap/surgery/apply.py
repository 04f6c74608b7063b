"""Cut a module as a plan says: slice its tensors, set its attributes, put stand-ins where blocks were removed."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from idap.errors import PlanError
from idap.graph.provenance import sizes_held
from idap.graph.run import copy_computed, find_lazy, forget_cached
from idap.structure.plan import CallForm, Plan, Size
from idap.structure.replacement import IDENTITY, LAYER, PROJECTION, ZERO, Projected
from idap.surgery.recurrent import check_recurrent
from idap.surgery.rewritten import SETTINGS_ABOVE, original_class, rewrite_, rewritten_class


class Pass(nn.Module):
    """Returns the stream that it is given, whatever else it is given, such as a mask.

    Args:
        takes: place or name of the argument that is the stream.
        gives: what is returned: ("stream",), or a tuple or list with it, with arguments handed on, and with None.
    """

    def __init__(self, takes: int | str = 0, gives: Any = ("stream",)) -> None:
        super().__init__()
        self.takes, self.gives = takes, gives

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the removed module returned, with the stream as it came."""
        return _fill(self.gives, self.stream(_argument(args, kwargs, self.takes)), args, kwargs)

    def stream(self, x: Tensor) -> Tensor:
        """What becomes of the stream."""
        return x

    def extra_repr(self) -> str:
        """Nothing in the ordinary case."""
        return "" if (self.takes, self.gives) == (0, ("stream",)) else f"takes={self.takes!r}, gives={self.gives}"


class Zero(Pass):
    """Returns zeros like the stream: the last module of a removed branch, so that nothing is added."""

    def stream(self, x: Tensor) -> Tensor:
        """Zeros of the shape, dtype and device of `x`."""
        return torch.zeros_like(x)


@dataclass(frozen=True)
class LinearMap:
    """What a projection computes, for all channels that the original has; zero for those that a model lacks.

    Attributes:
        weight: shape (outputs, inputs).
        bias: shape (outputs,).
    """

    weight: Tensor
    bias: Tensor

    def tensors(self, projected: Projected, path: str = "") -> dict[str, Tensor]:
        """Weight and bias as those of a layer with all channels, by the names of `Projected.tensors`.

        Raises:
            PlanError: the map is of other sizes.
        """
        shapes = {name: kept.shape for name, kept in projected.tensors(path).items()}
        if (tuple(self.weight.shape), tuple(self.bias.shape)) != (projected.sizes, projected.sizes[:1]):
            raise PlanError(
                f"a linear map with weight {tuple(self.weight.shape)} and bias {tuple(self.bias.shape)} was given for "
                f"{path or 'a projection'!r}, which has {projected.sizes[0]} outputs and {projected.sizes[1]} inputs "
                "in the original"
            )
        given = (self.weight, self.bias)
        return {name: tensor.reshape(shape) for (name, shape), tensor in zip(shapes.items(), given, strict=True)}


class Projection(Pass):
    """Returns a linear map of the stream's channels, which is learned: a 1x1 convolution or a linear layer.

    Args:
        projected: sizes and stride; it starts at zero.
        takes: as for `Pass`.
        gives: as for `Pass`.

    Attributes:
        map: the layer.
    """

    def __init__(self, projected: Projected, takes: int | str = 0, gives: Any = ("stream",)) -> None:
        super().__init__(takes, gives)
        inputs, outputs, stride = len(projected.inputs), len(projected.outputs), projected.stride
        # A layer without weights draws no random numbers, so that the state of the generator stays as it was.
        kinds = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        given = {"kernel_size": 1, "stride": stride} if stride else {}
        layer = kinds[len(stride)](inputs, outputs, device="meta", **given)
        layer.weight = nn.Parameter(torch.zeros(layer.weight.shape))
        layer.bias = nn.Parameter(torch.zeros(outputs))
        self.add_module(LAYER, layer)

    @torch.no_grad()
    def take(self, given: LinearMap, projected: Projected) -> None:
        """Compute this map from now on: of its channels those that `projected` keeps."""
        weight, bias = given.tensors(projected).values()
        outputs, inputs = list(projected.outputs), list(projected.inputs)
        self.get_parameter(f"{LAYER}.weight").copy_(weight[outputs][:, inputs])
        self.get_parameter(f"{LAYER}.bias").copy_(bias[outputs])

    def stream(self, x: Tensor) -> Tensor:
        """The stream with other channels, and in fewer places where it has a stride."""
        mapped: Tensor = self.get_submodule(LAYER)(x)
        return mapped


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int | str) -> Any:
    if isinstance(place, int):
        return args[place] if place < len(args) else next(iter(kwargs.values()))
    return kwargs[place] if place in kwargs else args[0]


def _fill(gives: Any, stream: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    match gives:
        case ("stream",):
            return stream
        case ("none",):
            return None
        case ("given", place):
            return _argument(args, kwargs, place)
        case ("tuple", *items):
            return tuple(_fill(item, stream, args, kwargs) for item in items)
        case ("list", *items):
            return [_fill(item, stream, args, kwargs) for item in items]
    raise PlanError(f"a stand-in can't return {gives!r}")


def trial_map(projected: Projected) -> LinearMap:
    """A map of random numbers, always the same ones, to try a cut with."""
    draw = torch.Generator().manual_seed(0)
    outputs, inputs = projected.sizes
    weight = torch.randn(outputs, inputs, generator=draw) / inputs**0.5
    return LinearMap(weight, torch.randn(outputs, generator=draw))


def stand_in(kind: str, called: CallForm | None = None, projected: Projected | None = None) -> nn.Module:
    """The module that replaces a removed one.

    Args:
        kind: "identity", "zero" or "projection".
        called: how the removed module is called; None: with the stream first, and it returns the stream alone.
        projected: of a projection what it maps.

    Raises:
        PlanError: the kind is unknown, or it is a projection of which nothing is said, or the other way round.
    """
    kinds = {IDENTITY: Pass, ZERO: Zero}
    if kind not in (*kinds, PROJECTION):
        raise PlanError(f"a removed module can become 'identity', 'zero' or 'projection', found {kind!r}")
    if (kind == PROJECTION) != (projected is not None):
        raise PlanError(f"a removed module becomes {kind!r} {'with' if projected else 'without'} sizes of a linear map")
    given = () if called is None else (called.takes, called.gives)
    return kinds[kind](*given) if projected is None else Projection(projected, *given)


def apply_plan(model: nn.Module, plan: Plan, maps: Mapping[str, LinearMap] | None = None) -> nn.Module:
    """Cut a copy of a model.

    Args:
        model: the model that the plan was made for, or a freshly built one of the same architecture. It is left as it
            was, and the copy shares no memory with it. Kept tensors of the copy are new and contiguous.
        plan: from `Structure.plan` or a file.
        maps: module path -> what the projection computes that replaces it; one without a map starts at zero.

    Returns:
        A module of the same class, smaller.

    Raises:
        PlanError: the plan does not fit the model; names the first tensor, its shape and the shape expected.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> shapes = {name: tuple(tensor.shape) for name, tensor in net.named_parameters()}
        >>> cut = {"0.weight": {0: (1, 5)}, "0.bias": {0: (1, 5)}, "2.weight": {1: (1, 5)}}
        >>> small = apply_plan(net, Plan(keep={"0": (1, 5)}, tensors=cut, shapes=shapes))
        >>> small[0].weight.shape, net[0].weight.shape
        (torch.Size([2, 4]), torch.Size([8, 4]))
    """
    check_fit(model, plan, maps)
    slices = _slice_tensors(model, plan)
    # Handing the small tensors to deepcopy means that the large ones are never copied.
    memo: dict[int, object] = {**copy_computed(model), **slices}
    small = copy.deepcopy(model, memo)
    _restructure(small, plan, maps or {})
    return small


def apply_plan_(model: nn.Module, plan: Plan, maps: Mapping[str, LinearMap] | None = None) -> nn.Module:
    """Cut a model in place; see `apply_plan`. The plan is checked first: on an error the model is untouched."""
    check_fit(model, plan, maps)
    exchange_(model, _slice_tensors(model, plan))
    _restructure(model, plan, maps or {})
    return model


def exchange_(model: nn.Module, others: Mapping[int, Tensor]) -> None:
    """Put other tensors in the place of a model's parameters and buffers, wherever it holds them.

    Args:
        model: changed in place.
        others: id of a tensor -> the one that takes its place.
    """
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in others:
                    table[name] = others[id(tensor)]  # type: ignore[assignment]
        for held in vars(module).values():  # such as the flat list of weights that a recurrent layer keeps
            if type(held) is list:
                held[:] = [others.get(id(item), item) for item in held]


def check_fit(model: nn.Module, plan: Plan, maps: Mapping[str, LinearMap] | None = None) -> None:
    """Check that every tensor and module a plan speaks of is there, in the shape it expects, and maps with it.

    Raises:
        PlanError: names the first that isn't.
    """
    if (lazy := find_lazy(model)) is not None:
        raise PlanError(
            f"{lazy!r} of the model is not initialised yet: run the model once on a batch before it is cut."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(model)}
    learned = {name for name, _ in model.named_parameters()}  # buffers may be tables that a forward pass makes anew
    for name, expected in plan.shapes.items():
        if name not in shapes:
            raise PlanError(f"the plan does not fit this model: it has no tensor {name!r} (expected shape {expected})")
        if shapes[name] != expected and (name in learned or name in plan.tensors):
            raise PlanError(
                f"the plan does not fit this model: tensor {name!r} has shape {shapes[name]}, the plan expects "
                f"{expected}; build the model exactly as it was when it was compressed."
            )
    plan.check_slots()
    _check_modules(model, plan)
    check_recurrent(model, plan)
    for path, projected in plan.projections.items():
        most = sum(parameter.numel() for parameter in model.get_submodule(path).parameters())
        if projected.sizes[0] * projected.sizes[1] > most:
            raise PlanError(
                f"the projection in place of {path!r} has {projected.sizes} channels, which is more than the {most:,} "
                "parameters of the module that it replaces"
            )
        if maps is not None and path in maps:
            maps[path].tensors(projected, path)


def _check_modules(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules())
    for path in [*plan.attributes, *plan.replaced, *plan.programs]:
        if path not in modules:
            raise PlanError(f"the plan does not fit this model: it has no module {path!r}")
    for path, values in plan.attributes.items():
        held = sizes_held(modules[path])
        for name, value in values.items():
            if name not in held:
                raise PlanError(f"the plan does not fit this model: module {path!r} has no attribute {name!r}")
            if not _can_become(held[name], value):
                raise PlanError(
                    f"the plan does not fit this model: {name!r} of module {path!r} is {held[name]!r} and can't become "
                    f"{value!r}; a plan makes sizes smaller"
                )
    for path, program in plan.programs.items():
        rewritten_class(original_class(type(modules[path])), program, modules[path])
    for path, kind in plan.replaced.items():
        if path == "":
            raise PlanError("a plan can't replace the whole model")
        stand_in(kind, plan.called.get(path), plan.projections.get(path))


def _can_become(held: Size, value: Size) -> bool:
    """Whether a plan may set an attribute: as many whole numbers as it holds, none larger, none of another sign."""
    before, after = (size if isinstance(size, tuple) else (size,) for size in (held, value))
    if isinstance(held, tuple) != isinstance(value, tuple) or len(before) != len(after):
        return False
    return all(min(old, 0) <= new <= max(old, 0) for old, new in zip(before, after, strict=True))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _slice_tensors(model: nn.Module, plan: Plan) -> dict[int, Tensor]:
    """The id of each tensor to be cut -> its new tensor; tied names share one tensor, so it is cut once."""
    found = {}
    for name, tensor in _tensors(model):
        if name in plan.tensors:
            small = cut_tensor(tensor.detach(), plan.tensors[name])
            if isinstance(tensor, nn.Parameter):
                small = nn.Parameter(small, requires_grad=tensor.requires_grad)
                vars(small).update(vars(tensor))  # marks that users leave for their optimizers
            found[id(tensor)] = small
    return found


def cut_tensor(tensor: Tensor, kept: Mapping[int, tuple[int, ...]]) -> Tensor:
    """The slots of a tensor that a plan keeps, as a new contiguous tensor.

    >>> cut_tensor(torch.arange(6).reshape(2, 3), {1: (0, 2)})
    tensor([[0, 2],
            [3, 5]])
    """
    for dim, places in kept.items():
        tensor = tensor.index_select(dim, torch.tensor(places, device=tensor.device))
    return tensor.contiguous()


def _restructure(model: nn.Module, plan: Plan, maps: Mapping[str, LinearMap]) -> None:
    modules = dict(model.named_modules())
    for path, values in plan.attributes.items():
        for name, value in values.items():
            held = getattr(modules[path], name)
            setattr(modules[path], name, list(value) if isinstance(held, list) and isinstance(value, tuple) else value)
    for path, program in plan.programs.items():
        rewrite_(modules[path], program)
        for above in (module for name, module in modules.items() if name == "" or path.startswith(f"{name}.")):
            for name, value in SETTINGS_ABOVE.get(type(above).__name__, {}).items():
                setattr(above, name, value)
    for module in modules.values():
        forget_cached(module)
    for path in plan.replaced:
        parent, _, name = path.rpartition(".")
        modules[parent]._modules[name] = _stand_in(modules[path], path, plan, maps.get(path))


def _stand_in(old: nn.Module, path: str, plan: Plan, given: LinearMap | None) -> nn.Module:
    projected = plan.projections.get(path)
    new = stand_in(plan.replaced[path], plan.called.get(path), projected).train(old.training)
    like = next((tensor for tensor in old.parameters() if tensor.is_floating_point()), None)
    if projected is None or like is None:
        return new
    new.to(device=like.device, dtype=like.dtype)
    if given is not None and isinstance(new, Projection):
        new.take(given, projected)
    return new
