"""Rows are measured once and survive a stop; all rows learn from the same images, none of which decides or is
reported on."""

import json

import pytest
import torch

from benchmarks.harness import Rows, cifar_task, latencies, recover, reported, timed
from benchmarks.subjects import build
from idap import Recovery
from idap.models.nets import cifar_resnet20
from idap.training.evaluate import evaluate


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


@pytest.mark.slow
def test_latencies_compare_the_same_inputs():
    model = cifar_resnet20().eval()
    found = latencies(model, model, torch.zeros(1, 3, 32, 32))
    assert set(found) == {"1", "64"}
    assert found["64"]["processor_ratio"] == pytest.approx(1, rel=0.5)
    assert found["64"]["processor"]["original"] > found["1"]["processor"]["original"]


def test_images_that_decide_are_neither_learnt_nor_reported(real_data):
    subject = build("resnet20", real_data)
    task, again, other = (
        cifar_task(real_data, train=300, val=100, calibration=64, batch=32, seed=seed) for seed in (0, 0, 1)
    )
    deciding = task.val.tensors[0]
    assert (len(task.train.tensors[0]), len(deciding), len(task.calibration.tensors[0])) == (300, 100, 64)
    assert torch.equal(deciding, other.val.tensors[0])
    assert torch.equal(task.calibration.tensors[0], again.calibration.tensors[0])
    assert not torch.equal(task.calibration.tensors[0], other.calibration.tensors[0])
    told = torch.cat([images for images, _ in reported(subject, 100).test])
    assert len(told) == 9_900
    known = {image.numpy().tobytes() for image in told}
    assert not any(image.numpy().tobytes() in known for image in deciding)
    whole = {image.numpy().tobytes() for images, _ in subject.test for image in images}
    assert known < whole
    assert all(image.numpy().tobytes() in whole for image in deciding)


class TestRecover:
    def test_the_state_that_the_deciding_images_prefer_is_kept(self, real_data):
        task = cifar_task(real_data, train=64, val=64, calibration=32, batch=32, seed=0)
        model = cifar_resnet20().eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found = recover(model, build("resnet20", real_data).model, task, Recovery(epochs=1, lr=0.1))
        assert found.quality >= evaluate(model, task)
        assert found.quality == evaluate(found.model, task)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
