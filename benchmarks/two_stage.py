"""What does a recipe make of its model? Runs it and writes the numbers to benchmarks/results/.

python benchmarks/two_stage.py recipes/cifar10_resnet20.toml --data DATA --weights WEIGHTS.safetensors
"""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

import idap
from idap.cli.commands.compress import compare
from idap.cli.progress import listener
from idap.recipes.recipe import read_recipe

PACKAGES = ("torch", "numpy", "safetensors", "torchmetrics")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--name", help="of the result; the recipe's name if left out")
    options = parser.parse_args()

    replaced = {"data.path": options.data, "model.weights": options.weights}
    recipe = read_recipe(options.recipe, options.overrides, replaced=replaced)
    model, task, config = recipe.model(), recipe.task(), recipe.config()
    progress = listener(Console(highlight=False))
    if recipe.training() is not None:
        idap.fit(model, task, recipe.training(), progress=progress, title="train")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = idap.compress(model, task, config, run_dir=Path(folder) / "run", progress=progress)
        seconds = time.perf_counter() - started
        files = {file.name: file.stat().st_size for file in (Path(folder) / "run" / "model").iterdir()}
    numbers = {
        "question": "What does this recipe make of its model?",
        "command": shlex.join(["python", Path(sys.argv[0]).as_posix(), *map(_hidden, sys.argv[1:])]),
        "recipe": options.recipe.as_posix(),
        "seed": config.seed,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": {"processors": os.cpu_count(), "threads": torch.get_num_threads(), "machine": platform.machine()},
        "seconds": round(seconds, 1),
        "reached": result.reached,
        "message": result.message,
        "output_error": result.output_error,
        **compare(model, result, task, progress).to_json(),
        "bytes": files,
        "config": asdict(config),
        "steps": [asdict(step) for step in result.steps],
    }
    target = Path(__file__).parent / "results" / f"two_stage_{options.name or options.recipe.stem}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(f"{result}\nwritten to {target}")


def _hidden(argument: str) -> str:
    """Folders of this machine say nothing to others."""
    return Path(argument).name if Path(argument).is_absolute() or argument.startswith("..") else argument


if __name__ == "__main__":
    main()
