"""Write the model card of a saved model as Markdown: what was done to it, and how to load it.

The front matter is that of a Hugging Face model card.
"""

import ast
import importlib.util
import inspect
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import safetensors
import torch
from torch import nn

from idap.errors import CheckpointError
from idap.steps import Step
from idap.structure.plan import Plan

CARD = "card.md"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts on a card about a compression; each pair is (before, after).

    Attributes:
        steps: all steps in order, accepted or not.
        metric_name: name of the metric.
        metric: the metric on the validation data.
        macs: multiply-adds for one sample.
        parameters: number of parameters.
        size: bytes of all tensors in the saved file.
        latency: latency of the compressed model as a share of the original's; None if it was not measured.
        output_error: E‖N0(x) − N*(x)‖² / E‖N0(x)‖² on the validation data (docs/method.md#promise).
        message: one sentence on what was reached.
        again: whether the model that was given had been compressed before.
    """

    steps: Sequence[Step]
    metric_name: str
    metric: tuple[float, float]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    size: tuple[int, int]
    latency: float | None
    output_error: float
    message: str
    again: bool = False


def model_card(
    folder: str, model: nn.Module, plan: Plan, facts: Facts, *, subnormal: Mapping[str, int], build: str | None = None
) -> str:
    """Make the text of a card.

    Args:
        folder: the folder with the model, as it is written in the example that loads it.
        model: the compressed model.
        plan: the plan from the original to it.
        facts: the facts about the compression.
        subnormal: tensor -> number of subnormal numbers that were written as zeros.
        build: the call that builds the original, with its module, such as ``torchvision.models.resnet50()``; None: the
            example calls the class of the model if it can be built without arguments, and has a placeholder otherwise.

    Returns:
        The card as Markdown.

    Raises:
        CheckpointError: `build` is not such a call.
    """
    parts = [
        _front_matter(facts),
        f"# {type(model).__name__}, compressed\n",
        f"A smaller `{type(model).__module__}.{type(model).__qualname__}`, made by structured pruning with idap. "
        f"{facts.message[:1].upper()}{facts.message[1:]}.\n",
        _costs(facts),
        _history(plan, facts),
        _load_example(folder, model, plan, build),
        _notes(subnormal),
    ]
    return "\n".join(parts)


def _front_matter(facts: Facts) -> str:
    lines = ["---", "library_name: idap", "tags:", "- pruning", "- structured-pruning"]
    return "\n".join([*lines, "metrics:", f"- {json.dumps(facts.metric_name)}", "---", ""])


def _costs(facts: Facts) -> str:
    name = facts.metric_name.replace("|", "\\|")
    return "\n".join(
        [
            "| | before | after |",
            "|---|---:|---:|",
            f"| multiply-adds per sample | {facts.macs[0]:,} | {facts.macs[1]:,} |",
            f"| parameters | {facts.parameters[0]:,} | {facts.parameters[1]:,} |",
            f"| bytes of the weights | {facts.size[0]:,} | {facts.size[1]:,} |",
            *(
                []
                if facts.latency is None
                else [f"| latency, where it was compressed | 100 % | {100 * facts.latency:.1f} % |"]
            ),
            f"| {name} (validation) | {facts.metric[0]:.6g} | {facts.metric[1]:.6g} |",
            f"| relative squared error of the outputs (validation) | 0 | {facts.output_error:.3g} |",
            "",
        ]
    )


def _history(plan: Plan, facts: Facts) -> str:
    lines = ["## What was done\n"]
    if facts.again:
        lines.append(
            "The model that was given had been compressed before. `before` and the steps are those of the last "
            "compression; `plan.json` describes all of them together.\n"
        )
    if facts.steps:
        lines += ["| step | stage | removed | multiply-adds | parameters | metric | kept |", "|---" * 7 + "|"]
    for step in facts.steps:
        kept = "yes" if step.accepted else "no, filters were better" if step.is_beaten else "no, rolled back"
        lines.append(
            f"| {step.index} | {step.stage} | {_removals(step)} | {step.macs:,} | {step.parameters:,} | "
            f"{step.metric:.6g} | {kept} |"
        )
    if plan.removed:
        lines.append(f"\nRemoved branches and blocks: {', '.join(f'`{name}`' for name in plan.removed)}.")
    if plan.programs:
        lines.append(f"\nModules with rewritten code: {', '.join(f'`{path}`' for path in plan.programs)}.")
    return "\n".join([*lines, ""])


def _removals(step: Step) -> str:
    counts: Counter[str] = Counter()
    for removal in step.removed:
        counts[removal.kind] += len(removal.units) or 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing"


def _load_example(folder: str, model: nn.Module, plan: Plan, build: str | None) -> str:
    where = f"{type(model).__module__}.{type(model).__qualname__}"
    if build is None and _buildable(type(model), plan):
        build = f"{where}()"
    lines = ["import idap"]
    if build is None:
        line = f"original = build_original()  # the code that built this {where} before it was compressed"
    else:
        lines.append(f"import {module_of(build)}")
        line = f"original = {build}"
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if kind is not torch.float32:
        lines.append("import torch")
    lines = [*sorted(lines), "", line]
    if kind is not torch.float32:
        lines.append(f"original = original.to({kind})")
    lines.append(f"model = idap.load({folder!r}, original).eval()")
    text = "\n".join(lines)
    return (
        f"## How to load it\n\n```python\n{text}\n```\n\nLoading traces nothing, needs no data, and reads no pickle.\n"
    )


def _buildable(kind: type, plan: Plan) -> bool:
    """Whether a class can be imported and, called without arguments on the meta device, has the original's tensors."""
    if kind.__module__ == "__main__" or "<" in kind.__qualname__:
        return False
    try:
        inspect.signature(kind).bind()
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            built = kind()
    except Exception:  # it needs arguments, or its code fails on the meta device in any way
        return False
    shapes = {name: tuple(tensor.shape) for name, tensor in (*built.named_parameters(), *built.named_buffers())}
    return all(shapes.get(name) == shape for name, shape in plan.shapes.items() if name not in plan.unsaved)


def module_of(build: str) -> str:
    """Find the module from which a call takes its function.

    Raises:
        CheckpointError: the text is not a call of a function with its module.

    >>> module_of("torch.nn.Linear(3, 4)")
    'torch.nn'
    """
    try:
        call = ast.parse(build, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise CheckpointError(f"build={build!r} is not a Python call: {error}") from error
    names: list[str] = []
    place = call.func if isinstance(call, ast.Call) else None
    while isinstance(place, ast.Attribute):
        names.insert(0, place.attr)
        place = place.value
    if not isinstance(place, ast.Name) or not names:
        raise CheckpointError(
            f"build={build!r} does not say how the original is built; write the call with its module, such as "
            "'torchvision.models.resnet50()'"
        )
    found = place.id
    for name in names[:-1]:
        try:
            if importlib.util.find_spec(f"{found}.{name}") is None:
                break
        except ModuleNotFoundError:
            break
        found = f"{found}.{name}"
    return found


def _notes(subnormal: Mapping[str, int]) -> str:
    lines = ["## Files and versions\n"]
    if subnormal:
        lines.append(
            f"{sum(subnormal.values())} subnormal numbers, which change no result but make x86 processors slow, were "
            "written as zeros:\n"
        )
        lines += [*(f"- `{name}`: {count}" for name, count in subnormal.items()), ""]
    try:
        own = version("idap")
    except PackageNotFoundError:
        own = "not installed"
    lines.append(
        f"`model.safetensors` holds the weights, `plan.json` what is kept of the original. idap {own}, "
        f"torch {torch.__version__}, safetensors {safetensors.__version__}, Python {platform.python_version()}."
    )
    return "\n".join([*lines, ""])
