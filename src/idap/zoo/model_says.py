"""What a model of transformers says of the data that it wants: its tokenizer, vocabulary and labels."""

import importlib.util
from typing import Any

from idap.zoo import pretrained
from idap.zoo.pretrained import labels_of, load_config


def context_of(build: str) -> dict[str, Any]:
    """Read from a model's folder what the recipe need not repeat.

    Args:
        build: the spec of the model.

    Returns:
        "tokenizer", "vocabulary" (number of tokens), "positions" (tokens of a text at most), "labels_like" (names of
        the classes, in order) and "use_cache"; nothing for models of other libraries.

    Raises:
        ConfigError: there is no such model.
    """
    if not build.startswith(pretrained.PREFIX) or importlib.util.find_spec("transformers") is None:
        return {}
    import transformers  # noqa: PLC0415 - an optional extra

    config = load_config(build, transformers)
    return {
        "tokenizer": build.removeprefix(pretrained.PREFIX),
        "vocabulary": getattr(config, "vocab_size", None),
        "labels_like": labels_of(config),
        "positions": getattr(config, "max_position_embeddings", None),
        "use_cache": False,
    }
