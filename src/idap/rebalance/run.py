"""Correct the layers of a cut model one after another, from input to output (docs/method.md#rebalancing)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from idap.divergence.observe import Pass, tensors_in
from idap.divergence.ports import Wiring
from idap.errors import ConfigError, StructureError, TaskError, check_kinds
from idap.graph.calls import intercept
from idap.graph.ir import CallKey
from idap.graph.run import tensors_of
from idap.linalg.ridge import RIDGES, Fit, Moments, fit
from idap.linalg.shift import Residuals, fit_shift
from idap.progress import Progress, Silent
from idap.rebalance.layers import (
    Case,
    Consumer,
    Correction,
    by_addition,
    by_call,
    by_original,
    changed_nodes,
    check_sizes,
    columns_of,
    consumers_of,
    with_fewer_rows,
)
from idap.rebalance.norms import Affine, affine_of, reestimate_norms_, running_mean
from idap.structure.analysis import Structure
from idap.structure.layout import slots
from idap.structure.plan import Plan
from idap.training.evaluate import keep_modes


@dataclass(frozen=True)
class Rebalance:
    """Settings of the correction after a cut, which takes no gradient step (docs/method.md#rebalancing).

    Args:
        least_squares: refit the weights of the layers whose inputs changed to the original's outputs.
        means: move the mean of each layer's error into its bias or the running mean of its norm.
        norms: re-estimate the statistics of batch norms.
        through_additions: a layer that is added to the residual stream also makes up for the error of the stream.
        rows: rows of a layer's inputs that are drawn from the calibration data, at least 256.
        held_out: share of the calibration samples that choose the ridge and decide whether a layer keeps its old
            weights; in (0, 1).
        memory: most bytes that targets may take at once.
        columns: most input columns (for a convolution, inputs times taps) of a layer that is refitted. A wider layer
            only has its bias corrected: second moments grow with the square of the columns, to 11 GB at 16,384.

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
    columns: int = 16384

    def __post_init__(self) -> None:
        check_kinds(self, prefix="rebalance.")
        if self.memory < 1:
            raise ConfigError(f"rebalance.memory must be at least 1, found {self.memory}.")
        if self.columns < 1:
            raise ConfigError(f"rebalance.columns must be at least 1, found {self.columns}.")
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
        model: the model that the plan made of the original; changed in place.
        original: the model whose outputs are the targets; not changed.
        structure: structure of the original.
        plan: the plan that leads from the original to the model.
        passes: the calibration batches. With a single batch of all samples, one pass corrects all layers; with several
            batches, each layer takes a pass.
        setting: settings of the correction; None: the default settings are used.
        progress: the listener that receives progress, layer by layer; None: no progress is reported.

    Returns:
        The corrections of the layers, in the order of the network.

    Raises:
        TaskError: there is no calibration batch.
        StructureError: the model does not run on this data as it was traced.
        InsufficientMemoryError: a layer takes more memory than is allowed; raised before any data are read.
    """
    setting = Rebalance() if setting is None else setting  # not `or`: settings that correct nothing are false
    progress = progress or Silent()
    if not passes:
        raise TaskError("there is no calibration batch to rebalance on.")
    found: list[Correction] = []
    structure = structure.after(plan.removed)
    if setting.refits:
        wiring = Wiring(structure, plan.removed)
        changed = changed_nodes(structure, wiring, plan.tensors)
        consumers = consumers_of(structure, wiring, changed, limit=max(256, setting.rows // len(passes)))
        fixed = frozen_parameters(model)
        consumers = [consumer for consumer in consumers if not fixed & {consumer.weight, consumer.bias}]
        with progress.phase("rebalance", len(consumers)) as phase:
            tensors = tensors_of(model)
            consumers = [with_fewer_rows(one, tensors[one.weight], setting.columns) for one in consumers]
            check_sizes(consumers, tensors, setting.columns)
            walk = _Walk(model, original, structure, plan, setting, found)
            for consumer in walk.over(consumers, passes):
                phase.advance(consumer.weight)
    if setting.norms:
        reestimate_norms_(model, passes)
    return found


def frozen_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that the user has frozen; none if all are, as in a model for inference."""
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return {name for name, learning in learns.items() if not learning} if any(learns.values()) else set()


class _StopEarlyError(Exception):
    """Ends a pass of which nothing more is needed."""


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
        self._tensors = tensors_of(model)
        self._found = found

    def over(self, consumers: Sequence[Consumer], passes: Sequence[Pass]) -> Iterator[Consumer]:
        """Correct all layers, and yield each after its correction."""
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

    def _case(self, consumer: Consumer) -> Case:
        written = self._structure.layout.dims[consumer.node][0][consumer.rows.contraction.output_dim]
        kept = slots(written, self._present) if len(written) else [True] * written.shape[1]
        through = self._setting.through_additions and consumer.addition is not None
        return Case(consumer, torch.nonzero(torch.as_tensor(kept)).ravel(), through)

    @torch.no_grad()
    def _targets(self, cases: Sequence[Case], passes: Sequence[Pass]) -> None:
        """Run the original and keep its outputs at the drawn positions as targets."""
        at, sums = by_original(cases), by_addition(cases)
        for number, each in enumerate(passes):

            def handle(key: CallKey, func: Any, args: Any, kwargs: Any, number: int = number, each: Pass = each) -> Any:
                case, added = at.get(key), sums.get(key)
                if case is not None and key == case.consumer.call:
                    case.choose(tensors_in(args, kwargs), each, number)
                result = func(*args, **kwargs)
                if case is not None and key != case.consumer.call:
                    case.choose_outputs(result, each, number)
                target = added or (case if case is not None and not case.through else None)
                if target is not None and len(target.chosen) > number:
                    rows = target.consumer.rows.outputs(result, target.chosen[number])
                    target.targets.append(rows[:, target.kept.to(rows.device)].clone())
                return result

            _run(self._original, each, handle)
        for case in cases:
            if len(case.targets) != len(passes):
                raise _unlike(case)

    @torch.no_grad()
    def _student(self, cases: Sequence[Case], passes: Sequence[Pass], *, at_once: bool) -> None:
        at, sums = by_call(cases), by_addition(cases)
        for number, each in enumerate(passes):
            waiting = {case.consumer.node: case for case in cases}

            def handle(
                key: CallKey, func: Any, args: Any, kwargs: Any, number: int = number, waiting: Any = waiting
            ) -> Any:
                case, added = at.get(key), sums.get(key)
                if added is not None:
                    self._at_addition(added, number, tensors_in(args, kwargs), at_once)
                result = func(*args, **kwargs)
                if case is not None:
                    x = tensors_in(args, kwargs)[case.consumer.input_at]
                    result = self._at_layer(case, number, result, lambda: func(*args, **kwargs), x, at_once)
                done = added or (None if case is None or case.through else case)
                if done is not None:
                    waiting.pop(done.consumer.node, None)
                    if not waiting:
                        raise _StopEarlyError
                return result

            _run(self._model, each, handle)
            for case in waiting.values():
                raise _unlike(case)
        if not at_once:
            for case in cases:
                self._correct(case)

    def _at_layer(
        self,
        case: Case,
        number: int,
        result: Tensor,
        again: Callable[[], Tensor],
        x: Tensor,
        at_once: bool,
    ) -> Tensor:
        weight = self._tensors[case.consumer.weight]
        case.read = case.consumer.rows.of(x, weight, case.chosen[number])
        if columns_of(case.consumer, weight) > self._setting.columns and case.layer is None:
            case.layer = self._layer(case, len(case.read))
        if case.through:
            case.output, case.again = result, again
            return result
        case.add(case.targets[number], self._setting.held_out)
        return again() if at_once and self._correct(case) else result

    def _at_addition(self, case: Case, number: int, given: Sequence[Tensor], at_once: bool) -> None:
        """Take what the original's sum lacks beside the current stream as the target of the branch."""
        if case.read.dim() != 3:
            raise _unlike(case)
        branch, skip = given[case.consumer.branch_at], given[1 - case.consumer.branch_at]
        if branch.shape != case.output.shape or skip.shape != branch.shape:
            raise StructureError(
                f"the branch that ends in the layer with weight {case.consumer.weight!r} has shape "
                f"{tuple(branch.shape)} where {tuple(case.output.shape)} was expected."
            )
        again, output = case.again, case.output
        case.again, case.output = torch.empty, torch.empty(0)
        before = self._affine(case.consumer)
        wanted = case.targets[number] - case.consumer.rows.outputs(skip, case.chosen[number])
        case.add(before.invert(wanted), self._setting.held_out)
        if not at_once or not self._correct(case):
            return
        dim = case.consumer.rows.contraction.output_dim
        after = self._affine(case.consumer)
        fresh = branch + after.apply(again(), dim) - before.apply(output, dim)
        branch.copy_(fresh)  # in place, since the call may add to the branch itself and return nothing that is used

    def _affine(self, consumer: Consumer) -> Affine:
        return affine_of(self._structure.graph, consumer.norm, self._tensors)

    def _layer(self, case: Case, parts: int) -> tuple[Tensor, Tensor]:
        """Current weight and bias of a layer, shapes (parts, outputs, columns) and (parts, outputs); float64."""
        consumer, parameter = case.consumer, self._tensors[case.consumer.weight]
        weight = consumer.rows.matrix(parameter.double(), parts)
        bias = self._tensors[consumer.bias].double() if consumer.bias else parameter.new_zeros(len(case.kept)).double()
        return weight, bias.reshape(weight.shape[:2])

    def _correct(self, case: Case) -> bool:
        """Refit a layer from its sums, and return whether it changed."""
        consumer, setting = case.consumer, self._setting
        learned, held_out = case.sums()
        parameter = self._tensors[consumer.weight]
        weight, bias = self._layer(case, learned.parts)
        shift = consumer.shifts and setting.means
        if isinstance(learned, Residuals):
            assert isinstance(held_out, Residuals)  # both sums of a layer are of one kind
            found = fit_shift(learned, held_out, weight, shift=shift)
        else:
            assert isinstance(held_out, Moments)
            ridges = RIDGES if setting.least_squares else ()
            found = fit(learned, held_out, weight, bias, ridges=ridges, shift=shift)
        too_wide, largest = isinstance(learned, Residuals), torch.finfo(parameter.dtype).max
        if found is None or max(float(found.weight.abs().max()), float(found.bias.abs().max())) > largest:
            before = held_out.error(weight, bias)
            self._found.append(Correction(consumer.weight, before, before, float("nan"), too_wide))
            return False
        self._write(consumer, parameter, found, bias)
        self._found.append(Correction(consumer.weight, found.before, found.after, found.ridge, too_wide))
        return True

    def _write(self, consumer: Consumer, parameter: Tensor, found: Fit, bias: Tensor) -> None:
        parameter.data.copy_(consumer.rows.weight(found.weight, parameter))
        change = (found.bias - bias).ravel()
        if consumer.bias:
            self._tensors[consumer.bias].data.add_(change)
        elif consumer.norm:
            self._tensors[running_mean(self._structure.graph, consumer.norm)].data.sub_(change)
        torch.clear_autocast_cache()  # it may contain a copy of the old weights


def _unlike(case: Case) -> StructureError:
    return StructureError(
        f"the layer with weight {case.consumer.weight!r} did not run as it was traced; trace the model on inputs like "
        "the calibration data."
    )


def _run(model: nn.Module, each: Pass, handle: Callable[..., Any]) -> None:
    with keep_modes(model), intercept(model, handle):
        try:
            each.run(model)
        except _StopEarlyError:
            return
