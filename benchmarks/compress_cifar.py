"""How much accuracy is left of CIFAR-10 ResNets at equal cost and after an equal recovery, by method?

    python benchmarks/compress_cifar.py --data DATA                    # hours on one core
    python benchmarks/compress_cifar.py --data DATA --protocol gpu     # 40 epochs of all images, on a GPU

Every row is one network, one share of the multiply-adds, one method, one seed: cut without training, judge, recover,
judge again. The recovery is the same for all rows: images, augmentation, optimiser, schedule, distillation from the
original, the learning rates and the average of weights that are tried. The public weights know all training images by
heart, so 2,000 test images decide, of the learning rates and of the states before training and after each epoch; the
other 8,000 are reported on. Rows already in the results are not measured again.

Methods:
    idap: ...               `idap.compress`: "defaults", where blocks go only if filters would lose more; "filters,
                            layers", where they go unasked; one stage; the other order; "one cut" instead of growing
                            steps; "bare": with the original's weights, where others are corrected; "inside blocks":
                            stage 1 on the channels that Torch-Pruning can cut; "per MAC": ranked by score per
                            multiply-add, where the default ranks by score alone
    torch-pruning ...       its criteria (fpgm is the best of them here, see docs/results.md) on the channels inside of
                            residual blocks, ranked globally, cut to the same cost; as it comes, and rebalanced by us
    random, uniform L2      likewise; uniform takes the same share of each layer
    original, trained       nothing cut: what the recovery alone makes of the network, at its last state
    small: ...              a network of the same cost that learns from random weights: of the shape that idap found, or
                            uniformly narrow; learning rates for random weights are tried too
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench import Bench, Cut, Method, Protocol, cifar_bench, ours
from benchmarks.harness import RESULTS, Rows
from benchmarks.subjects import add_data_argument
from idap import Recovery
from idap.compress.config import FilterStage, LayerStage
from idap.divergence.observe import Pass
from idap.rebalance.run import Rebalance, rebalance_
from idap.selection.ranking import rank_uniform, rank_units
from idap.selection.reach import reach
from idap.surgery.apply import apply_plan
from idap.training.batch import merge_batches, move

SHARES = {"1/2.1": 1 / 2.1, "1/3": 1 / 3}
FLOOR = 1 / 16
"""Share of each group that Torch-Pruning's rows always leave."""
RANDOM_RATES = (0.05, 0.1)
"""Tried besides the others for networks that begin with random weights."""
KEYS = ("network", "target", "method", "seed", "protocol")


CPU_RECOVERY = Recovery(epochs=2, distil=0.9, temperature=8.0)
"""What benchmarks/temperature.py says: above 4 the temperature hardly matters."""
PROTOCOLS = {
    "cpu": Protocol(device="cpu", train=10_000, recovery=CPU_RECOVERY, rates=(0.01,)),
    "gpu": Protocol(device="cuda", train=None, recovery=replace(CPU_RECOVERY, epochs=40), rates=(0.003, 0.01)),
}
"""Earlier rows, "cpu, no average", tried 0.003 as well as 0.01; wherever training helped by more than 0.05 points, the
deciding images chose 0.01. They kept the best trained state or the untrained one, and computed in bf16."""


def peer(criterion: str, *, ranking: str = "global", rebalanced: bool = False) -> Method:
    """A method that ranks by a criterion of Torch-Pruning, and cuts once."""

    def cut(bench: Bench, share: float, _: Rows) -> Cut:
        from benchmarks import peers  # noqa: PLC0415 - needs torch-pruning

        structure = bench.analysed()  # as every method must, ours too
        batches = list(bench.task.batches("calibration"))
        found = peers.importance(criterion, bench.subject, structure, batches, seed=bench.seed)
        scores = {name: values.tolist() for name, values in found.items()}
        plan = structure.plan(to_cost(bench, scores, share, uniform=ranking == "uniform"))
        model = apply_plan(bench.model, plan)
        if rebalanced:
            images, labels = move(merge_batches(batches), bench.protocol.device)
            everything = Pass(
                lambda judged: judged(images), lambda outputs: bench.subject.loss(outputs, (None, labels))
            )
            rebalance_(model, bench.model, structure, plan, [everything], Rebalance())
        return Cut(model, plan, bench.costs.cost(plan.keep))

    return cut


def to_cost(bench: Bench, scores: dict[str, list[float]], share: float, *, uniform: bool) -> dict[str, tuple[int, ...]]:
    """The units that stay when the ranking is cut to a share of the multiply-adds."""
    whole = {group.name: tuple(range(group.size)) for group in bench.structure.groups}
    floors = {group.name: max(1, int(group.size * FLOOR)) for group in bench.structure.groups}
    if uniform:
        ranking = rank_uniform(scores, whole, floors=floors)
    else:
        ranking = rank_units(scores, whole, bench.costs.unit_macs(), floors=floors)
    target = share * bench.costs.cost().macs
    return reach(ranking, lambda keep, _: bench.costs.cost(keep).macs, target).keep


def small(shape: str | None) -> Method:
    """A method that takes random weights in the shape that another method's row found; None: uniformly narrow."""

    def cut(bench: Bench, share: float, rows: Rows) -> Cut:
        groups = bench.structure.groups
        if shape is None:
            plan = bench.structure.plan(to_cost(bench, {g.name: [0.0] * g.size for g in groups}, share, uniform=True))
        else:
            target = next(name for name, value in SHARES.items() if value == share)
            found = rows.find(network=bench.subject.name, target=target, method=shape, seed=bench.seed)
            if found is None:
                raise LookupError(f"the shape of {shape!r} for {bench.subject.name} at {target} isn't measured yet.")
            left = {g.name: found["left"].get(g.name, g.size) for g in groups}
            plan = bench.structure.plan({name: range(count) for name, count in left.items()}, found["removed"])
        model = apply_plan(bench.model, plan)
        forget(model, bench.seed)
        return Cut(model, plan, bench.costs.cost(plan.keep, plan.removed), RANDOM_RATES)

    return cut


@torch.no_grad()
def forget(model: nn.Module, seed: int) -> None:
    """Draw all weights anew: convolutions as He et al. do, the rest as torch does."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for part in model.modules():
            if isinstance(part, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                part.reset_parameters()
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)


BOTH = "idap: filters, layers"
ALL_BLOCKS = LayerStage(removals=1000)
METHODS: dict[str, Method] = {
    "idap: defaults": ours(),
    BOTH: ours(layers=LayerStage(against="nothing")),
    "idap: filters": ours(layers=LayerStage(removals=0)),
    "idap: filters, one cut": ours(filters=FilterStage(schedule="one-shot"), layers=LayerStage(removals=0)),
    "idap: filters, one cut, bare": ours(
        filters=FilterStage(schedule="one-shot"), layers=LayerStage(removals=0), bare=True
    ),
    "idap: filters inside blocks": ours(layers=LayerStage(removals=0), inside=True),
    "idap: filters per MAC": ours(layers=LayerStage(removals=0), cost_power=1.0),
    "idap: layers": ours(filters=FilterStage(steps=0), layers=ALL_BLOCKS),
    "idap: layers, filters": ours(filters_share=0.0),
    "torch-pruning fpgm": peer("fpgm"),
    "torch-pruning fpgm, rebalanced": peer("fpgm", rebalanced=True),
    "torch-pruning magnitude_l2": peer("magnitude_l2"),
    "torch-pruning bn_scale": peer("bn_scale"),
    "torch-pruning taylor": peer("taylor"),
    "torch-pruning magnitude_l2, rebalanced": peer("magnitude_l2", rebalanced=True),
    "torch-pruning bn_scale, rebalanced": peer("bn_scale", rebalanced=True),
    "torch-pruning taylor, rebalanced": peer("taylor", rebalanced=True),
    "small: idap's shape": small(BOTH),
    "small: narrow": small(None),
    "random": peer("random"),
    "random, rebalanced": peer("random", rebalanced=True),
    "uniform L2": peer("magnitude_l2", ranking="uniform"),
    "uniform L2, rebalanced": peer("magnitude_l2", ranking="uniform", rebalanced=True),
}
FIRST = 17
"""So many methods are measured at both costs before the others."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="cpu")
    parser.add_argument("--networks", nargs="*", choices=["resnet56", "resnet20"], default=["resnet56", "resnet20"])
    parser.add_argument("--targets", nargs="*", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    protocol = PROTOCOLS[options.protocol]
    name = "compress_cifar.json" if options.protocol == "cpu" else f"compress_cifar_{options.protocol}.json"
    about = {
        "question": "How much accuracy is left of CIFAR-10 ResNets at equal cost and after an equal recovery?",
        "protocol": asdict(protocol),
        "memory": "peak_gib is the most resident memory of the whole process (VmHWM, set back before each part)",
    }
    rows = Rows(options.results or RESULTS / name, KEYS, about)
    for network in options.networks:
        bench = cifar_bench(network, options.data, protocol, options.seed)
        key = {"network": network, "seed": options.seed, "protocol": options.protocol}
        rows.measure({**key, "target": "original", "method": "original"}, bench.original)
        rows.measure({**key, "target": "original", "method": "original, trained"}, bench.trained)
        names = [method for method in METHODS if method in options.methods]
        for some in (names[:FIRST], names[FIRST:]):
            for target in options.targets:
                for method in some:
                    one = {**key, "target": target, "method": method}
                    rows.measure(one, lambda t=target, m=method, b=bench: b.row(SHARES[t], METHODS[m], rows))


if __name__ == "__main__":
    main()
