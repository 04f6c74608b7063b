"""Lists of layers without the stand-ins of removed ones: which names the tensors would have in a model built short."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from idap.surgery.bypass import Pass


@dataclass(frozen=True)
class Shortened:
    """A model as if the removed layers had never been there.

    Attributes:
        paths: module path in the model -> its path once the layers behind a removed one have moved up.
        lists: for each list that lost layers, how many it had, and which of them stay.
        left: path of the first stand-in that is no whole layer of a list, and so can't be left out; "" for none.
    """

    paths: Mapping[str, str]
    lists: tuple[tuple[int, tuple[int, ...]], ...]
    left: str

    def name(self, tensor: str) -> str:
        """The new name of a tensor."""
        path, _, own = tensor.rpartition(".")
        return f"{self.paths[path]}.{own}" if path else own

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The state of the model under its new names; tied tensors stay one object."""
        return {self.name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}


def shortened(model: nn.Module) -> Shortened:
    """Leave the stand-ins of whole layers out of the lists of a cut model; the model is not changed.

    Example:
        >>> net = nn.ModuleList([nn.Linear(2, 2), Pass(), nn.ReLU()])
        >>> found = shortened(net)
        >>> found.paths["2"], found.lists, found.left
        ('1', ((3, (0, 2)),), '')
    """
    paths: dict[str, str] = {}
    lists: list[tuple[int, tuple[int, ...]]] = []
    left: list[str] = []
    for path, new, module in _walk("", "", model):
        paths[path] = new
        if isinstance(module, Pass):
            left.append(path)
        stays = _staying(module)
        if len(stays) < len(module._modules):
            lists.append((len(module._modules), tuple(map(int, stays))))
    return Shortened(paths, tuple(lists), left[0] if left else "")


def _walk(old: str, new: str, module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    yield old, new, module
    stays = _staying(module)
    for name, child in module._modules.items():
        if child is not None and name in stays:
            yield from _walk(_joined(old, name), _joined(new, stays[name]), child)


def _staying(module: nn.Module) -> dict[str, str]:
    """The children of a module that stay, with their new names."""
    names = list(module._modules)
    if isinstance(module, nn.ModuleList | nn.Sequential):
        names = [name for name, child in module._modules.items() if type(child) is not Pass]
        if len(names) < len(module._modules):
            return {name: str(place) for place, name in enumerate(names)}
    return {name: name for name in names}


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
