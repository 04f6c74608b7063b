"""Save and load compressed models of transformers, as folders for `from_pretrained` where this is possible.

a plain folder, if a configuration describes the model:         otherwise:
├── config.json, generation_config.json                         ├── original/      the same, of the original
├── model.safetensors                                           ├── model.safetensors, plan.json   as `idap.save` writes
├── files of the tokenizer                                      ├── config.json    says how to load the folder
└── idap.json      what was changed                             └── idap.json      why it is not a plain folder

`idap.json` also holds checksums of the files that transformers wrote; `load_pretrained` compares them.
"""

import importlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from idap.errors import CheckpointError, ConfigError, UncheckedFileWarning
from idap.files import folder_beside, hold, move_aside, write_bytes, write_json
from idap.hugging_face.configuration import Configured, find_configuration, output_difference, tolerance
from idap.models.pretrained import check_kernels
from idap.models.resolve import transformers_inputs
from idap.parsing import PLAN, WEIGHTS, inside, read_json
from idap.saving.checkpoint import load, origin, save
from idap.saving.checksums import file_checksum
from idap.structure.plan import Plan
from idap.surgery.compare import Inputs
from idap.surgery.rewritten import original_class

NOTE, ORIGINAL, CONFIG = "idap.json", "original", "config.json"


@dataclass(frozen=True)
class Saved:
    """A saved model, and how to load it.

    Attributes:
        folder: folder that holds it.
        plain: whether it is a plain folder of transformers, which `from_pretrained` loads.
        changed: field of the configuration -> its value before and after, for a plain folder.
        reason: why it is not a plain folder; "" if it is one.
        loads_with: the Python expression that loads it.
    """

    folder: Path
    plain: bool
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    reason: str = ""
    loads_with: str = ""

    def __str__(self) -> str:
        if self.plain:
            told = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in self.changed.items())
            return f"{self.folder} is a plain folder ({told or 'nothing changed'}); it loads with {self.loads_with}"
        return f"{self.folder} is not a plain folder: {self.reason}. It loads with {self.loads_with}"


def save_pretrained(
    model: Any, plan: Plan | None, folder: str | Path, *, tokenizer: Any = None, inputs: Inputs | None = None
) -> Saved:
    """Save a compressed model of transformers, as a plain folder if a configuration can describe it.

    A configuration has one number for the heads, neurons and layers of the whole model. If the cuts left the same
    numbers in every layer (`FilterStage(alike="model")` does so), and removed only whole layers, idap searches for a
    configuration whose model has the same tensors and, verified on example inputs, the same outputs. The folder can
    then be loaded without idap. Otherwise the tensors are saved with the plan and the original's configuration.

    Args:
        model: the compressed model, which still has the original's `config`; not changed.
        plan: the plan from the original to the model; None: the one that `load` and `compress` attach to a model is
            used.
        folder: a new or empty folder, or one written by this function before; it is written whole or not at all.
        tokenizer: any object with `save_pretrained`, such as a processor; its files are written beside the
            configuration.
        inputs: positional and keyword inputs on which the outputs are compared; None: random tokens or pixels are used.

    Returns:
        The saved folder, its kind with the reason, and how to load it.

    Raises:
        ConfigError: transformers is missing, the model is not one of its models, or it does not run on the inputs.
        CheckpointError: the folder holds other files or can't be written, or the plan is not that of the model.
    """
    plan = _check_model(model, plan)
    folder = Path(folder)
    _check_folder(folder)
    inputs = inputs or example_inputs(model)
    _check_runs(model, inputs)
    found = find_configuration(model, plan, inputs)
    if isinstance(found, str):
        call = f"idap.hugging_face.folder.load_pretrained({str(folder)!r})"
        saved = Saved(folder, False, reason=found, loads_with=call)
    else:
        call = f"{type(found.model).__name__}.from_pretrained({str(folder)!r})"
        saved = Saved(folder, True, found.changed, loads_with=call)

    def write(new: Path) -> None:
        if isinstance(found, Configured):
            _write_plain(found, model, new, inputs)
        else:
            _write_with_plan(model, plan, new, saved.loads_with)
        checksums = {name: file_checksum(new / name) for name in _without_checksum(new)}
        if tokenizer is not None:
            tokenizer.save_pretrained(new if saved.plain else new / ORIGINAL)
        note = {"format": 1, "plain": saved.plain, "changed": saved.changed, "reason": saved.reason}
        write_json(new / NOTE, {**note, "sha256": checksums})

    _put(folder, write)
    return saved


def load_pretrained(folder: str | Path) -> nn.Module:
    """Load a folder of either kind that `save_pretrained` wrote.

    Returns:
        The compressed model in evaluation mode.

    Raises:
        ConfigError: transformers is missing, or has no such model.
        CheckpointError: a file is missing, broken, or different from what was written.

    Warns:
        UncheckedFileWarning: the folder was written without checksums, so damage can't be found.
    """
    folder = Path(folder)
    plain = not (folder / PLAN).exists()
    file = folder / CONFIG if plain else folder / ORIGINAL / CONFIG
    library = _transformers()
    try:
        (name,) = json.loads(file.read_text(encoding="utf-8"))["architectures"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no saved model of transformers: {file} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is broken ({error}); copy it again") from error
    kind: Any = getattr(library, str(name), None)
    if not _is_model_class(kind, library):
        raise ConfigError(
            f"{file} names the model {name!r}, which transformers {library.__version__} does not have; build the "
            f"model yourself and load with {'from_pretrained' if plain else f'idap.load({str(folder)!r}, original)'}."
        )
    _compare_checksums(folder)
    config = kind.config_class.from_pretrained(file.parent)
    check_kernels(str(folder), config)
    if plain:
        found: nn.Module = kind.from_pretrained(folder, config=config, use_safetensors=True, weights_only=True)
        return found.eval()
    with torch.random.fork_rng(devices=[]):
        small = load(folder, kind._from_config(config)).eval()
    if (folder / ORIGINAL / "generation_config.json").exists():
        small.generation_config = library.GenerationConfig.from_pretrained(folder / ORIGINAL)
    return small


def _without_checksum(folder: Path) -> list[str]:
    """Names of the files of a folder that carry no checksum of their own; those that `idap.save` writes do."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return [name for name in names if not ((folder / PLAN).exists() and name in (PLAN, WEIGHTS))]


def _compare_checksums(folder: Path) -> None:
    """Refuse a folder if a file differs from what `save_pretrained` wrote.

    Raises:
        CheckpointError: a file differs or can't be read; the message names it.
    """
    try:
        note = read_json(folder / NOTE)
    except FileNotFoundError:
        note = {}
    checksums = note.get("sha256") if isinstance(note, dict) else None
    if checksums is None:
        warnings.warn(
            f"{folder} was written without checksums, so damage to its files can't be found; save the model with "
            "idap.save_pretrained to have checksums",
            UncheckedFileWarning,
            stacklevel=3,
        )
        return
    if not isinstance(checksums, dict):
        raise CheckpointError(f"{folder / NOTE} is broken: sha256 is not a list of files; copy it again")
    for name, wanted in checksums.items():
        part, _, last = name.rpartition("/")
        if part not in ("", ORIGINAL):
            raise CheckpointError(f"{folder / NOTE} names the file {name!r:.80}, which is not one of this folder")
        file = inside(folder / part, last, NOTE)
        try:
            found = file_checksum(file)
        except OSError as error:
            raise CheckpointError(f"{file} can't be read: {error}; copy the folder again") from error
        if found != wanted:
            raise CheckpointError(
                f"{file} is not what was written there: its checksum does not match, so the file was damaged or "
                "changed; copy it again from where it was saved. If you changed it on purpose, delete the entry "
                f"{name!r} of sha256 in {folder / NOTE}"
            )


def example_inputs(model: Any) -> Inputs:
    """Make inputs of batch size 1 with random tokens or pixels, so that their positions differ.

    Raises:
        ConfigError: the model's inputs are unknown.
    """
    dice = torch.Generator().manual_seed(0)
    tokens = getattr(model.get_input_embeddings(), "num_embeddings", 2)

    def fill(like: Tensor) -> Tensor:
        if like.is_floating_point():
            return torch.randn(like.shape, generator=dice).to(like)
        return torch.randint(0, tokens, like.shape, generator=dice).to(like)

    try:
        return (), {name: fill(tensor) for name, tensor in transformers_inputs(model).items()}
    except (ConfigError, AttributeError) as error:
        raise ConfigError(
            f"no example inputs for {type(model).__name__} are known; pass inputs=(args, kwargs) for its forward."
        ) from error


def _is_model_class(found: object, library: ModuleType) -> bool:
    return isinstance(found, type) and issubclass(found, library.PreTrainedModel)


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError("this needs transformers, which is missing. Run: pip install 'idap[text]'") from error


def _check_model(model: Any, plan: Plan | None) -> Plan:
    if not isinstance(model, _transformers().PreTrainedModel):
        raise ConfigError(
            f"save_pretrained takes a model of transformers, found {type(model).__name__}; idap.save takes any model."
        )
    plan = origin(model) if plan is None else plan
    if plan is None:
        raise ConfigError(
            f"this {type(model).__name__} remembers no plan, so it comes neither from idap.load nor from "
            "idap.compress; pass the plan by which it was cut."
        )
    for name, tensor in model.named_parameters():
        if name in plan.shapes and tuple(tensor.shape) != plan.shape_after(name):
            raise CheckpointError(
                f"the plan is not that of this model: it makes tensor {name!r} {plan.shape_after(name)}, the model's "
                f"is {tuple(tensor.shape)}; pass the compressed model and its own plan"
            )
    return plan


def _check_runs(model: Any, inputs: Inputs) -> None:
    try:
        output_difference(model, model, inputs)
    except Exception as error:
        raise ConfigError(
            f"{type(model).__name__} does not run on the example inputs: {type(error).__name__}: {error}. Pass "
            "inputs=(args, kwargs), of the kind and size on which it was compressed."
        ) from error


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / NOTE).exists():
        raise CheckpointError(
            f"{folder} is not empty and was not written by save_pretrained of idap; choose another folder, so that "
            "no file is lost"
        )


def _write_plain(found: Configured, model: Any, new: Path, inputs: Inputs) -> None:
    """Write with the model's own `save_pretrained`, and compare what is loaded from there with the compressed model."""
    if model.can_generate():
        found.model.generation_config = model.generation_config
    found.model.save_pretrained(new)
    again = type(found.model).from_pretrained(new, dtype=model.dtype).to(model.device)
    error = output_difference(again, model, inputs)
    if not error <= tolerance(model.dtype):
        raise CheckpointError(
            f"{type(model).__name__} gives other outputs after its own save_pretrained and from_pretrained (error "
            f"{error:.2g}); save it with idap.save"
        )


def _write_with_plan(model: Any, plan: Plan, new: Path, loads_with: str) -> None:
    save(new, model, plan)
    # Without a file of this name, from_pretrained of a class would build that class's default model, however large.
    text = f"This is not a configuration of transformers: load the folder with {loads_with}\n"
    write_bytes(new / CONFIG, text.encode())
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = model.dtype
    config.architectures = [original_class(type(model)).__name__]
    config.save_pretrained(new / ORIGINAL)
    if model.can_generate():
        model.generation_config.save_pretrained(new / ORIGINAL)


def _put(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside its destination, then move it there; the old folder is deleted last."""
    try:
        with folder_beside(folder) as new:
            write(new)
            if not folder.exists():
                new.rename(folder)
                return
            with hold(folder):  # so that no other process deletes the old folder as a leftover
                old = move_aside(folder)
                try:
                    new.rename(folder)
                except OSError:
                    old.rename(folder)
                    raise
                shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {folder}: {error}") from error
