"""How large the systems of layers are: which are refitted, which only shifted, and whether memory suffices for it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from idap.memory import Room
from idap.rebalance.consumers import Consumer
from idap.rebalance.moments import fit_need
from idap.rebalance.residuals import shift_need

DRAWN = 2**26
"""Numbers that are drawn from a batch of what a layer reads that is too wide to be refitted."""
FEWEST_ROWS = 256
"""Rows that are drawn of it in any case."""


def columns_of(consumer: Consumer, weight: Tensor) -> int:
    """Columns that each part of a layer reads."""
    return weight.numel() // max(1, weight.shape[consumer.rows.contraction.write_dim])


def with_fewer_rows(consumer: Consumer, weight: Tensor, widest: int) -> Consumer:
    """A layer that is too wide to be refitted, with fewer rows drawn: a mean needs no more, and each row is large."""
    columns = columns_of(consumer, weight) * consumer.rows.contraction.groups
    if columns_of(consumer, weight) <= widest:
        return consumer
    limit = min(consumer.rows.limit, max(FEWEST_ROWS, DRAWN // columns))
    return replace(consumer, rows=replace(consumer.rows, limit=limit))


def check_sizes(consumers: Sequence[Consumer], tensors: Mapping[str, Tensor], widest: int) -> None:
    """Refuse layers whose correction takes more memory than may be taken, before any data go by.

    Args:
        consumers: the layers, which are corrected one by one.
        tensors: of the model, by canonical name.
        widest: most columns of a layer that is refitted.

    Raises:
        InsufficientMemoryError: names the first such layer.
    """
    if not consumers:
        return
    room = Room.now(tensors[consumers[0].weight].device)
    for consumer in consumers:
        weight, contraction = tensors[consumer.weight], consumer.rows.contraction
        columns = columns_of(consumer, weight)
        estimate = fit_need if columns <= widest else shift_need
        need = estimate(contraction.groups, columns, weight.shape[contraction.write_dim], consumer.rows.limit)
        room.check(
            need,
            what=f"refitting the layer with weight {consumer.weight!r}, which reads {columns:,} columns,",
            way_out=f"Set rebalance.columns below {columns}, so that only its bias is corrected, or rebalance to None.",
        )
