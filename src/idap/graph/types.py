"""Tell a data type that code read from a tensor from one that it names: only the first follows the model's own."""

import linecache
import re
import types

import torch

from idap.graph.frames import SameType, Unseen

_NAMED = ("float16", "float32", "float64", "half", "double", "bfloat16")
_IN_TEXT = re.compile(r"torch\.(float|half|double|bfloat)")


def type_passed(frame: types.FrameType, dtype: torch.dtype) -> torch.dtype | SameType | Unseen:
    """What a data type is that code passes on after it read one from a tensor.

    Args:
        frame: of the code, at the call.
        dtype: that is passed.

    Returns:
        The type itself if the call names it among its last arguments, `SameType` if the code names no type anywhere,
        else nothing known.
    """
    if not dtype.is_floating_point:
        return dtype
    if _IN_TEXT.search(_last_arguments(frame)):
        return dtype
    names = any(name in _NAMED for name in frame.f_code.co_names)
    return Unseen("a data type of unknown origin") if names else SameType()


def _last_arguments(frame: types.FrameType) -> str:
    """The source of a call from its last opening bracket on, "" where it is not at hand."""
    positions = list(frame.f_code.co_positions())
    place = frame.f_lasti // 2
    start, end, _, column = positions[place] if place < len(positions) else (None, None, None, None)
    if start is None or end is None or column is None:
        return ""
    lines = [linecache.getline(frame.f_code.co_filename, line) for line in range(start, end + 1)]
    text = "".join([*lines[:-1], lines[-1].encode()[:column].decode(errors="ignore")])
    return text[text.rfind("(") :]
