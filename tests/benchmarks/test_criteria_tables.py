"""Tables about criteria: seeds share a cell, what was not measured stays empty."""

from benchmarks.criteria import HALF, SQUARES, THIRD, Row
from benchmarks.criteria_tables import criteria, exchange, overhead, truth


def row(criterion="innovation", quality=80.0, **changed):
    base = {"subject": "resnet20", "task": THIRD, "ranking": "global", "power": 0.0, "corrected": SQUARES, "cuts": 1}
    return {**base, "samples": 512, "seed": 0, "criterion": criterion, "quality": quality} | changed


def test_rows_of_the_script_have_all_names_that_the_tables_ask_for():
    assert set(row()) - {"quality"} <= set(Row.__dataclass_fields__)


def test_a_table_without_rows_has_no_title():
    found = "\n".join(criteria([row(), row(ranking="uniform")]))
    assert "ResNet-20, every criterion" in found
    for other in ("ResNet-56", "Torch-Pruning", "corrections", "stream", "one cut or three", "ViT", "Llama"):
        assert other not in found


def test_powers_and_the_uniform_ranking_have_columns_of_their_own():
    rows = [row(), row(power=1.0, quality=70.0), row(ranking="uniform", quality=60.0), row(task=HALF, quality=90.0)]
    assert "| `innovation` | 90.00 |  |  |  | 80.00 |  | 70.00 | 60.00 |" in criteria(rows)


def test_seeds_are_averaged_by_calibration_images():
    rows = [row(seed=seed, quality=80.0 + seed) for seed in range(3)] + [row("relative", seed=1, samples=256)]
    found = criteria(rows)
    assert "| `innovation` | 0 |  |  |  |  | 81.00 ± 1.00 |  |" in found
    assert "| `relative` | 0 |  |  |  | 80.00 |  |  |" in found


def test_corrections_stand_beside_each_other():
    found = criteria([row(), row(corrected="none", quality=10.0), row(corrected="norms", quality=60.0)])
    assert "| criterion | MACs | none | norms | least squares |" in found
    assert "| `innovation`, p = 0 | 1/3 | 10.00 | 60.00 | 80.00 |" in found


def test_one_and_three_cuts_are_compared_over_the_same_seeds():
    found = criteria([row(), row(seed=1, quality=0.0), row(cuts=3, quality=79.0)])
    assert "| `innovation` | 1 | 80.00 | 79.00 |" in found


def test_peers_stand_beside_the_default():
    found = criteria([row(), row("torch-pruning fpgm", 75.0, ranking="uniform"), row("paper")])
    assert "| `innovation` (idap) | global |  | 80.00 |" in found
    assert "| torch-pruning fpgm | uniform |  | 75.00 |" in found
    assert "| `torch-pruning fpgm` |" not in "\n".join(found)


def test_truth_gives_the_range_over_seeds_and_sizes():
    rows = [
        {"criterion": "paper", "samples": samples, "seed": 0, "units plain": value, "units compensated": value}
        | {"blocks plain": None, "blocks compensated": None}
        for samples, value in ((256, 0.5), (512, 0.75))
    ]
    found = truth({"net": {"correlations": rows}})
    assert "| `paper` | 0.62 (0.50 to 0.75) | 0.62 (0.50 to 0.75) | – | – |" in found
    assert "| `paper` | 0.50 (0.50 to 0.50) | 0.75 (0.75 to 0.75) |" in found


def test_overhead_says_what_the_passes_took():
    numbers = {"plain_s": 3.7, "images": 32, "forward_ratio": 1.2, "peak_ratio": 1.0, "innovation_to_plain_512": 1.1}
    found = overhead([{"model": "net", **numbers, "peak_gib": {"innovation": 2.0}}])
    assert found[-1] == "| net | 3.70 s for 32 images | 1.20x | 1.00x | 1.10x | 2.00 GiB |"


def test_ways_to_divide_a_cut_are_averaged_over_seeds():
    base = {"subject": "resnet20", "task": THIRD, "divided by": "x", "power": 0.5}
    rows = [{**base, "seed": seed, "quality": 80.0 + 2 * seed, "more_s": 100} for seed in (0, 1)]
    assert exchange(rows)[-1] == "| ResNet-20 | x | 0.5 | 2 |  | 81.00 ± 1.41 | 100 ± 0 |"
