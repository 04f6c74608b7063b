"""What do several cuts cost that one cut does not, without any training, inside blocks and with residual streams?

Each step measures, ranks, cuts and corrects anew. "original": each cut begins with the original's weights, as
`compress` does where nothing is trained in between. "piled up": each begins with what the last correction left.

python benchmarks/repeated.py --data DATA
"""

import argparse
from functools import partial

import torch

from benchmarks.harness import RESULTS, Rows
from benchmarks.subjects import Subject, add_data_argument, build
from idap import Config, FilterStage, LayerStage, Recovery, classification, compress

NETWORK, MACS, CALIBRATION, TEST = "resnet20", 0.5, 512, 20
KEYS = ("network", "criterion", "groups", "schedule", "weights", "seed")
SCHEDULES = {
    "one shot": {"schedule": "one-shot", "steps": 1},
    "3 even steps": {"schedule": "even", "steps": 3},
    "growing": {"schedule": "growing"},
}
HARDLY = Recovery(steps=1, lr=1e-12)
"""Training that changes nothing, but lets the next cut begin with what the last one left."""


def measured(
    subject: Subject, criterion: str, streams: str, schedule: str, weights: str, seed: int
) -> dict[str, object]:
    """One row."""
    calibration = subject.calibration(CALIBRATION, seed)
    test = subject.test[:TEST]
    task = classification(calibration, test[:1], num_classes=10, calibration=calibration)
    filters = FilterStage(**SCHEDULES[schedule], streams=streams)
    recovery = Recovery(epochs=0) if weights == "original" else HARDLY
    config = Config(
        max_drop=None,
        macs=MACS,
        criterion=criterion,
        filters=filters,
        layers=LayerStage(removals=0),
        recovery=recovery,
        final=Recovery(epochs=0),
        calibration_batches=len(calibration),
    )
    result = compress(subject.model, task, config)
    return {
        "accuracy": round(subject.quality(result.model, test), 2),
        "images": sum(len(labels) for _, labels in test),
        "macs_ratio": round(result.macs[0] / result.macs[1], 4),
        "steps": len(result.steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_argument(parser)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--criteria", nargs="*", default=["innovation", "relative"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = {"question": "What do several cuts cost that one cut does not, without any training?"}
    rows = Rows(RESULTS / "repeated.json", KEYS, about)
    subject = build(NETWORK, options.data)
    kept = {"inside blocks": "keep", "all": "cut"}
    ways = [
        (criterion, groups, schedule, weights)
        for criterion in options.criteria
        for schedule in SCHEDULES
        for groups in kept
        for weights in (("original", "piled up") if schedule != "one shot" else ("original",))
    ]
    for seed in range(options.seeds):
        for way in ways:
            criterion, groups, schedule, weights = way
            key = dict(zip(KEYS, (NETWORK, *way, seed), strict=True))
            rows.measure(key, partial(measured, subject, criterion, kept[groups], schedule, weights, seed))


if __name__ == "__main__":
    main()
