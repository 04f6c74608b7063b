"""Build models of transformers with the head that a task needs, and read what they tell about their data."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from idap.data.tokens import FILES
from idap.errors import CheckpointError, ConfigError

PREFIX = "hf:"
Head = Literal["sequence", "language", "image", "segmentation"]
HEADS: Mapping[Head, tuple[str, str]] = {
    "sequence": ("AutoModelForSequenceClassification", "ForSequenceClassification"),
    "language": ("AutoModelForCausalLM", "LM"),
    "image": ("AutoModelForImageClassification", "ForImageClassification"),
    "segmentation": ("AutoModelForSemanticSegmentation", "ForSemanticSegmentation"),
}
"""Head -> the class of transformers that builds a model with it, and the ending of the names of such models."""


def build_pretrained(
    spec: str, library: ModuleType, *, head: Head | None, classes: int | None, trained: bool, new_head: bool
) -> nn.Module:
    """Build a model of transformers.

    Args:
        spec: `hf:FOLDER` or `hf:NAME`.
        library: the imported package.
        head: head of the model; None: the one that the folder names.
        classes: number of outputs of the head; None: the number that the folder names.
        trained: whether its weights are read; if not, only its configuration is.
        new_head: whether a head without weights may start from random numbers.

    Returns:
        The model, in float32.

    Raises:
        ConfigError: there is no such model, or it has a different number of classes.
        CheckpointError: weights are missing.
    """
    config = load_config(spec, library)
    builder, ending = _builder(spec, library, config, head)
    if classes is not None and head != "language":
        own = any(ending and each.endswith(ending) for each in getattr(config, "architectures", None) or [])
        if own and config.num_labels != classes:
            raise ConfigError(
                f"{spec} has {config.num_labels} classes ({_few(config.id2label)}), the data {classes}. Take the data "
                "that it was trained for, or a folder without this head; a new head is then trained in [train]."
            )
        if config.num_labels != classes:
            config.num_labels = classes
    if head == "language":
        config.use_cache = False
    if not trained:
        made: nn.Module = _attempt(spec, lambda: builder.from_config(config, trust_remote_code=False))
        return made
    with _quiet(library):
        model, report = _attempt(
            spec,
            lambda: builder.from_pretrained(
                _place(spec),
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                weights_only=True,
                trust_remote_code=False,
            ),
        )
    missing = sorted(report["missing_keys"])
    if missing and not new_head:
        raise CheckpointError(
            f"{spec} has no weights for {missing[0]!r}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}: "
            "they would start from random numbers. Take a model that was trained for this task, or train it first: "
            "[train] with epochs = 3."
        )
    found: nn.Module = model
    return found


def load_config(spec: str, library: ModuleType) -> Any:
    """Read the configuration of a model; a configuration that names code is refused.

    Raises:
        ConfigError: there is no configuration, or it names code.
    """
    name = spec.removeprefix(PREFIX)
    folder = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or not name
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{spec}: {folder} holds no config.json; expected what model.save_pretrained(...) writes.")
    if looks_local and not folder.is_dir():
        raise ConfigError(f"{spec}: there is no folder {folder}. Write hf:FOLDER, or hf:NAME as it stands on the hub.")
    config = _attempt(spec, lambda: library.AutoConfig.from_pretrained(_place(spec), trust_remote_code=False))
    check_kernels(spec, config)
    return config


def check_kernels(where: str, config: Any) -> None:
    """Refuse a configuration that makes transformers fetch the code of its attention from the hub.

    Args:
        where: where the configuration comes from, for messages.
        config: configuration of transformers, with the configurations of the parts of its model.

    Raises:
        ConfigError: the configuration names code; so does the message.
    """
    for kind in ("attn", "experts"):
        named = getattr(config, f"_{kind}_implementation", None)
        if named is not None and not str(named).isidentifier():
            raise ConfigError(
                f"{where}: its config.json names {named!r:.80} as {kind}_implementation, which is code from elsewhere; "
                f"idap runs no such code. Set {kind}_implementation to 'eager' there."
            )
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            check_kernels(where, getattr(config, name))


def processor_of(spec: str) -> Any:
    """Load the tokenizer or the image processor beside a model of `hf:`; None if there is none.

    Args:
        spec: `hf:FOLDER`, `hf:NAME` or any other spec, which has none.

    Raises:
        CheckpointError: it exists and can't be read.
    """
    if not spec.startswith(PREFIX):
        return None
    import transformers  # noqa: PLC0415 - optional, and slow to import

    place = _place(spec)
    for kind, loader, files in (
        ("tokenizer", transformers.AutoTokenizer, FILES),
        ("image processor", transformers.AutoImageProcessor, ("preprocessor_config.json",)),
    ):
        if not isinstance(place, Path) or any((place / file).is_file() for file in files):
            try:
                return loader.from_pretrained(place, trust_remote_code=False)
            except Exception as error:  # broken files raise exceptions of any kind
                if isinstance(place, Path):  # then its files exist
                    raise CheckpointError(
                        f"{spec}: its {kind} can't be read: {type(error).__name__}: {error}"
                    ) from error
    return None


def generate_as(model: Any, spec: str) -> None:
    """Set a model's options of text generation as its folder has them.

    Args:
        model: a model of transformers that was built from a configuration alone; changed in place.
        spec: the spec that it was built from, `hf:FOLDER` or `hf:NAME`; other specs change nothing.
    """
    if not spec.startswith(PREFIX):
        return
    import transformers  # noqa: PLC0415 - optional, and slow to import

    published = load_config(spec, transformers)
    if hasattr(published, "use_cache"):
        model.config.use_cache = published.use_cache
    if model.can_generate():
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(_place(spec))
        except OSError:  # the folder has none: that of the configuration stays
            return


def _place(spec: str) -> Path | str:
    """The folder that a spec names, or else the name on the hub."""
    name = spec.removeprefix(PREFIX)
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else name


def labels_of(config: Any) -> list[str] | None:
    """Names of a model's classes in the order of its outputs; None if they are only numbered."""
    names = [str(config.id2label[place]) for place in sorted(config.id2label)]
    return None if names == [f"LABEL_{place}" for place in range(len(names))] else names


def _builder(spec: str, library: ModuleType, config: Any, head: Head | None) -> tuple[Any, str]:
    if head is not None:
        name, ending = HEADS[head]
        return getattr(library, name), ending
    named = getattr(config, "architectures", None)
    kind = getattr(library, str(named[0]), None) if isinstance(named, list) and named else None
    if isinstance(kind, type) and issubclass(kind, library.PreTrainedModel):
        return _Plain(kind), ""
    return library.AutoModel, ""


class _Plain:
    """A class of models with the interface of the classes that choose one, such as AutoModel."""

    def __init__(self, kind: Any) -> None:
        self.from_pretrained = kind.from_pretrained
        self._build = kind._from_config

    def from_config(self, config: Any, *, trust_remote_code: bool) -> Any:
        """Build a model; its class belongs to the library, so no other code is run."""
        assert not trust_remote_code
        return self._build(config)


def _attempt(spec: str, call: Any) -> Any:
    try:
        return call()
    except Exception as error:  # a broken file, a failed download, a type without this head
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        raise ConfigError(
            f"{spec} can't be built: {type(error).__name__}: {lines[0].rstrip('.')}. Write hf:FOLDER with what "
            "model.save_pretrained(...) wrote, or hf:NAME as it stands on the hub."
        ) from error


@contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    """Silence transformers' log and progress bars: missing weights are reported here, or are intended."""
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _few(names: Mapping[Any, Any]) -> str:
    shown = list(names.values())[:4]
    return ", ".join(map(str, shown)) + (", ..." if len(names) > 4 else "")


def context_of(build: str) -> dict[str, Any]:
    """Read the settings from a model's folder that a recipe need not repeat.

    Args:
        build: the spec of the model.

    Returns:
        "tokenizer", "vocabulary" (number of tokens), "positions" (most tokens of a text), "labels_like" (names of the
        classes, in order) and "use_cache"; nothing for models of other libraries.

    Raises:
        ConfigError: there is no such model.
    """
    if not build.startswith(PREFIX) or importlib.util.find_spec("transformers") is None:
        return {}
    import transformers  # noqa: PLC0415 - an optional extra

    config = load_config(build, transformers)
    return {
        "tokenizer": build.removeprefix(PREFIX),
        "vocabulary": getattr(config, "vocab_size", None),
        "labels_like": labels_of(config),
        "positions": getattr(config, "max_position_embeddings", None),
        "use_cache": False,
    }
