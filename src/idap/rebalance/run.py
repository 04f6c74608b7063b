"""Walk through the network and correct one layer after another, from input to output."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from idap.divergence.observe import Pass, tensors_in
from idap.divergence.ports import Wiring
from idap.divergence.watch import valid_positions
from idap.errors import ConfigError, StructureError, TaskError
from idap.graph.calls import intercept
from idap.graph.ir import CallKey
from idap.progress import Progress, Silent
from idap.rebalance.consumers import Consumer, changed_nodes, consumers_of
from idap.rebalance.moments import RIDGES, Fit, Moments, fit
from idap.rebalance.norms import Affine, affine_of, reestimate_norms_, running_mean
from idap.structure.analysis import Structure
from idap.structure.layout import slots
from idap.structure.plan import Plan
from idap.training.evaluate import modes_kept


@dataclass(frozen=True)
class Rebalance:
    """What is corrected after a cut, without any gradient step (method.md 3.3).

    Args:
        least_squares: refit the weights of the layers whose inputs changed to the original's outputs.
        means: put what was removed on average into biases and running means.
        norms: estimate the statistics of batch norms anew.
        through_additions: a layer that is added to the residual stream also makes up for the error of the stream.
        rows: rows of a layer's inputs that are drawn from the calibration data, at least 256.
        held_out: share of the calibration samples that decide on the ridge, and on whether a layer keeps its old
            weights; in (0, 1).
        memory: bytes that targets may take at once.

    Raises:
        ConfigError: a setting is out of range.
    """

    least_squares: bool = True
    means: bool = True
    norms: bool = False
    through_additions: bool = True
    rows: int = 16384
    held_out: float = 0.25
    memory: int = 2**30

    def __post_init__(self) -> None:
        if self.rows < 256:
            raise ConfigError(f"rebalance.rows must be at least 256, found {self.rows}.")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"rebalance.held_out must lie in (0, 1), found {self.held_out}.")

    @property
    def refits(self) -> bool:
        """Whether layers are corrected one by one."""
        return self.least_squares or self.means

    def __bool__(self) -> bool:
        return self.refits or self.norms


@dataclass(frozen=True)
class Correction:
    """What became of one layer.

    Attributes:
        weight: canonical name of its weight.
        before: error against the original's output on held-out samples, before the correction.
        after: and after it; equal to `before` where the layer kept its old weights.
        ridge: that held-out samples preferred; infinite where only the bias changed, NaN where nothing did.
    """

    weight: str
    before: float
    after: float
    ridge: float


def rebalance_(
    model: nn.Module,
    original: nn.Module,
    structure: Structure,
    plan: Plan,
    passes: Sequence[Pass],
    setting: Rebalance | None = None,
    *,
    progress: Progress | None = None,
) -> list[Correction]:
    """Correct the layers of a cut model in place, from input to output.

    Args:
        model: what the plan made of the original.
        original: gives the targets; is not changed.
        structure: of the original.
        plan: from the original to the model.
        passes: the calibration batches. A single one, with all samples, lets one pass over the model correct all
            layers; several take a pass per layer.
        setting: what is corrected.
        progress: hears of each layer.

    Returns:
        What became of each layer, in the order of the network.

    Raises:
        TaskError: there is no calibration batch.
        StructureError: the model does not run on this data as it was traced.
    """
    setting, progress = setting or Rebalance(), progress or Silent()
    if not passes:
        raise TaskError("there is no calibration batch to rebalance on.")
    found: list[Correction] = []
    if setting.refits:
        wiring = Wiring(structure, plan.removed)
        changed = changed_nodes(structure, wiring, plan.tensors)
        consumers = consumers_of(structure, wiring, changed, limit=max(256, setting.rows // len(passes)))
        with progress.phase("rebalance", len(consumers)) as phase:
            walk = _Walk(model, original, structure, plan, setting, found)
            for consumer in walk.over(consumers, passes):
                phase.advance(consumer.weight)
    if setting.norms:
        reestimate_norms_(model, passes)
    return found


@dataclass
class _Case:
    """One layer on the way: what it has read in the running batch, and the sums so far."""

    consumer: Consumer
    kept: Tensor
    through: bool
    chosen: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    learned: Moments | None = None
    held_out: Moments | None = None
    again: Callable[[], Tensor] = torch.empty
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    read: Tensor = field(default_factory=lambda: torch.empty(0))


class _StopEarlyError(Exception):
    """Nothing further of this pass is needed."""


class _Walk:
    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        structure: Structure,
        plan: Plan,
        setting: Rebalance,
        found: list[Correction],
    ) -> None:
        self._model, self._original, self._structure, self._setting = model, original, structure, setting
        self._present = structure.presence(plan.keep)
        self._tensors = dict([*model.named_parameters(), *model.named_buffers()])
        self._found = found

    def over(self, consumers: Sequence[Consumer], passes: Sequence[Pass]) -> Iterator[Consumer]:
        """Correct all of them; yields each when it is done."""
        for chunk in self._chunks(consumers, passes):
            cases = [self._case(consumer) for consumer in chunk]
            self._targets(cases, passes)
            for part in [cases] if len(passes) == 1 else [[case] for case in cases]:
                self._student(part, passes, at_once=len(passes) == 1)
                yield from (case.consumer for case in part)

    def _chunks(self, consumers: Sequence[Consumer], passes: Sequence[Pass]) -> Iterator[list[Consumer]]:
        """Consecutive layers whose targets fit into memory."""
        chunk, held = list[Consumer](), 0
        for consumer in consumers:
            outputs = self._structure.graph.nodes[consumer.node].shape[consumer.rows.contraction.output_dim]
            size = 4 * outputs * consumer.rows.limit * len(passes)
            if chunk and held + size > self._setting.memory:
                yield chunk
                chunk, held = [], 0
            chunk.append(consumer)
            held += size
        if chunk:
            yield chunk

    def _case(self, consumer: Consumer) -> _Case:
        written = self._structure.layout.dims[consumer.node][0][consumer.rows.contraction.output_dim]
        kept = slots(written, self._present) if len(written) else [True] * written.shape[1]
        plain = not consumer.stream.affine or list(consumer.stream.affine) == [consumer.norm]
        through = self._setting.through_additions and consumer.addition is not None and plain and consumer.shifts
        return _Case(consumer, torch.nonzero(torch.as_tensor(kept)).ravel(), through)

    @torch.no_grad()
    def _targets(self, cases: Sequence[_Case], passes: Sequence[Pass]) -> None:
        """Run the original and keep what it gives at the drawn positions."""
        at, sums = _by_call(cases), _by_addition(cases)
        for number, each in enumerate(passes):

            def handle(key: CallKey, func: Any, args: Any, kwargs: Any, number: int = number, each: Pass = each) -> Any:
                case, added = at.get(key), sums.get(key)
                if case is not None:
                    given = tensors_in(args, kwargs)
                    case.chosen.append(_chosen(case.consumer, given, each, number))
                result = func(*args, **kwargs)
                target = added or (case if case is not None and not case.through else None)
                if target is not None:
                    rows = target.consumer.rows.outputs(result, target.chosen[number])
                    target.targets.append(rows[:, target.kept.to(rows.device)].clone())
                return result

            _run(self._original, each, handle)
        for case in cases:
            if len(case.targets) != len(passes):
                raise StructureError(
                    f"the layer with weight {case.consumer.weight!r} did not run as it was traced; trace the model on "
                    "inputs like the calibration data."
                )

    @torch.no_grad()
    def _student(self, cases: Sequence[_Case], passes: Sequence[Pass], *, at_once: bool) -> None:
        at, sums = _by_call(cases), _by_addition(cases)
        last = max(cases, key=lambda case: list(self._structure.graph.nodes).index(case.consumer.node))
        for number, each in enumerate(passes):

            def handle(key: CallKey, func: Any, args: Any, kwargs: Any, number: int = number) -> Any:
                case, added = at.get(key), sums.get(key)
                if added is not None:
                    args, kwargs = self._at_addition(added, number, args, kwargs, at_once)
                result = func(*args, **kwargs)
                if case is not None:
                    x = tensors_in(args, kwargs)[case.consumer.input_at]
                    result = self._at_layer(case, number, result, lambda: func(*args, **kwargs), x, at_once)
                if (added or case) is last and (added is not None or not last.through):
                    raise _StopEarlyError
                return result

            _run(self._model, each, handle)
        if not at_once:
            for case in cases:
                self._correct(case)

    def _at_layer(
        self,
        case: _Case,
        number: int,
        result: Tensor,
        again: Callable[[], Tensor],
        x: Tensor,
        at_once: bool,
    ) -> Tensor:
        weight = self._tensors[case.consumer.weight]
        case.read = case.consumer.rows.of(x, weight, case.chosen[number])
        case.output, case.again = result, again
        if case.through:
            return result
        self._add(case, case.targets[number])
        return again() if at_once and self._correct(case) else result

    def _at_addition(self, case: _Case, number: int, args: Any, kwargs: Any, at_once: bool) -> tuple[Any, Any]:
        """The branch should give what the original's sum lacks beside the skip that is here."""
        given = tensors_in(args, kwargs)
        branch, skip = given[case.consumer.branch_at], given[1 - case.consumer.branch_at]
        if branch.shape != case.output.shape or skip.shape != branch.shape:
            raise StructureError(
                f"the branch that ends in the layer with weight {case.consumer.weight!r} has shape "
                f"{tuple(branch.shape)} where {tuple(case.output.shape)} was expected."
            )
        before = self._affine(case.consumer)
        wanted = case.targets[number] - case.consumer.rows.outputs(skip, case.chosen[number])
        self._add(case, before.undone(wanted))
        if not at_once or not self._correct(case):
            return args, kwargs
        dim = case.consumer.rows.contraction.output_dim
        after = self._affine(case.consumer)
        fresh = branch + after.applied(case.again(), dim) - before.applied(case.output, dim)
        case.again, case.output = torch.empty, torch.empty(0)
        replaced: tuple[Any, Any] = tree_map(lambda leaf: fresh if leaf is branch else leaf, (args, kwargs))
        return replaced

    def _add(self, case: _Case, targets: Tensor) -> None:
        """Add the rows that were read and their targets to the sums."""
        parts, rows = case.read.shape[0], case.read.shape[1]
        y = targets.reshape(rows, parts, -1).transpose(0, 1)
        learned = torch.arange(rows) < round(rows * (1 - self._setting.held_out))  # rows are in the order of samples
        for name, mask in (("learned", learned), ("held_out", ~learned)):
            sums = Moments.of(case.read[:, mask], y[:, mask])
            held = getattr(case, name)
            setattr(case, name, sums if held is None else held + sums)
        case.read = torch.empty(0)

    def _affine(self, consumer: Consumer) -> Affine:
        return affine_of(self._structure.graph, consumer.norm, self._tensors)

    def _correct(self, case: _Case) -> bool:
        """Refit a layer from the sums; says whether anything changed."""
        consumer, setting = case.consumer, self._setting
        assert case.learned is not None and case.held_out is not None
        parameter = self._tensors[consumer.weight]
        weight = consumer.rows.matrix(parameter.double(), len(case.learned.x))
        bias = self._tensors[consumer.bias].double() if consumer.bias else parameter.new_zeros(len(case.kept)).double()
        bias = bias.reshape(weight.shape[:2])
        shift = consumer.shifts and setting.means
        ridges = RIDGES if setting.least_squares else ()
        found = fit(case.learned, case.held_out, weight, bias, ridges=ridges, shift=shift)
        case.learned = case.held_out = None
        if found is None:
            before = float("nan")
            self._found.append(Correction(consumer.weight, before, before, float("nan")))
            return False
        self._write(consumer, parameter, found, bias)
        self._found.append(Correction(consumer.weight, found.before, found.after, found.ridge))
        return True

    def _write(self, consumer: Consumer, parameter: Tensor, found: Fit, bias: Tensor) -> None:
        parameter.data.copy_(consumer.rows.weight(found.weight, parameter))
        change = (found.bias - bias).ravel()
        if consumer.bias:
            self._tensors[consumer.bias].data.add_(change)
        elif consumer.norm:
            self._tensors[running_mean(self._structure.graph, consumer.norm)].data.sub_(change)


def _by_call(cases: Sequence[_Case]) -> dict[CallKey, _Case]:
    return {case.consumer.call: case for case in cases}


def _by_addition(cases: Sequence[_Case]) -> dict[CallKey, _Case]:
    return {case.consumer.addition: case for case in cases if case.through and case.consumer.addition is not None}


def _chosen(consumer: Consumer, given: Sequence[Tensor], each: Pass, number: int) -> Tensor:
    place = next(i for i, tensor in enumerate(given) if i != consumer.input_at and tensor.dim() > 1)
    return consumer.rows.choose(
        given[consumer.input_at], given[place], lambda x: valid_positions(each.padding, x), number
    )


def _run(model: nn.Module, each: Pass, handle: Callable[..., Any]) -> None:
    with modes_kept(model), intercept(model, handle):
        try:
            each.run(model)
        except _StopEarlyError:
            return
