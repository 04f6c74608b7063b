"""Models of the transformers library by type: their default configuration, without weights."""

import difflib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from idap.errors import ConfigError

TOKENS = 16
"""Length of an example text."""


def build_transformers(spec: str, name: str, library: ModuleType) -> nn.Module:
    """Build a model type of transformers in its default configuration, on the meta device: it has no numbers.

    Args:
        spec: for messages.
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
            "function of your own and say python:FILE.py:NAME."
        ) from error
    return model


def transformers_inputs(model: Any) -> dict[str, Tensor]:
    """Example inputs for a model of transformers, with batch size 1, on the device of its parameters.

    Raises:
        ConfigError: what it takes is not known.
    """
    device = next(model.parameters()).device
    config, name = model.config, model.main_input_name
    if name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return {name: torch.zeros(1, getattr(config, "num_channels", 3), height, width, device=device)}
    if name != "input_ids":
        raise ConfigError(
            f"what {type(model).__name__} takes is not known ({name}); build it in a function of your own and say "
            "python:FILE.py:NAME with --input-shape."
        )
    known = getattr(config, "vocab_size", None) or 1
    # Different ones: equal tokens hide what a model does with their order. The first ones mean padding and the like.
    tokens = (known // 2 + torch.arange(TOKENS, device=device) % max(1, known - known // 2)).unsqueeze(0)
    return {name: tokens, **({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})}
