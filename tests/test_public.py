"""The public surface fits on a page, and stays there."""

from types import ModuleType

import idap


def test_exported_names_are_sorted_and_are_all_that_the_root_exposes():
    named = ((name, getattr(idap, name)) for name in dir(idap))
    exposed = [name for name, value in named if name[0] != "_" and not isinstance(value, ModuleType)]
    assert list(idap.__all__) == sorted(exposed)
    assert len(idap.__all__) <= 40


def test_every_exported_name_says_what_it_is():
    assert [name for name in idap.__all__ if not getattr(idap, name).__doc__] == []
