"""Random generators that a loader has of its own: torch's random state does not reach them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from idap.training.batch import Batch


@contextmanager
def drawn_by(loader: Iterable[Batch], seed: int) -> Iterator[None]:
    """Let all that a loader draws begin at a seed, and put torch's random state and the loader's own back afterwards.

    Args:
        loader: any batches.
        seed: of what is drawn within the context.
    """
    cuda = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=cuda), generators_seeded(loader, seed):
        torch.manual_seed(seed)
        yield


@contextmanager
def generators_seeded(loader: Iterable[Batch], seed: int) -> Iterator[None]:
    """Let the generators of a loader and its samplers begin at a seed, and give each its own state back.

    Without it, a run that is stopped and goes on would read other batches than one that is not.

    Args:
        loader: any batches; those without a generator are left alone.
        seed: of what is drawn within the context.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    own = {id(each): each for each in found if isinstance(each, torch.Generator)}
    states = [(each, each.get_state()) for each in own.values()]
    for each in own.values():
        each.manual_seed(seed)
    try:
        yield
    finally:
        for each, state in states:
            each.set_state(state)
