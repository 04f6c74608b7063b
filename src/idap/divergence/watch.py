"""Statistics of tensors that several criteria share: each tensor is watched once, however many criteria need it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from idap.divergence.observe import After, Before, Pass, Probe, result_of, tensors_in
from idap.divergence.ports import Sight, Wiring
from idap.graph.ir import CallKey
from idap.linalg.moments import sum_of_squares


@dataclass
class UnitNorms:
    """Sum over samples of ‖A_u‖, the norm of all slots and positions of a unit in one sample.

    Attributes:
        units: unit of each slot, -1 for none; shape (slots,).
        size: number of units.
        per_channel: also divide by the number of channels (D3, D7), not only by the positions (D4).
        sums: "norms", shape (size,).
    """

    units: Tensor
    size: int
    per_channel: bool
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, squared: Tensor, positions: Tensor) -> None:
        """Add a batch: squared norms, shape (samples, slots), over numbers of positions, shape (samples,)."""
        mine = self.units >= 0
        of_slots = squared[:, mine].double().cpu()
        of_units = of_slots.new_zeros(len(squared), self.size).index_add_(1, self.units[mine], of_slots)
        parts = squared.shape[1] if self.per_channel else 1
        _accumulate(self.sums, "norms", (of_units.sqrt() / (parts * positions).clamp_min(1).unsqueeze(1)).sum(0))


class ChannelStats:
    """Sums over the batches of one tensor, channel by channel: O(channels) numbers.

    Args:
        dim: the dimension of the channels; dimension 0 is that of the samples. None: all values count as one channel.

    Attributes:
        sums: "square" and, if means are needed, "sum" of each channel, shape (channels,); "positions" and "samples".
        means: whether means are needed; they take another pass over every value.
        norms: norms of units, for the criteria that need them.
        latest: squared norm of each sample of the batch that is running, shape (samples,).
    """

    def __init__(self, dim: int | None) -> None:
        self._dim = dim
        self.sums: dict[str, Tensor] = {}
        self.means = False
        self.norms: list[UnitNorms] = []
        self.latest: Tensor | None = None

    def add(self, x: Tensor, padding: Tensor | None) -> None:
        """Add a batch."""
        if self._dim is None:
            x = x.unsqueeze(1)
        if self._dim == 0:
            x = x.unsqueeze(0)
        dim = max(1, self._dim or 1)
        x = x.detach() if x.is_floating_point() else x.detach().float()
        counted = torch.full([len(x)], x[:1].numel() / max(1, x.shape[dim]), dtype=torch.float64)  # positions
        if padding is not None and (mask := _align_mask(padding, x, dim)) is not None:
            counted *= mask.reshape(len(x), -1).double().mean(1).cpu()
            x = x * mask
        inner = [place for place in range(1, x.dim()) if place != dim]
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        if not inner:
            squared = x.to(exact).square()
        elif self._dim is None:  # one norm over all of a large sample would lose digits
            row = min(inner, key=x.stride)
            rows = torch.linalg.vector_norm(x, dim=row, keepdim=True, dtype=exact).square()
            squared = rows.sum(inner, dtype=torch.float64)
        elif dim == x.dim() - 1:  # norms over dimensions that are not the last are slow
            squared = sum_of_squares(x, inner, exact)
        else:
            squared = torch.linalg.vector_norm(x, dim=inner, dtype=exact).square()
        if self.means:
            total = x.sum(inner, dtype=exact) if inner else x.to(exact)
            _accumulate(self.sums, "sum", total.sum(0, dtype=torch.float64))
        self.latest = squared.sum(1)
        _accumulate(self.sums, "square", squared.sum(0, dtype=torch.float64))
        _accumulate(self.sums, "positions", counted.sum())
        _accumulate(self.sums, "samples", (counted > 0).sum().double())
        for norms in self.norms:
            norms.add(squared, counted)

    @property
    def has_data(self) -> bool:
        """Whether any data were seen."""
        return bool(self.sums)

    @property
    def square(self) -> Tensor:
        """E a² of each channel at one position, shape (channels,)."""
        return self.sums["square"].cpu() / self.sums["positions"].clamp_min(1e-30)

    @property
    def mean(self) -> Tensor:
        """E a of each channel, shape (channels,)."""
        return self.sums["sum"].cpu() / self.sums["positions"].clamp_min(1e-30)

    def energy(self, channels: int) -> float:
        """E‖x‖² at one position that has `channels` channels, whichever dimension the sums were kept for."""
        elements = self.sums["positions"] * len(self.sums["square"])
        return float(self.sums["square"].sum().cpu() * channels / elements.clamp_min(1))

    @property
    def samples(self) -> float:
        """Number of samples seen."""
        return float(self.sums["samples"])


class SampleRatio:
    """Sums over samples of a change of the flow and of the flow it changes.

    Attributes:
        sums: "change" and "stream": squared norms; "ratio": ‖change‖ / (‖stream‖ + ε); "samples".
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, change: Tensor, stream: Tensor) -> None:
        """Add a batch of squared norms, shape (samples,); samples whose norms are all zero count as padding."""
        change, stream = change.double().cpu(), stream.double().cpu()
        _accumulate(self.sums, "change", change.sum())
        _accumulate(self.sums, "stream", stream.sum())
        _accumulate(self.sums, "ratio", (change.sqrt() / (stream.sqrt() + 1e-6)).sum())
        _accumulate(self.sums, "samples", (change + stream > 0).sum().double())

    @property
    def has_data(self) -> bool:
        """Whether any data were seen."""
        return bool(self.sums)

    @property
    def relative(self) -> float:
        """E‖F(x)‖² / E‖x‖²."""
        return float(self.sums["change"] / self.sums["stream"].clamp_min(1e-30))

    @property
    def paper(self) -> float:
        """E[‖F(x)‖ / (‖x‖ + ε)] (D6; for blocks D1b)."""
        return float(self.sums["ratio"] / self.sums["samples"].clamp_min(1))


class Watch:
    """The tensors that are watched during one measurement.

    Args:
        wiring: the wiring of the measured model.

    Attributes:
        held: all sums, to be added up over processes.
        padding: the padding of the pass that is running.
    """

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._sights: dict[str, Sight] = {}
        self._channels: dict[str, dict[int | None, ChannelStats]] = {}
        self._probes: list[Probe] = []
        self._arguments: dict[tuple[CallKey, int], Argument] = {}
        self.held: list[dict[str, Tensor]] = []
        self.padding: Tensor | None = None

    def channels(
        self, node: str, dim: int, *, reader: tuple[CallKey | None, int | None] = (None, None), means: bool = False
    ) -> ChannelStats | None:
        """Statistics of the channels of a node's value; None if one opaque call hides it.

        Args:
            node: the node whose value is watched.
            dim: the dimension of its channels.
            reader: a call that is given the value, and the value's position among the call's tensors. The value is
                watched there if possible: code may reshape a tensor differently in an export and in an ordinary run,
                but it passes on the same value.
            means: whether the means of the channels are needed as well.
        """
        node = self._wiring.source(node)
        call, place = reader
        if call is not None and place is not None:
            self._sights.setdefault(node, Sight(node, call, place))
        found = self._stats(node, dim % max(1, len(self._wiring.graph.nodes[node].shape)))
        if found is not None and means:
            found.means = True
        return found

    def _sight(self, node: str) -> Sight | None:
        return self._sights.get(node) or self._wiring.sight(node)

    def _stats(self, node: str, dim: int | None) -> ChannelStats | None:
        if self._sight(node) is None:
            return None
        found = self._channels.setdefault(node, {})
        if dim not in found:
            found[dim] = ChannelStats(dim)
            self.held.append(found[dim].sums)
        return found[dim]

    def energy(self, node: str) -> ChannelStats | None:
        """Statistics of a node's value, if it does not matter which dimension the channels have."""
        node = self._wiring.source(node)
        known = self._channels.get(node)
        return next(iter(known.values())) if known else self._stats(node, None)

    def norms(self, stats: ChannelStats, units: Tensor, size: int, *, per_channel: bool) -> UnitNorms:
        """Norms of the units in a tensor that is watched."""
        found = UnitNorms(units, size, per_channel)
        stats.norms.append(found)
        self.held.append(found.sums)
        return found

    def argument(self, call: CallKey, place: int) -> "Argument":
        """The latest tensor given to a call at a place among its tensors, such as its weight."""
        return self._arguments.setdefault((call, place), Argument(call, place))

    def at(self, call: CallKey, look: Before) -> None:
        """Watch the arguments of a call."""
        self._probes.append(Look(call, look))

    def result(self, call: CallKey, note: After) -> None:
        """Watch the result of a call."""
        self._probes.append(Note(call, note))

    def sums(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Register statistics that are to be added up over processes."""
        self.held.append(found)
        return found

    def probes(self) -> list[Probe]:
        """All probes; the shared statistics come first, so that the other probes find them up to date."""
        shared: list[Probe] = []
        for node, by_dim in self._channels.items():
            sight = self._sight(node)
            assert sight is not None
            shared += [self._see(sight, stats.add) for stats in by_dim.values()]
        return [*shared, *self._arguments.values(), *self._probes]

    def mask_padding(self, x: Tensor) -> Tensor:
        """A tensor with its channels last, zero at positions of padding."""
        mask = None if self.padding is None else _align_mask(self.padding, x, x.dim() - 1)
        return x if mask is None else x * mask

    def valid(self, x: Tensor) -> Tensor | None:
        """The flat positions that are not padding, for a tensor with its channels last; None if all count."""
        return valid_positions(self.padding, x)

    def begin(self, each: Pass) -> None:
        """Begin a pass."""
        self.padding = each.padding

    def _see(self, sight: Sight, add: Callable[[Tensor, Tensor | None], None]) -> Probe:
        place = sight.argument
        if place is not None:
            return Look(sight.call, lambda args, kwargs: add(tensors_in(args, kwargs)[place], self.padding))

        def note(result: Any) -> None:
            value = result_of(self._wiring.graph, sight.node, result)
            if value is not None:
                add(value, self.padding)

        return Note(sight.call, note)


@dataclass
class Argument:
    """The latest tensor given to a call at one place."""

    call: CallKey
    place: int
    value: Tensor | None = None

    def before(self) -> Mapping[CallKey, Before]:
        """Remember the tensor before the call is made."""
        return {self.call: self._remember}

    def after(self) -> Mapping[CallKey, After]:
        """An empty mapping: nothing is watched at this point."""
        return {}

    def _remember(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.value = tensors_in(args, kwargs)[self.place].detach()


@dataclass(frozen=True)
class Look:
    """Watches the arguments of one call."""

    call: CallKey
    look: Before

    def before(self) -> Mapping[CallKey, Before]:
        """Call `look` with the arguments."""
        return {self.call: self.look}

    def after(self) -> Mapping[CallKey, After]:
        """An empty mapping: nothing is watched at this point."""
        return {}


@dataclass(frozen=True)
class Note:
    """Watches the result of one call."""

    call: CallKey
    note: After

    def before(self) -> Mapping[CallKey, Before]:
        """An empty mapping: nothing is watched at this point."""
        return {}

    def after(self) -> Mapping[CallKey, After]:
        """Call `note` with the result."""
        return {self.call: self.note}


def valid_positions(padding: Tensor | None, x: Tensor) -> Tensor | None:
    """The flat positions that are not padding, for a tensor with its channels last; None if all count."""
    mask = None if padding is None else _align_mask(padding, x, x.dim() - 1)
    return None if mask is None else torch.nonzero(mask.expand(*x.shape[:-1], 1).ravel()).ravel().cpu()


def _align_mask(padding: Tensor, x: Tensor, dim: int) -> Tensor | None:
    """The mask in the shape of a tensor, channels in `dim`; None if its positions are not those of a sequence."""
    samples, length = padding.shape
    if x.shape[0] == samples * length:
        return padding.reshape([-1, *[1] * (x.dim() - 1)]).to(x.device)
    places = [place for place in range(1, x.dim()) if place != dim and x.shape[place] == length]
    if x.shape[0] != samples or not places:
        return None
    return padding.reshape([samples, *(length if place == places[0] else 1 for place in range(1, x.dim()))]).to(
        x.device
    )


def _accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = value if name not in sums else sums[name] + value
