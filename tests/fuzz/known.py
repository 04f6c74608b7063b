"""Failures that are known and not mended yet: they are counted and told, and fail no test.

Take a line out when its cause is mended; `python -m tests.fuzz` says which lines no longer match anything.
"""

import re
from collections.abc import Mapping

KNOWN: Mapping[str, str] = {}
"""Pattern of the failure (kind/action what) or of a problem after a kill -> the cause."""


def cause_of(text: str) -> str:
    """The known cause of a failure; "" for one that is new."""
    return next((cause for pattern, cause in KNOWN.items() if re.search(pattern, text)), "")
