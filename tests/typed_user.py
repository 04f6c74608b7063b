"""What a user's script says to a type checker: `mypy --strict` reads it, nothing runs it.

Each `type: ignore` marks a mistake that must be found: if a public type became `Any`, it would be unused, which is an
error.
"""

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

import idap


def loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (outputs - batch[1]).square().mean()


batches = [(torch.zeros(2, 4), torch.zeros(2, 4))]
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
task = idap.Task(train=batches, val=batches, loss=loss, metric=loss, metric_name="error", higher_is_better=False)
assert_type(idap.classification(batches, num_classes=4), idap.Task)
idap.classification(batches, num_classes="four")  # type: ignore[arg-type]

config = idap.Config(
    max_drop=0.1,
    macs=0.5,
    filters=idap.FilterStage(schedule="even", steps=3, keep={"0": 0.5}),
    layers=idap.LayerStage(removals=1, replacement="auto"),
    recovery=idap.Recovery(epochs=0.5, optimizer="adamw"),
)
idap.Config(macs="half")  # type: ignore[arg-type]
idap.Config(order="sideways")  # type: ignore[arg-type]
idap.FilterStage(schedule="slow")  # type: ignore[arg-type]
idap.Recovery(epoch=1)  # type: ignore[call-arg]

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
report = idap.fit(model, task, config.recovery)
assert_type(report.seconds, float)
result = idap.compress(model, task, config, optimizer=optimizer, run_dir=Path("run"))
assert_type(result, idap.Result)
assert_type(result.model, nn.Module)
assert_type(result.macs, tuple[int, int])
assert_type(result.whole_plan, idap.Plan)
assert_type(result.save("small"), dict[str, int])
assert_type(idap.load("small", model), nn.Module)
assert_type(idap.evaluate(result.model, task, split="test"), float)
idap.evaluate(result.model, task, split="exam")  # type: ignore[arg-type]
assert_type(idap.output_error(result.model, model, task), float)
missing = result.modle  # type: ignore[attr-defined]

structure = idap.analyze(idap.trace(model, (torch.zeros(2, 4),)), contracts=["output"])
assert_type(structure, idap.Structure)
assert_type(structure.groups[0].name, str)
assert_type(structure.prunable, float)
divergence = idap.measure(model, structure, [], criterion="relative")
assert_type(divergence, idap.Divergence)
plan = structure.plan({structure.groups[0].name: range(4)}, removed=[])
assert_type(plan, idap.Plan)
small = idap.apply_plan(model, plan)
assert_type(small, nn.Module)
idap.apply_plan_(small, plan)
proof = idap.verify(structure, model, small, plan, ((torch.zeros(2, 4),), {}))
assert_type(proof, idap.Proof)
assert_type(proof.error, float)
assert_type(idap.slice_optimizer(optimizer, model, small, plan), torch.optim.Optimizer)
assert_type(idap.CostModel(structure, 2).cost(), idap.Cost)
assert_type(idap.count_macs(structure, batch=2), int)
assert_type(idap.count_parameters(structure), int)
assert_type(idap.measure_latency({"small": small}, (torch.zeros(2, 4),)), dict[str, idap.Latency])
assert_type(idap.save("small", small, plan), dict[str, int])
finalized, _ = idap.finalize(small, (torch.zeros(2, 4),))
assert_type(finalized, nn.Module)
exported = idap.export(small, (torch.zeros(2, 4),), "small.onnx")
saved = idap.save_pretrained(small, plan, "folder")
assert_type(saved.plain, bool)

try:
    idap.Config(max_drop=None)
except idap.IdapError as error:
    assert_type(error, idap.IdapError)
