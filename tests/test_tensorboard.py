"""What TensorBoard finds in a log, and what happens without it."""

import math
import sys
from dataclasses import replace

import pytest

from idap.errors import ConfigError, RunFolderError
from idap.progress import Silent
from idap.tensorboard import TensorBoard
from tests.cli.statuses import status


class Recorder(Silent):
    def __init__(self):
        self.heard = []

    def advance(self, note=""):
        self.heard.append(note)

    def say(self, line):
        self.heard.append(line)

    def show(self, found):
        self.heard.append(found)


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"needs the package tensorboard.*pip install 'idap\[tensorboard\]'"):
        TensorBoard(tmp_path / "log")
    assert not (tmp_path / "log").exists()


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip("tensorboard", reason="tensorboard is not installed; pip install 'idap[tensorboard]'")

    @pytest.fixture
    def log(self, tmp_path):
        return tmp_path / "log"

    def read(self, log):
        from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

        found = EventAccumulator(str(log), size_guidance={HISTOGRAMS: 0})
        found.Reload()
        return found

    def scalars(self, log):
        found = self.read(log)
        return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}

    def test_decisions_costs_and_metric(self, log):
        with TensorBoard(log) as board:
            board.show(status(step=0, accepted=0, macs=1.0, metric=0.5))
            board.show(status(step=0, accepted=0, macs=1.0, metric=0.5))  # after the measurement
            board.show(status(step=1, accepted=1, macs=0.75, metric=0.25))
            board.show(status(step=2, accepted=1, macs=0.75, metric=0.25))
        found = self.scalars(log)
        assert found["cost/MACs"] == [(0, 1.0), (1, 0.75), (2, 0.75)]
        assert found["metric/accuracy"] == [(0, 0.5), (1, 0.25), (2, 0.25)]
        assert found["accepted/count"] == [(0, 0.0), (1, 1.0), (2, 1.0)]
        assert found["accepted/decision"] == [(0, 1.0), (1, 0.0)]
        assert set(found) == {
            *("cost/MACs", "cost/parameters", "metric/accuracy"),
            *("accepted/count", "accepted/decision"),
        }

    def test_the_loss_of_every_recovery(self, log):
        with TensorBoard(log) as board:
            for title in ("filters 0: recovery", "filters 1: recovery", "final recovery"):
                with board.phase("compress", None), board.phase(title, 2) as phase:
                    phase.advance("loss 0.5")
                    phase.advance("loss 0.25")
            with board.phase("check", 1) as phase:
                phase.advance("proof")
        assert self.scalars(log) == {
            "loss/recovery": [(0, 0.5), (1, 0.25), (2, 0.5), (3, 0.25)],
            "loss/final_recovery": [(0, 0.5), (1, 0.25)],
        }

    def test_the_divergence_over_depth_once_per_measurement(self, log):
        with TensorBoard(log) as board:
            board.show(status(step=0, profile=()))
            board.show(status(step=0, profile=(1.0, 0.5, 4.0)))
            board.show(status(step=1, profile=(1.0, 0.5, 4.0)))
            board.show(status(step=1, profile=(2.0, math.nan, -1.0, 8.0)))
        found = self.read(log).Histograms("divergence/over depth")
        assert [each.step for each in found] == [0, 1]
        assert found[0].histogram_value.bucket_limit == [1, 2, 3]
        assert found[0].histogram_value.bucket == [1.0, 0.5, 4.0]
        assert found[1].histogram_value.bucket == [2.0, 0.0, 0.0, 8.0]

    def test_lines_are_text_that_is_read_as_it_is(self, log):
        with TensorBoard(log) as board:
            board.say("filters 0: removed *50* channels")
            board.say("filters 1: removed 1 channel")
        found = self.read(log)
        texts = found.Tensors("decisions/text_summary")
        assert [each.step for each in texts] == [0, 1]
        assert texts[0].tensor_proto.string_val == [b"    filters 0: removed *50* channels"]

    def test_it_can_be_read_before_it_is_closed(self, log):
        with TensorBoard(log) as board:
            board.show(status(step=0))
            assert self.scalars(log)["cost/MACs"] == [(0, pytest.approx(0.8))]

    def test_everything_is_passed_on(self, log):
        recorder = Recorder()
        with TensorBoard(log, recorder) as board:
            with board.phase("recovery", 1) as phase:
                phase.advance("loss 0.5")
            board.say("a line")
            board.show(status())
        assert recorder.heard == ["loss 0.5", "a line", status()]

    def test_a_log_that_can_not_be_written_is_said_once_and_the_run_goes_on(self, tmp_path):
        (tmp_path / "file").touch()
        recorder = Recorder()
        with TensorBoard(tmp_path / "file" / "log", recorder) as board:
            board.say("a line")
            board.show(status())
            with board.phase("recovery", 1) as phase:
                phase.advance("loss 0.5")
        said, *rest = recorder.heard
        assert said.startswith(f"The log for TensorBoard in {tmp_path / 'file' / 'log'} is not written any further: ")
        assert rest == ["a line", status(), "loss 0.5"]

    def test_nothing_is_written_while_there_is_nothing_to_log(self, log):
        with TensorBoard(log):
            pass
        assert not log.exists()

    def test_two_logs_are_not_mixed(self, log):
        log.mkdir()
        TensorBoard(log)
        (log / "events").touch()
        with pytest.raises(RunFolderError, match="is not an empty folder"):
            TensorBoard(log)
        with pytest.raises(RunFolderError, match="is not an empty folder"):
            TensorBoard(log / "events")

    def test_a_run_without_a_budget_or_a_target(self, log):
        with TensorBoard(log) as board:
            board.show(replace(status(target=None), worst=None))
        assert self.scalars(log)["metric/accuracy"] == [(3, pytest.approx(0.908))]
