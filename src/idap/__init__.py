"""idap: make trained neural networks smaller and faster by removing what their information flow does not need."""

import importlib
import sys
import types
import typing

if typing.TYPE_CHECKING:
    from idap.compress.config import Config, FilterStage, LayerStage
    from idap.compress.result import Result
    from idap.compress.run import compress
    from idap.cost.count import Cost, CostModel, count_macs, count_parameters
    from idap.cost.latency import Latency, measure_latency
    from idap.deploy.export import export
    from idap.divergence.measure import Divergence, measure
    from idap.errors import IdapError
    from idap.graph.trace import trace
    from idap.hugging_face.folder import save_pretrained
    from idap.saving.checkpoint import load, save
    from idap.structure.analysis import Structure, analyze
    from idap.structure.plan import Plan
    from idap.surgery.apply import apply_plan, apply_plan_
    from idap.surgery.finalize import finalize
    from idap.surgery.optimizer import slice_optimizer
    from idap.surgery.verify import Proof, verify
    from idap.training.evaluate import evaluate, output_error
    from idap.training.fit import fit
    from idap.training.recovery import Recovery
    from idap.training.task import Task, classification

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Cost",
    "CostModel",
    "Divergence",
    "FilterStage",
    "IdapError",
    "Latency",
    "LayerStage",
    "Plan",
    "Proof",
    "Recovery",
    "Result",
    "Structure",
    "Task",
    "analyze",
    "apply_plan",
    "apply_plan_",
    "classification",
    "compress",
    "count_macs",
    "count_parameters",
    "evaluate",
    "export",
    "finalize",
    "fit",
    "load",
    "measure",
    "measure_latency",
    "output_error",
    "save",
    "save_pretrained",
    "slice_optimizer",
    "trace",
    "verify",
]

_HOMES = {
    "Config": "idap.compress.config",
    "FilterStage": "idap.compress.config",
    "LayerStage": "idap.compress.config",
    "Result": "idap.compress.result",
    "compress": "idap.compress.run",
    "Cost": "idap.cost.count",
    "CostModel": "idap.cost.count",
    "count_macs": "idap.cost.count",
    "count_parameters": "idap.cost.count",
    "Latency": "idap.cost.latency",
    "measure_latency": "idap.cost.latency",
    "Divergence": "idap.divergence.measure",
    "measure": "idap.divergence.measure",
    "IdapError": "idap.errors",
    "trace": "idap.graph.trace",
    "load": "idap.saving.checkpoint",
    "save": "idap.saving.checkpoint",
    "export": "idap.deploy.export",
    "Structure": "idap.structure.analysis",
    "analyze": "idap.structure.analysis",
    "Plan": "idap.structure.plan",
    "apply_plan": "idap.surgery.apply",
    "apply_plan_": "idap.surgery.apply",
    "finalize": "idap.surgery.finalize",
    "slice_optimizer": "idap.surgery.optimizer",
    "Proof": "idap.surgery.verify",
    "verify": "idap.surgery.verify",
    "evaluate": "idap.training.evaluate",
    "output_error": "idap.training.evaluate",
    "Recovery": "idap.training.recovery",
    "fit": "idap.training.fit",
    "Task": "idap.training.task",
    "classification": "idap.training.task",
    "save_pretrained": "idap.hugging_face.folder",
}


class _Package(types.ModuleType):
    """Imports a public name when it is first used, so that `idap --help` need not wait for torch."""

    def __getattr__(self, name: str) -> typing.Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'idap' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: typing.Any) -> None:
        # Otherwise the import system would replace the function `compress` by the package of that name.
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
