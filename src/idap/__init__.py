"""idap: make trained neural networks smaller and faster by removing what their information flow does not need."""

from idap.compress.config import Config, FilterStage, LayerStage
from idap.compress.result import Result
from idap.compress.run import compress
from idap.cost.count import Cost, CostModel, count_macs, count_parameters
from idap.cost.latency import Latency, measure_latency
from idap.divergence.measure import Divergence, measure
from idap.errors import IdapError
from idap.graph.trace import trace
from idap.saving.checkpoint import load, save
from idap.structure.analysis import Structure, analyze
from idap.structure.plan import Plan
from idap.surgery.apply import apply_plan, apply_plan_
from idap.surgery.verify import Proof, verify
from idap.training.evaluate import evaluate, output_error
from idap.training.fit import Recovery, fit
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
    "fit",
    "load",
    "measure",
    "measure_latency",
    "output_error",
    "save",
    "trace",
    "verify",
]
