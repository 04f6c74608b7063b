"""Lets the API reference read the docstrings' section `Example:` as what it is, a doctest."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Griffe knows the section as `Examples:` only."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
