"""Rows are measured once and survive a stop; all rows learn from the same images, none of which decides."""

import json

import pytest
import torch

from benchmarks.harness import Rows, cifar_task, latencies, timed
from idap.zoo.nets import cifar_resnet20


class TestRows:
    def test_a_row_is_measured_once(self, tmp_path):
        calls = []

        def numbers():
            calls.append(1)
            return {"after": 90.0}

        path = tmp_path / "found.json"
        for _ in range(2):  # as if the script were started again
            rows = Rows(path, ("method", "seed"), {"question": "Which?"})
            rows.measure({"method": "a", "seed": 0}, numbers)
        assert calls == [1]
        assert rows.find(method="a") == {"method": "a", "seed": 0, "after": 90.0}
        assert rows.find(method="a", seed=1) is None
        document = json.loads(path.read_text())
        assert {"command", "versions", "machine", "question", "rows"} <= set(document)

    def test_what_is_known_stays_when_a_row_fails(self, tmp_path):
        path = tmp_path / "found.json"
        rows = Rows(path, ("method",), {})
        rows.measure({"method": "a"}, lambda: {"after": 1.0})

        def fail():
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError):
            rows.measure({"method": "b"}, fail)
        assert [row["method"] for row in Rows(path, ("method",), {}).rows] == ["a"]

    def test_a_row_needs_all_of_its_name(self, tmp_path):
        with pytest.raises(ValueError, match="method, seed"):
            Rows(tmp_path / "found.json", ("method", "seed"), {}).measure({"method": "a"}, dict)


def test_the_clock_sees_memory_that_is_free_again():
    with timed() as small:
        pass
    with timed() as large:
        torch.ones(2**26).sum()  # a quarter of a GiB
    with timed() as after:
        pass
    assert large.peak_gib - small.peak_gib == pytest.approx(0.25, abs=0.05)
    assert after.peak_gib < large.peak_gib - 0.1
    assert large.processor > 0


def test_latencies_compare_the_same_inputs():
    model = cifar_resnet20().eval()
    found = latencies(model, model, torch.zeros(1, 3, 32, 32))
    assert set(found) == {"1", "64"}
    assert found["64"]["processor_ratio"] == pytest.approx(1, rel=0.5)
    assert found["64"]["processor"]["original"] > found["1"]["processor"]["original"]


def test_images_that_decide_are_not_learnt(real_data):
    task, again, other = (
        cifar_task(real_data, train=300, val=100, calibration=64, batch=32, seed=seed) for seed in (0, 0, 1)
    )
    learnt, deciding = task.train.tensors[0], task.val.tensors[0]
    assert (len(learnt), len(deciding)) == (300, 100)
    assert torch.equal(deciding, again.val.tensors[0])
    assert not torch.equal(deciding, other.val.tensors[0])
    first = deciding[:, :, 16, 16]
    pixels = (learnt[:, :, 16, 16].float() / 255 - torch.tensor((0.485, 0.456, 0.406))) / torch.tensor(
        (0.229, 0.224, 0.225)
    )
    assert torch.allclose(pixels[:64], task.calibration.tensors[0][:, :, 16, 16], atol=1e-5)
    same = (pixels[:, None] - first[None]).abs().amax(2) < 1e-6
    for row, column in same.nonzero().tolist():  # a pixel in common is chance; an image is not
        scaled = (learnt[row].float() / 255 - 0.45) / 0.225
        assert (scaled - deciding[column]).abs().mean() > 0.05
