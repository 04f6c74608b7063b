"""How fast is the structure analysis, how does it grow, and how does a whole cut compare with Torch-Pruning?

    python benchmarks/structure.py                  # all questions; needs the extras vision, hub and bench
    python benchmarks/structure.py growth llama     # some of them

Questions:
    families   export and analysis of the smallest model of each timm family
    growth     DenseNet-121, -169 and -201: seconds per node
    llama      a Llama of 7 billion parameters on the meta device: export, analysis, plan, and peak memory
    pairs      a cut by half, from the module to the smaller module, against Torch-Pruning in the same run, pairwise
"""

import argparse
import copy
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "structure.json"
sys.path.insert(0, str(ROOT))

from tests.conformance import vision_operators  # noqa: E402 - the project's own environments only

vision_operators.make_importable()

from idap.graph.trace import trace  # noqa: E402
from idap.structure.analysis import analyze  # noqa: E402
from idap.surgery.apply import apply_plan_  # noqa: E402

REPEATS = 5


def families() -> dict[str, Any]:
    from tests.conformance.timm_models import CASES  # noqa: PLC0415

    rows = []
    for case in CASES:
        model, (args, kwargs) = case.build().eval(), case.inputs()
        start = time.perf_counter()
        graph = trace(model, args, kwargs)
        exported = time.perf_counter()
        analyze(graph)
        rows.append(
            {
                "model": case.name,
                "nodes": len(graph.nodes),
                "export_s": round(exported - start, 3),
                "analysis_s": round(time.perf_counter() - exported, 3),
            }
        )
        print(rows[-1], flush=True)
    shares = [row["analysis_s"] / row["export_s"] for row in rows]
    return {
        "slowest_analysis_s": max(row["analysis_s"] for row in rows),
        "median_analysis_s": statistics.median(row["analysis_s"] for row in rows),
        "median_share_of_export": round(statistics.median(shares), 4),
        "models": rows,
    }


def growth() -> dict[str, Any]:
    import torchvision  # noqa: PLC0415

    rows = []
    for name in ("densenet121", "densenet169", "densenet201"):
        graph = trace(torchvision.models.get_model(name, weights=None).eval(), (torch.randn(2, 3, 64, 64),))
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            structure = analyze(graph)
            seconds.append(time.perf_counter() - start)
        middle = statistics.median(seconds)
        rows.append(
            {
                "model": name,
                "nodes": len(graph.nodes),
                "groups": len(structure.groups),
                "analysis_s": round(middle, 3),
                "microseconds_per_node": round(1e6 * middle / len(graph.nodes), 1),
            }
        )
        print(rows[-1], flush=True)
    return {"models": rows}


def llama() -> dict[str, Any]:
    """In a process of its own, so that the peak of its memory is its own."""
    if "--apart" not in sys.argv:
        command = [sys.executable, __file__, "llama", "--apart"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
        print(result, flush=True)
        return result
    import transformers  # noqa: PLC0415

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, use_cache=False
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
        tokens = torch.zeros(1, 16, dtype=torch.int64)
    start = time.perf_counter()
    graph = trace(model, (), {"input_ids": tokens})
    exported = time.perf_counter()
    structure = analyze(graph, contracts=["logits"])
    analysed = time.perf_counter()
    plan = structure.plan({group.name: range(0, group.size, 2) for group in structure.groups})
    planned = time.perf_counter()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": parameters,
        "kept": round(sum(torch.Size(plan.shape_after(name)).numel() for name in plan.shapes) / parameters, 4),
        "nodes": len(graph.nodes),
        "groups": len(structure.groups),
        "export_s": round(exported - start, 2),
        "analysis_s": round(analysed - exported, 2),
        "plan_s": round(planned - analysed, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "peak_of_imports_gib": round(before / 2**20, 2),
    }


def _ours(model: nn.Module, images: torch.Tensor) -> None:
    structure = analyze(trace(model, (images,)))
    apply_plan_(model, structure.plan({group.name: range((group.size + 1) // 2) for group in structure.groups}))


def _theirs(model: nn.Module, images: torch.Tensor) -> None:
    import torch_pruning  # noqa: PLC0415

    last = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == 1000]
    importance = torch_pruning.importance.MagnitudeImportance()
    torch_pruning.pruner.BasePruner(model, images, importance=importance, pruning_ratio=0.5, ignored_layers=last).step()


def pairs() -> dict[str, Any]:
    import torchvision  # noqa: PLC0415

    images, rows = torch.randn(1, 3, 224, 224), []
    for name in ("resnet50", "vit_b_16", "convnext_small"):
        original = torchvision.models.get_model(name, weights=None).eval()
        seconds: dict[str, list[float]] = {"idap": [], "torch_pruning": []}
        for repeat in range(REPEATS + 1):  # the first pair warms up
            ways = {"idap": _ours, "torch_pruning": _theirs}
            for way in sorted(ways, reverse=bool(repeat % 2)):
                seconds[way].append(_timed(ways[way], copy.deepcopy(original), images))
        ours, theirs = (seconds[way][1:] for way in ("idap", "torch_pruning"))
        rows.append(
            {
                "model": name,
                "idap_s": _middle(ours),
                "torch_pruning_s": _middle(theirs),
                "median_ratio": _middle([o / t for o, t in zip(ours, theirs, strict=True)]),
                "all": {way: [_middle([second]) for second in found[1:]] for way, found in seconds.items()},
            }
        )
        print(rows[-1], flush=True)
    return {"models": rows}


def _middle(values: list[float]) -> float | None:
    """The median; None if a run failed."""
    return None if any(map(math.isnan, values)) else round(statistics.median(values), 3)


def _timed(way: Callable[[nn.Module, torch.Tensor], None], model: nn.Module, images: torch.Tensor) -> float:
    start = time.perf_counter()
    try:
        way(model, images)
        model(images)
    except Exception as error:
        print(f"{way.__name__} failed: {type(error).__name__}: {error}", flush=True)
        return float("nan")
    return time.perf_counter() - start


QUESTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "families": families, "growth": growth, "llama": llama, "pairs": pairs,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", help="any of them; all by default")
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if arguments.apart:
        print(json.dumps(llama()))
        return
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for question in arguments.questions or list(QUESTIONS):
        found[question] = QUESTIONS[question]() | {"command": f"python benchmarks/structure.py {question}"}
    packages = ("torch", "torchvision", "timm", "transformers", "torch-pruning", "numpy")
    found["versions"] = {"python": platform.python_version()} | {name: version(name) for name in packages}
    found["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    found["seed"] = 0
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
