"""Build a model by name: `python:...` from the user's code, or from idap, torchvision, timm or transformers."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from idap.errors import ConfigError
from idap.models.nets import DigitsResNet, DigitsViT, cifar_resnet20, cifar_resnet56
from idap.models.pretrained import Head, build_pretrained
from idap.models.weights import load_weights
from idap.script import call_object, is_script

TOKENS = 16
"""Length of an example text in tokens."""


def build_transformers(spec: str, name: str, library: ModuleType) -> nn.Module:
    """Build a model type of transformers in its default configuration, on the meta device, without weights.

    Args:
        spec: the spec, for messages.
        name: the type, such as ``bert``.
        library: the imported package.

    Raises:
        ConfigError: there is no such type, or its default configuration can't be built.
    """
    known = sorted(library.CONFIG_MAPPING)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise ConfigError(
            f"{spec}: transformers has no model type {name!r}."
            + (f" Did you mean {' or '.join(near)}?" if near else " Types are names such as bert, gpt2 or llama.")
        )
    config = library.AutoConfig.for_model(name)
    config.use_cache = False
    try:
        with torch.device("meta"):
            model: nn.Module = library.AutoModel.from_config(config)
    except Exception as error:
        raise ConfigError(
            f"{spec}: its default configuration can't be built: {type(error).__name__}: {error}. Build the model in a "
            "function of your own and write python:FILE.py:NAME."
        ) from error
    return model


def transformers_inputs(model: Any) -> dict[str, Tensor]:
    """Make example inputs for a model of transformers, with batch size 1, on the device of its parameters.

    Raises:
        ConfigError: the model's inputs are unknown.
    """
    device = next(model.parameters()).device
    config, name = model.config, model.main_input_name
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return {name: torch.zeros(1, getattr(config, "num_channels", 3), height, width, device=device)}
    if name != "input_ids":
        raise ConfigError(
            f"the inputs of {type(model).__name__} are unknown ({name}); build it in a function of your own and write "
            "python:FILE.py:NAME with --input-shape."
        )
    known = getattr(config, "vocab_size", None) or 1
    # Different tokens, since equal ones hide what a model does with their order; not the first ones of a vocabulary,
    # which stand for padding and the like.
    tokens = (known // 2 + torch.arange(TOKENS, device=device) % max(1, known - known // 2)).unsqueeze(0)
    return {name: tokens, **({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})}


Shape = tuple[int, ...]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs."""
SCHEMES = ("python", "idap", "torchvision", "timm", "hf", "transformers")
COUNTED = ("idap", "torchvision", "timm", "hf")
"""The schemes that build a model with a given number of outputs."""


@dataclass(frozen=True)
class _Own:
    """A network of `nets.py` and the shape of its input."""

    build: Callable[..., nn.Module]
    shape: Shape


_OWN: Mapping[str, _Own] = {
    "digits_resnet": _Own(DigitsResNet, (1, 1, 8, 8)),
    "digits_vit": _Own(DigitsViT, (1, 1, 8, 8)),
    "cifar_resnet20": _Own(cifar_resnet20, (1, 3, 32, 32)),
    "cifar_resnet56": _Own(cifar_resnet56, (1, 3, 32, 32)),
}


def build_model(
    spec: str,
    weights: str | Path | None = None,
    *,
    classes: int | None = None,
    head: Head | None = None,
    trained: bool = True,
    new_head: bool = False,
) -> nn.Module:
    """Build a model, with random weights or those of a file.

    Args:
        spec: `python:file.py:name` or `python:package.module:name` (a class or function that is called without
            arguments, or a module), `idap:NAME`, `torchvision:NAME`, `timm:NAME`, `hf:FOLDER` or `hf:NAME` (a model of
            transformers with its weights), or `transformers:TYPE`, such as `transformers:bert` (a model in its default
            configuration on the meta device, for inspection only).
        weights: a `.safetensors` file, or a checkpoint that `torch.load` reads with `weights_only=True`.
        classes: number of outputs; None: that of the model. It has no effect on `python:`.
        head: head of a model of `hf:`; None: the one that its folder names.
        trained: whether a model of `hf:` gets its weights; if not, only its configuration is read.
        new_head: whether a head of `hf:` without weights may start from random numbers.

    Returns:
        The model in evaluation mode.

    Raises:
        ConfigError: there is no such model, its package is not installed, or the user's code fails.
        CheckpointError: the weights can't be read or don't fit the model.

    Example:
        >>> build_model("idap:digits_resnet", classes=3).head.out_features
        3
    """
    scheme, _, name = spec.partition(":")
    counted = {} if classes is None else {"num_classes": classes}
    if is_script(spec):
        model = call_object(spec, _module_of)
    elif scheme == "idap":
        model = _OWN[_check_name(spec, name, list(_OWN))].build(**counted)
    elif scheme == "torchvision":
        model = _torchvision(spec, name, counted)
    elif scheme == "timm":
        model = _timm(spec, name, counted)
    elif scheme == "hf":
        library = _optional("transformers", spec)
        # A file of weights contains those of the head too.
        trained = trained and weights is None
        model = build_pretrained(spec, library, head=head, classes=classes, trained=trained, new_head=new_head)
    elif scheme == "transformers":
        model = build_transformers(spec, name, _optional("transformers", spec))
    else:
        raise ConfigError(f"model {spec!r} can't be looked up. {_scheme_advice(spec)}")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{spec} gave {type(model).__name__}, expected a torch.nn.Module; return the model itself.")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def example_inputs(spec: str, model: nn.Module) -> Inputs | None:
    """Make one example batch for a model built from a spec.

    Args:
        spec: the spec that the model was built from.
        model: the model, for the image size that models of timm state, and for the device of its tensors.

    Returns:
        Positional and keyword inputs with batch size 1; None if the spec does not determine them.

    Example:
        >>> args, kwargs = example_inputs("idap:cifar_resnet20", nn.Identity())
        >>> args[0].shape, kwargs
        (torch.Size([1, 3, 32, 32]), {})
    """
    scheme, _, name = spec.partition(":")
    if scheme == "idap" and name in _OWN:
        return (torch.zeros(_OWN[name].shape),), {}
    if scheme == "timm":
        stated: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        return (torch.zeros(1, *stated.get("input_size", (3, 224, 224))),), {}
    if scheme == "torchvision":
        return (torch.zeros(1, 3, 224, 224),), {}
    return ((), transformers_inputs(model)) if scheme in ("transformers", "hf") else None


def _module_of(found: Any) -> Any:
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ConfigError(f"the model is {type(found).__name__}, expected a function without arguments or a module.")
    return found()


def _torchvision(spec: str, name: str, counted: Mapping[str, int]) -> nn.Module:
    models = _optional("torchvision.models", spec)
    known = _check_name(spec, name, models.list_models())
    builder = models.get_model_builder(known)
    # Without this argument, models with a backbone download weights for it.
    bare = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    model: nn.Module = models.get_model(known, **bare, **counted)
    return model


def _timm(spec: str, name: str, counted: Mapping[str, int]) -> nn.Module:
    timm = _optional("timm", spec)
    # Names may end in a tag, as in resnet18.a1_in1k, which selects weights; they are not downloaded here. Only tags
    # that timm lists are allowed, since it treats others as locations to download a model from.
    _check_name(spec, name.partition(".")[0], timm.list_models())
    if "." in name:
        _check_name(spec, name, timm.list_pretrained())
    model: nn.Module = timm.create_model(name, pretrained=False, **counted)
    return model


def _optional(module: str, spec: str) -> ModuleType:
    package = module.partition(".")[0]
    extra = "text" if package == "transformers" else "vision"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == package:
            raise ConfigError(f"{spec} needs {package}, which is missing. Run: pip install 'idap[{extra}]'") from error
        raise _does_not_import(spec, package, error) from error
    except Exception as error:
        raise _does_not_import(spec, package, error) from error


def _does_not_import(spec: str, package: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{spec}: {package} is installed but can't be imported: {type(error).__name__}: {error}. It was probably built "
        "for another version of torch; install torch and torchvision together, from the same index."
    )


def _check_name(spec: str, name: str, names: list[str]) -> str:
    if name in names:
        return name
    scheme = spec.partition(":")[0]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    advice = f"did you mean {scheme}:{near[0]}?" if near else f"there are {', '.join(names[:8])}."
    raise ConfigError(f"{scheme} has no model named {name!r}; {advice}")


def _scheme_advice(spec: str) -> str:
    scheme, colon, rest = spec.partition(":")
    if ".py" in spec:
        return f"For your own code write python:{spec if colon else f'{spec}:NAME'}."
    if not colon:
        near = difflib.get_close_matches(spec, list(_OWN), n=1, cutoff=0.75)
        return f"Write idap:{near[0]}." if near else f"Say where it comes from: torchvision:{spec} or timm:{spec}."
    near = difflib.get_close_matches(scheme, SCHEMES, n=1)
    begins = ", ".join(f"{each}:" for each in SCHEMES)
    return f"Did you mean {near[0]}:{rest}?" if near else f"A spec begins with one of {begins}."
