"""Ints by which modules number themselves: they stay dense when some of the modules are removed.

The layers of a language model tell a cache of keys and values which of its entries is theirs. If the first layer were
removed and the others kept their numbers, the cache would find its first entry empty and take the text for new.
"""

from collections.abc import Callable, Mapping

from idap.graph.ir import ModuleInfo
from idap.structure.plan import Size

ORDINALS = ("layer_idx",)
"""Names of such ints: in transformers every attention and state-space layer has one."""


def renumbered(modules: Mapping[str, ModuleInfo], gone: Callable[[str], bool]) -> dict[str, dict[str, Size]]:
    """New numbers for the modules that stay, where they change.

    Args:
        modules: by path.
        gone: whether a module is removed.

    Returns:
        Module path -> attribute -> its new value.

    Example:
        >>> info = {f"layers.{i}.attn": ModuleInfo("Attn", "", {"layer_idx": i}, {}) for i in range(3)}
        >>> renumbered(info, lambda path: path == "layers.0.attn")
        {'layers.1.attn': {'layer_idx': 0}, 'layers.2.attn': {'layer_idx': 1}}
    """
    found: dict[str, dict[str, Size]] = {}
    for name in ORDINALS:
        stacks: dict[str, dict[str, int]] = {}
        for path, info in modules.items():
            number = info.sizes.get(name)
            if isinstance(number, int):
                stacks.setdefault(_stack(path, number), {})[path] = number
        for stack in stacks.values():
            kept = {number for path, number in stack.items() if not gone(path)}
            lost = set(stack.values()) - kept
            for path, number in stack.items():
                below = sum(other < number for other in lost)
                if below and not gone(path):
                    found.setdefault(path, {})[name] = number - below
    return found


def _stack(path: str, number: int) -> str:
    """Path of the list of layers in which a module has this number; encoder and decoder count on their own."""
    parts = path.split(".")
    places = [place for place, part in enumerate(parts) if part == str(number)]
    return ".".join(parts[: places[-1]]) if places else ""
