"""The divergence of a model as it is, without changing anything."""

from functools import partial

from torch import nn

from idap.compress.budget import Budget
from idap.compress.config import Config
from idap.compress.layer_times import LayerTimes, measured
from idap.compress.run import looked_at
from idap.compress.samples import calibration_batches
from idap.compress.state import Setting
from idap.cost.count import CostModel
from idap.divergence.measure import Divergence
from idap.progress import Progress, Silent
from idap.structure.analysis import Structure
from idap.training.task import Task


def profile(
    model: nn.Module, task: Task, config: Config | None = None, *, progress: Progress | None = None
) -> tuple[Structure, Divergence]:
    """Measure the divergence of every unit, branch and block of a model.

    Args:
        model: the trained model; it is left exactly as it is.
        task: its data; the calibration split is measured on.
        config: of its settings the criterion, the calibration batches, contracts, swap, `layers.replacement` and seed
            count.
        progress: hears of the phases.

    Returns:
        What may be removed, and the divergence of each part (in the relative form for branches and blocks if the
        criterion knows none; of a block that may become a projection what the best one leaves over).

    Raises:
        TaskError, TraceError, StructureError: the model and its data don't fit together.
    """
    config, progress = config or Config(), progress or Silent()
    with progress.phase("divergence", 3) as phase:
        structure, example = looked_at(model, task, config, phase)
        costs = CostModel(structure, 1)
        setting = Setting(
            original=model,
            task=task,
            config=config,
            structure=structure,
            costs=costs,
            example=example,
            whole=costs.cost(),
            budget=Budget(None, task.higher_is_better),
            progress=progress,
            folder=None,
            calibration=calibration_batches(task, config),
            timed=example,
            layer_times=LayerTimes(partial(measured, model, structure, example, progress)),
        )
        found = setting.divergence(setting.untouched())
        phase.advance("divergence")
    return structure, found
