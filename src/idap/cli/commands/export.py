"""`idap export`: write a compressed model as ONNX, a torch.export program, weights or a folder of transformers."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from idap.cli.failure import Outcome
from idap.cli.options import (
    DataPath,
    Debug,
    ExportFile,
    ExportTo,
    Finalize,
    InputShapes,
    Json,
    Opset,
    OriginalSpec,
    Quiet,
    RunOrModel,
    StaticBatch,
    TaskSpec,
    Trust,
    Verbose,
)
from idap.cli.subject import check_code, model_and_inputs, recipe_of
from idap.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from idap.deploy.export import Exported
    from idap.recipes.recipe import Recipe
    from idap.surgery.compare import Inputs
    from idap.surgery.finalize import Finalized

EXAMPLES = (
    "idap export runs/net --out net.onnx",
    "idap export small --model idap:digits_vit --to pt2 --finalize --out small.pt2",
    "idap export runs/bert --to transformers --out small-bert",
)
DOCUMENT = {
    "file": "what was written",
    "to": "onnx, pt2, safetensors or transformers",
    "bytes": "its size",
    "difference": "largest difference from the model's outputs, over the largest of them; null for transformers",
    "batches": "batch sizes at which the file was run; empty for weights, which are compared bit by bit",
    "dynamic_batch": "whether the file takes batches of any size",
    "inputs": "names of the inputs in the file",
    "outputs": "names of the outputs in the file",
    "opset": "version of the operators in an ONNX file; null for other forms",
    "finalized": "`folded`, `kept`, `silenced`, `gone` and `difference` with --finalize; null without",
    "pretrained": "for transformers `plain` (for `from_pretrained`), `changed`, `reason`, `loads_with` and "
    "`tokenizer`; null for other forms",
}
_FORMS = ("onnx", "pt2", "safetensors", "transformers")


def export_command(  # noqa: PLR0913 - one argument per option
    folder: RunOrModel,
    *,
    out: ExportFile,
    to: ExportTo = "onnx",
    model: OriginalSpec = None,
    task: TaskSpec = None,
    data: DataPath = None,
    input_shape: InputShapes = None,
    finalize: Finalize = False,
    static_batch: StaticBatch = False,
    opset: Opset = None,
    trust: Trust = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a compressed model as ONNX, as a torch.export program, as plain weights or as a folder of transformers.

    The file is read back and compared with the model on new inputs; on a mismatch, no file is left. A folder of
    transformers is a plain one, for `from_pretrained`, if its configuration can describe the compressed model. If the
    run was made elsewhere and its recipe names Python code, the command asks before it runs that code.
    """
    outcome = Outcome(
        command="idap export", where=str(folder), as_json=as_json, quiet=quiet, verbose=verbose, debug=debug
    )
    with outcome.report():
        _check(to, finalize=finalize, static_batch=static_batch, opset=opset)
        from idap.recipes.runs import model_folder, recipe_of_run  # noqa: PLC0415 - torch is slow to import

        place = model_folder(folder)
        recipe = recipe_of(model, task, data) if model is not None else recipe_of_run(folder)
        if model is None:
            check_code(outcome, folder, {}, trust=trust)
        spec = model or (recipe.network.build if recipe is not None else "")
        small, args, kwargs, report = _load(place, spec, recipe, input_shape or [], finalized=finalize)
        if to == "transformers":
            build = spec if recipe is None else recipe.network.build
            given = (tuple(map(_random_like, args)), kwargs) if input_shape else None
            outcome.document = _as_folder(small, given, out, build, None if as_json or quiet else outcome.console)
            return
        done = _write(small, args, kwargs, out, to=to, dynamic=not static_batch, opset=opset)
        outcome.document = asdict(done) | {"finalized": None if report is None else asdict(report), "pretrained": None}
        if not (as_json or quiet):
            _show(outcome.console, done, report)


def _check(to: str, *, finalize: bool, static_batch: bool, opset: int | None) -> None:
    """Refuse an unknown form, and options that the form does not have."""
    if to not in _FORMS:
        raise ConfigError(f"--to must be {', '.join(_FORMS[:-1])} or {_FORMS[-1]}, found {to!r}.")
    if to == "transformers" and finalize:
        raise ConfigError(
            "--finalize changes modules, but transformers rebuilds them from its configuration; leave out --finalize "
            "or --to transformers."
        )
    if static_batch and to not in ("onnx", "pt2"):
        raise ConfigError(f"--static-batch is for onnx and pt2; {to} takes batches of any size.")
    if opset is not None and to != "onnx":
        raise ConfigError(f"--opset is for onnx, found --to {to}.")


def _load(
    folder: Path, spec: str, recipe: "Recipe | None", shapes: list[str], *, finalized: bool
) -> "tuple[nn.Module, tuple[Any, ...], dict[str, Any], Finalized | None]":
    """The compressed model, inputs for it, and the report of finalizing it."""
    from idap.saving.checkpoint import load  # noqa: PLC0415 - torch is slow to import
    from idap.surgery.finalize import finalize  # noqa: PLC0415 - as above

    original, args, kwargs = model_and_inputs(spec, recipe, shapes, weights=False)
    small = load(folder, original)
    if not finalized:
        return small, args, kwargs, None
    final, report = finalize(small, args, kwargs)
    return final, args, kwargs, report


def _write(
    model: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any], out: Path, *, to: str, dynamic: bool,
    opset: int | None,
) -> "Exported":  # fmt: skip
    from idap.deploy.export import export, export_weights  # noqa: PLC0415 - torch is slow to import

    if to == "safetensors":
        return export_weights(model, out)
    return export(model, args, out, kwargs=kwargs, to=to, dynamic_batch=dynamic, opset=opset)


def _random_like(example: "Tensor") -> "Tensor":
    """Random numbers with the shape and type of an example, which holds only zeros."""
    import torch  # noqa: PLC0415 - slow to import

    return torch.randn_like(example) if example.is_floating_point() else torch.randint_like(example, 2)


def _as_folder(
    model: "nn.Module", inputs: "Inputs | None", out: Path, spec: str, console: Console | None
) -> dict[str, Any]:
    """Save as a folder of transformers, with the tokenizer of the original.

    The model is not compared on the example inputs of the other forms: equal tokens hide how heads are divided.
    """
    from idap.hugging_face.folder import save_pretrained  # noqa: PLC0415 - torch is slow to import
    from idap.models.pretrained import generate_as, processor_of  # noqa: PLC0415 - as above

    generate_as(model, spec)
    tokenizer = processor_of(spec)
    saved = save_pretrained(model, None, out, tokenizer=tokenizer, inputs=inputs)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    kind = None if tokenizer is None else type(tokenizer).__name__
    if console is not None:
        beside = f"saved with {kind}" if kind else "saved without a tokenizer or image processor"
        console.print(f"{saved}; {beside}. {size / 1e6:.2f} MB.", markup=False, soft_wrap=not console.is_terminal)
    told = {name: value for name, value in asdict(saved).items() if name != "folder"}
    empty = dict.fromkeys(DOCUMENT) | {"batches": [], "inputs": [], "outputs": [], "dynamic_batch": True}
    return empty | {"file": out, "to": "transformers", "bytes": size, "pretrained": told | {"tokenizer": kind}}


def _show(console: Console, done: "Exported", report: "Finalized | None") -> None:
    if report is not None:
        console.print(
            f"Finalized: {len(report.folded)} batch norms folded, {len(report.kept)} kept; {len(report.silenced)} "
            f"dropouts and stand-ins silenced; {len(report.gone)} modules removed.",
            soft_wrap=not console.is_terminal,
        )
    facts = [f"{done.bytes / 1e6:.2f} MB"]
    if done.opset is not None:
        facts.append(f"opset {done.opset}")
    if done.batches:
        facts += ["any batch size" if done.dynamic_batch else f"batches of {done.batches[0]}"]
        facts += [f"inputs {', '.join(done.inputs)}", f"outputs {', '.join(done.outputs)}"]
    console.print(f"{done.file}: {'; '.join(facts)}.", markup=False, soft_wrap=not console.is_terminal)
    checked = (
        f"Run at batch sizes {', '.join(map(str, done.batches))}: differs from the model by at most "
        f"{done.difference:.1g} of its largest output."
        if done.batches
        else "Read back: equal to the model, bit by bit."
    )
    console.print(checked, markup=False, soft_wrap=not console.is_terminal)
