"""How much of the saved multiply-adds becomes saved time, and does a latency table save more of it?

    python benchmarks/latency.py [--networks resnet50 ...] [--batches 1 16] [--threads 1]

Each network is cut to half of its multiply-adds twice. "macs": units ranked by score per multiply-add. "table": by
score per second of the latency table, which is measured at the batch size of the row, with widths at the steps that
are found in it. Score is the L2 norm: time does not depend on what the
weights are, and no weights of these networks are at hand.
Original and cut networks take turns in one process. Efficiency is the share of the multiply-adds that is left over the
share of the latency that is left: 1 means that all of the saving became time. Rows already in the results are not
measured again. It needs a core for itself.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import RESULTS, Rows
from idap import CostModel, analyze, apply_plan, measure, measure_latency, trace
from idap.cost.latency import LatencyTable
from idap.cost.layer_latency import measure_table
from idap.divergence.observe import Pass
from idap.selection.ranking import Ranking, rank_units
from idap.selection.reach import reach
from idap.selection.rounding import probes, step_of
from idap.structure.analysis import Structure

KEYS = ("network", "ranking", "batch", "device", "channels_last")
SHARE, FLOOR = 0.5, 0.1
REPEATS = {1: 20, 16: 7}
IMAGE = (3, 224, 224)
RANKINGS = ("macs", "table")


def networks() -> dict[str, Callable[[], nn.Module]]:
    """The networks, with random weights."""
    import timm  # noqa: PLC0415 - after torchvision was made importable
    import torchvision  # noqa: PLC0415 - as above
    from transformers import BertConfig, BertModel  # noqa: PLC0415 - as above

    vision = torchvision.models
    return {
        "resnet50": vision.resnet50,
        "mobilenet_v3_large": vision.mobilenet_v3_large,
        "efficientnet_b0": vision.efficientnet_b0,
        "convnext_tiny": vision.convnext_tiny,
        "vit_small_patch16_224": partial(timm.create_model, "vit_small_patch16_224"),
        "densenet121": vision.densenet121,
        "bert_base": lambda: BertModel(BertConfig(use_cache=False), add_pooling_layer=False),
    }


def example(name: str, batch: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Inputs of a batch: images, or texts of 128 tokens."""
    if name.startswith("bert"):
        tokens = torch.randint(0, 1000, (batch, 128))
        return (), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return (torch.randn(batch, *IMAGE),), {}


class Subject(NamedTuple):
    """A network that is to be cut, with what does not depend on the ranking."""

    name: str
    model: nn.Module
    structure: Structure
    costs: CostModel
    scores: dict[str, list[float]]

    @classmethod
    def of(cls, name: str, build: Callable[[], nn.Module]) -> "Subject":
        """Build a network, analyse it and score its units."""
        torch.manual_seed(0)
        model = build().eval()
        if has_images(name):
            model = model.to(memory_format=torch.channels_last)
        args, kwargs = example(name, 2)
        structure = analyze(trace(model, args, kwargs))
        once = [Pass(lambda network: network(*args, **kwargs), lambda _: torch.zeros(()))]
        found = measure(model, structure, once, criterion="magnitude").units
        return cls(name, model, structure, CostModel(structure, 2), {g: values.tolist() for g, values in found.items()})

    def table(self, batch: int, seconds: float) -> LatencyTable:
        """The latency table at a batch size."""
        return measure_table(self.model, self.structure, example(self.name, batch), probes, seconds=seconds)

    def ranking(self, table: LatencyTable | None) -> tuple[Ranking, dict[str, int]]:
        """Rank by score per multiply-add, or per second of a table; and what widths are multiples of."""
        sizes = {group.name: group.size for group in self.structure.groups}
        floors = {name: max(1, round(FLOOR * size)) for name, size in sizes.items()}
        prices = self.costs.unit_macs() if table is None else table.unit_seconds(sizes)
        steps = {} if table is None else {name: step_of(table.curve(name)) for name in table.groups}
        whole = {name: tuple(range(size)) for name, size in sizes.items()}
        return rank_units(self.scores, whole, prices, floors=floors, power=1.0), steps

    def cut(self, ranking: Ranking, steps: dict[str, int], share: float) -> tuple[nn.Module, float, float]:
        """Cut to a share of the multiply-adds.

        Returns:
            The network, the share that is left, and the share of all scores that is left.
        """
        total = self.costs.cost().macs
        left = partial(self._share, total)
        choice = reach(ranking, left, share, multiples=steps or 1, most=len(ranking))
        small = apply_plan(self.model, self.structure.plan(choice.keep)).eval()
        if has_images(self.name):
            small = small.to(memory_format=torch.channels_last)
        kept = sum(self.scores[name][unit] for name, units in choice.keep.items() for unit in units)
        return small, choice.cost, kept / sum(map(sum, self.scores.values()))

    def _share(self, total: int, keep: Any, _removed: Any) -> float:
        return self.costs.cost(keep).macs / total


def has_images(name: str) -> bool:
    return not name.startswith("bert")


def row(subject: Subject, batch: int, which: str, seconds: float) -> dict[str, Any]:
    """Cut as a ranking says, and time the result in turn with the original."""
    begun = time.perf_counter()
    table = subject.table(batch, seconds) if which == "table" else None
    ranking, steps = subject.ranking(table)
    small, share, _ = subject.cut(ranking, steps, SHARE)
    spent = time.perf_counter() - begun
    args, kwargs = example(subject.name, batch)
    pair = {"original": subject.model, "cut": small}
    with torch.inference_mode():
        times = measure_latency(pair, args, kwargs, repeats=REPEATS.get(batch, 10), warmup=2)
    ratio = times["cut"].median / times["original"].median
    return {
        "macs": round(share, 4),
        "latency": round(ratio, 4),
        "efficiency": round(share / ratio, 4),
        "original_ms": round(1000 * times["original"].median, 2),
        "cut_ms": round(1000 * times["cut"].median, 2),
        "original_quartiles_ms": [round(1000 * each, 2) for each in times["original"].spread],
        "cut_quartiles_ms": [round(1000 * each, 2) for each in times["cut"].spread],
        "steps": sorted(set(steps.values())) if steps else None,
        "choice_s": round(spent, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=None)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table-seconds", type=float, default=0.3, help="per layer and group, where passes are fast")
    parser.add_argument("--results", type=Path, default=RESULTS / "latency.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.results, KEYS, {"question": "How much of the saved multiply-adds becomes saved time?"})
    for name, build in networks().items():
        if options.networks is not None and name not in options.networks:
            continue
        keys = [
            {"network": name, "ranking": which, "batch": batch, "device": "cpu", "channels_last": has_images(name)}
            for batch in options.batches
            for which in RANKINGS
        ]
        if all(rows.find(**key) for key in keys):
            continue
        subject = Subject.of(name, build)
        for key in keys:
            rows.measure(key, partial(row, subject, key["batch"], key["ranking"], options.table_seconds))


if __name__ == "__main__":
    main()
