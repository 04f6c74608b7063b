"""Groups that are too wide to be measured whole and layers that are too wide to be refitted: a run says both once."""

import json

from idap.compress.config import LayerStage
from idap.compress.run import compress
from idap.divergence.innovation import innovation as whole
from idap.rebalance.run import Rebalance
from idap.record import AFTER, BEFORE
from idap.report.reading import read_run
from tests.compress.tiny import Noting, config, task, train_net


def innovation(scene):
    return whole(scene, widest=14)


def test_what_is_measured_in_pieces_and_corrected_by_its_bias_is_said_once_and_recorded(tmp_path):
    progress = Noting()
    settings = config(
        criterion=innovation, rebalance=Rebalance(columns=14, rows=256), layers=LayerStage(removals=0), macs=0.6
    )
    result = compress(train_net(), task(), settings, run_dir=tmp_path / "run", progress=progress)
    assert len(result.steps) > 1
    note = (
        "The 20 units of group 'blocks.0.fc1' (20 columns) are measured in 2 pieces, so that none of them counts as "
        "replaced by a unit of another piece."
    )
    assert progress.lines.count(note) == 1
    told = [line for line in progress.lines if "only its bias is corrected" in line]
    assert "blocks.0.fc2.weight reads more than 14 columns, so only its bias is corrected." in told
    assert len(told) == len(set(told))
    before = json.loads((tmp_path / "run" / BEFORE).read_text())
    assert note in before["notes"]
    assert "'stem'" not in " ".join(before["notes"])  # 12 columns
    assert (tmp_path / "run" / AFTER).exists()
    assert note in read_run(tmp_path / "run").before.notes
