"""How much of the saved multiply-adds becomes saved time, and does ranking by measured seconds save more of it?

Each network is cut to half of its multiply-adds twice: units ranked by score per multiply-add, and by score per
measured second with widths in multiples of 8. Score is the L2 norm: time does not depend on what the weights are, and
no weights of these networks are at hand. Original and cut networks take turns in one process. Efficiency is the share
of the multiply-adds that is left over the share of the latency that is left: 1 means that all of the saving became
time.

python benchmarks/latency.py [--networks resnet50 ...] [--batches 1 16]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, Rows
from idap import CostModel, analyze, apply_plan, measure, measure_latency, trace
from idap.compress.latencies import unit_latencies
from idap.divergence.observe import Pass
from idap.selection.reach import reach
from idap.selection.units import rank_units
from idap.structure.analysis import Structure

KEYS = ("network", "ranking", "batch", "device", "channels_last")
SHARE, FLOOR, MULTIPLE = 0.5, 0.1, 8
REPEATS = {1: 20, 16: 5}
IMAGE = (3, 224, 224)


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


def cut(model: nn.Module, structure: Structure, name: str, *, by_seconds: bool) -> tuple[nn.Module, float, float]:
    """The network at half of its multiply-adds, the share that is left, and the seconds that the choice took."""
    begun = time.perf_counter()
    args, kwargs = example(name, 2)
    once = [Pass(lambda network: network(*args, **kwargs), lambda _: torch.zeros(()))]
    found = measure(model, structure, once, criterion="magnitude").units
    scores = {group: values.tolist() for group, values in found.items()}
    whole = {group.name: tuple(range(group.size)) for group in structure.groups}
    costs = CostModel(structure, 2)
    prices = costs.unit_macs()
    if by_seconds:
        prices = unit_latencies(model, structure, example(name, 1), whole, (), repeats=5)
    floors = {group.name: max(1, round(FLOOR * group.size)) for group in structure.groups}
    ranking = rank_units(scores, whole, prices, floors=floors, power=1.0)
    total = costs.cost().macs
    choice = reach(
        ranking,
        lambda keep, _: costs.cost(keep).macs / total,
        SHARE,
        multiples=MULTIPLE if by_seconds else 1,
    )
    return apply_plan(model, structure.plan(choice.keep)).eval(), choice.cost, time.perf_counter() - begun


def row(models: dict[str, nn.Module], shares: dict[str, float], seconds: dict[str, float], name: str, batch: int,
        which: str) -> dict[str, object]:  # fmt: skip
    """Latency of one cut network in turn with the original."""
    args, kwargs = example(name, batch)
    with torch.inference_mode():
        pair = {"original": models["original"], "cut": models[which]}
        times = measure_latency(pair, args, kwargs, repeats=REPEATS.get(batch, 10), warmup=2)
    ratio = times["cut"].median / times["original"].median
    return {
        "macs": round(shares[which], 4),
        "latency": round(ratio, 4),
        "efficiency": round(shares[which] / ratio, 4),
        "original_ms": round(1000 * times["original"].median, 2),
        "cut_ms": round(1000 * times["cut"].median, 2),
        "cut_quartiles_ms": [round(1000 * each, 2) for each in times["cut"].spread],
        "choice_s": round(seconds[which], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=None)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = Rows(RESULTS / "latency.json", KEYS, {"question": "How much of the saved multiply-adds becomes saved time?"})
    for name, build in networks().items():
        if options.networks is not None and name not in options.networks:
            continue
        channels_last = not name.startswith("bert")
        keys = [
            {"network": name, "ranking": which, "batch": batch, "device": "cpu", "channels_last": channels_last}
            for batch in options.batches
            for which in ("macs", "seconds")
        ]
        if all(rows.find(**key) for key in keys):
            continue
        model = build().eval()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        structure = analyze(trace(model, *example(name, 2)))
        models, shares, seconds = {"original": model}, {}, {}
        for which in ("macs", "seconds"):
            small, shares[which], seconds[which] = cut(model, structure, name, by_seconds=which == "seconds")
            models[which] = small.to(memory_format=torch.channels_last) if channels_last else small
        for key in keys:
            rows.measure(key, partial(row, models, shares, seconds, name, key["batch"], key["ranking"]))


if __name__ == "__main__":
    main()
