"""Propose changes of the fields of a configuration, and rename tensors after the removal of layers."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from idap.surgery.stand_ins import Pass


@dataclass(frozen=True)
class Shortened:
    """The paths of a model's modules as if the removed layers had never existed.

    Attributes:
        paths: module path in the model -> its path after the layers behind a removed one have moved up.
        lists: for each list that lost layers, the number that it had, and the indices of those that stay.
        left: path of the first stand-in that is not a whole layer of a list, and so can't be left out; "" if there is
            none.
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


def shorten(model: nn.Module) -> Shortened:
    """Leave the stand-ins of whole layers out of the lists of a compressed model; the model is not changed.

    Example:
        >>> net = nn.ModuleList([nn.Linear(2, 2), Pass(), nn.ReLU()])
        >>> found = shorten(net)
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
        stays = _children_left(module)
        if len(stays) < len(module._modules):
            lists.append((len(module._modules), tuple(map(int, stays))))
    return Shortened(paths, tuple(lists), left[0] if left else "")


def _walk(old: str, new: str, module: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    yield old, new, module
    stays = _children_left(module)
    for name, child in module._modules.items():
        if child is not None and name in stays:
            yield from _walk(_join(old, name), _join(new, stays[name]), child)


def _children_left(module: nn.Module) -> dict[str, str]:
    """The children of a module that stay, with their new names."""
    names = list(module._modules)
    if isinstance(module, nn.ModuleList | nn.Sequential):
        names = [name for name, child in module._modules.items() if type(child) is not Pass]
        if len(names) < len(module._modules):
            return {name: str(place) for place, name in enumerate(names)}
    return {name: name for name in names}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


Path = tuple[str | int, ...]
Edit = Mapping[Path, Any]
"""Keys that lead to a field of a configuration -> its new value."""
Pairs = Sequence[tuple[int, int]]
"""Pairs of a size found and the size wanted in its place."""


class Fields:
    """The fields of one configuration.

    Args:
        start: the configuration as a dict.
        inner: names of the configurations inside it.
        common: names of the fields that every configuration has; none of them gives a size.
        lists: for each list that lost layers, the number that it had, and the indices of those that stay.
        head_dims: widths of a head in the modules, for configurations without a field for them.
    """

    def __init__(
        self,
        start: Mapping[str, Any],
        inner: Collection[str],
        common: Collection[str],
        lists: Sequence[tuple[int, Sequence[int]]],
        head_dims: Collection[int],
    ) -> None:
        self._start, self._common = start, common
        self._lists, self._head_dims = lists, sorted(head_dims)
        self._levels: list[Path] = [(), *((name,) for name in inner if isinstance(start.get(name), dict))]

    def value(self, path: Path) -> Any:
        """The value of a field before any change; None if there is no such field."""
        held: Any = self._start
        for key in path:
            held = held[key] if isinstance(key, int) else held.get(key)
        return held

    def edits(self, done: Edit, pairs: Pairs, refused: Sequence[Edit]) -> Iterator[Edit]:
        """Edits to try next.

        Args:
            done: the changes so far.
            pairs: sizes that are still wrong.
            refused: edits that the configuration refused on their own; a number of heads may have to change as well.
        """
        for before, stays in self._lists:
            yield from self._shorter(done, before, stays)
        numbers = self._numbers(done)
        equal = [{path: new} for size, new in pairs for path, value in numbers.items() if value == size]
        yield from equal
        shares = list(by_share(numbers, pairs))
        yield from shares
        yield from ({**one, **two} for one in list(refused) for two in shares if not set(one) & set(two))
        heads = list(self._head_widths(done))
        yield from heads
        yield from ({**edit, **width} for edit in [*equal, *shares] for width in heads)
        for level in self._levels:
            unset = [(*level, key) for key, value in self._own(level).items() if value is None]
            yield from ({path: new} for path in unset if path not in done for _, new in pairs)

    def silent_edits(self, done: Edit, pairs: Pairs) -> Iterator[Edit]:
        """Further edits that may leave all tensors as they are: lists with an item for each layer, numbers of heads.

        Args:
            done: the changes so far.
            pairs: all sizes that had to change.
        """
        for before, stays in self._lists:
            for level in self._levels:
                yield from self._list_edits(level, before, stays)
        singles = list(by_share(self._numbers({}), pairs))
        yield from singles
        for place, one in enumerate(singles):
            yield from ({**one, **two} for two in singles[place + 1 :] if not set(one) & set(two))

    def _shorter(self, done: Edit, before: int, stays: Sequence[int]) -> Iterator[Edit]:
        """Edits of a number of layers, each with some of the lists that have an item for each layer."""
        for level in self._levels:
            lists = list(self._list_edits(level, before, stays))
            # A list of words, such as the kinds of attention, hardly ever has the number of layers by chance.
            words = [edit for edit in lists[-1:] if all(isinstance(v[0], str) for v in edit.values())]
            for key, value in self._own(level).items():
                if type(value) is int and value == before and (*level, key) not in done:
                    yield from ({(*level, key): len(stays), **edit} for edit in [*words, {}, *lists])
            yield from lists

    def _list_edits(self, level: Path, before: int, stays: Sequence[int]) -> Iterator[Edit]:
        """Edits of lists with an item for each layer: all lists of words, each list alone, then all together."""
        lists: dict[Path, Any] = {
            (*level, key): [value[place] for place in stays]
            for key, value in self._own(level).items()
            if isinstance(value, list) and len(value) == before > 1 and stays
        }
        words = {path: value for path, value in lists.items() if isinstance(value[0], str)}
        if words:
            yield words
        yield from ({path: value} for path, value in lists.items())
        if lists:
            yield lists

    def _head_widths(self, done: Edit) -> Iterator[dict[Path, Any]]:
        """Edits that set the width of a head, if the field is unset and other fields determine the width."""
        for level in self._levels:
            path = (*level, "head_dim")
            if self._own(level).get("head_dim") is None and path not in done:
                yield from ({path: width} for width in self._head_dims)

    def _numbers(self, done: Edit) -> dict[Path, int | float]:
        """All numbers of at least 1, alone and in lists, with the changes so far."""
        found: dict[Path, Any] = {}
        for level in self._levels:
            for key, value in self._own(level).items():
                now = done.get((*level, key), value)
                if isinstance(now, list):
                    found |= {(*level, key, place): item for place, item in enumerate(now)}
                else:
                    found[*level, key] = now
        found = {path: done.get(path, value) for path, value in found.items()}
        return {path: value for path, value in found.items() if type(value) in (int, float) and value >= 1}

    def _own(self, level: Path) -> dict[str, Any]:
        """The fields of one level without those that every configuration has and those that name tokens."""
        fields: Mapping[str, Any] = self._start if not level else self._start[str(level[0])]
        return {
            key: value
            for key, value in fields.items()
            if key not in self._common and not key.endswith(("_id", "_ids", "tokens"))
        }


def by_share(numbers: Mapping[Path, int | float], pairs: Pairs) -> Iterator[dict[Path, Any]]:
    """Edits of numbers in proportion to a size: whole numbers that divide it, such as numbers of heads, and ratios.

    Example:
        >>> list(by_share({("heads",): 4, ("classes",): 10, ("mlp_ratio",): 4.0}, [(64, 48)]))
        [{('heads',): 3}, {('mlp_ratio',): 3.0}]
    """
    seen = set()
    for whole in (True, False):
        for size, wanted in pairs:
            for path, value in numbers.items():
                if size in (0, wanted) or isinstance(value, int) is not whole:
                    continue
                new = value * wanted / size
                if whole and (value < 2 or size % value or value == size or new != int(new)):
                    continue
                if (path, new) not in seen:
                    seen.add((path, new))
                    yield {path: int(new) if whole else new}


def describe_edit(edit: Edit) -> str:
    """Describe an edit as text, such as "head_dim=4"."""
    return ", ".join(f"{'.'.join(map(str, path))}={value}" for path, value in edit.items())
