"""What the end of a run says of how its original is built."""

import pytest

from idap.compress.outcome import _build


@pytest.mark.parametrize(
    ("recipe", "call"),
    [
        ({}, None),
        ({"model": {"build": "idap:digits_vit"}}, "idap.models.resolve.build_model('idap:digits_vit')"),
        (
            {"model": {"build": "torchvision:resnet18", "classes": 3}, "data": {"name": "imagefolder"}},
            "idap.models.resolve.build_model('torchvision:resnet18', classes=3)",
        ),
        (
            {"model": {"build": "hf:bert"}, "task": {"build": "python:a.py:task"}},
            "idap.models.resolve.build_model('hf:bert')",
        ),
        ({"model": {"build": "hf:bert", "classes": 2}, "data": {"name": "csv"}}, None),  # the head is not in the recipe
    ],
)
def test_the_call_builds_what_the_recipe_built(recipe, call):
    assert _build(recipe) == call
