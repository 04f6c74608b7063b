"""The demonstration, cut short: it trains, compresses, compares, saves and reloads both networks."""

import dataclasses

import pytest
from rich.console import Console

from idap.cli import demo
from idap.errors import CheckpointError
from idap.progress import Silent
from idap.record import read_steps

SHORT = {"epochs": 0.2}


@pytest.fixture
def short_training(monkeypatch):
    """Hardly any training, so that only the sequence of steps can be checked."""
    real = demo.networks

    def short(**chosen):
        return tuple(
            dataclasses.replace(
                network,
                training=dataclasses.replace(network.training, **SHORT),
                recovery=dataclasses.replace(network.recovery, **SHORT),
            )
            for network in real(**chosen)
        )

    monkeypatch.setattr(demo, "networks", short)
    monkeypatch.setattr(demo, "MAX_DROP", 0.9)


@pytest.mark.slow
def test_the_whole_story(short_training, tmp_path):
    console = Console(record=True, width=100)
    results = demo.run_demo(console, Silent(), seed=1, out=tmp_path / "runs")
    assert [each.reached for each in results] == [True, True]
    about = results[0].to_json()
    assert about["network"] == "a residual CNN" and about["macs"]["after"] <= 0.5 * about["macs"]["before"]
    text = " ".join(console.export_text().split())
    assert "1078 for training, 359 for validation, 360 for one test" in text
    assert text.count("loaded into a freshly built original: the outputs are the same") == 2
    for row in ("parameters", "MACs per sample", "latency, batch of 64", "accuracy (validation)", "accuracy (test)"):
        assert text.count(row) == 2
    for name in ("resnet", "vit"):
        stages = {step["stage"] for step in read_steps(tmp_path / "runs" / name)}
        assert "filters" in stages


@pytest.mark.slow
def test_a_model_that_loads_differently_is_an_error(short_training, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MACS", 0.95)  # hardly any cutting either
    monkeypatch.setattr(demo, "load", lambda folder, model: demo.DigitsResNet())
    with pytest.raises(CheckpointError, match="differs from the saved one"):
        demo.run_demo(Console(quiet=True), Silent(), out=tmp_path / "runs")
