"""Settings of a training: what they allow, what they refuse, and that recipes know them."""

import math

import pytest

from idap.errors import ConfigError
from idap.recipes.recipe import make_recipe
from idap.training.recovery import Recovery


@pytest.mark.parametrize(
    ("setting", "trains"),
    [
        ({}, True),
        ({"epochs": 0}, False),
        ({"epochs": 0, "steps": 3}, True),
        ({"steps": 0}, False),
        ({"epochs": 0, "minutes": 0.1}, True),
        ({"minutes": 0.0}, False),
    ],
)
def test_steps_and_minutes_win_over_epochs(setting, trains):
    assert Recovery(**setting).trains is trains


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"steps": 1, "minutes": 2.0}, "steps=1 and minutes=2 are both given; give only one"),
        ({"steps": -1}, "steps must be 0 or more and finite, got -1"),
        ({"epochs": "1"}, "epochs must be a number, got '1'"),
        ({"epochs": None}, "epochs must be a number, got None"),
        ({"average": "no"}, "average must be True or False, got 'no'"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"seed": 2**70}, "seed must fit into 64 bits, got 1180591620717411303424"),
        ({"steps": 1.5}, "steps must be a whole number or None, got 1.5"),
        ({"minutes": math.inf}, "minutes must be 0 or more and finite, got inf"),
        ({"precision": "fp16"}, "precision must be 'auto', 'float32' or 'bf16', got 'fp16'"),
        ({"channels_last": "yes"}, "channels_last must be 'auto', True or False, got 'yes'"),
        ({"features": -1.0}, "features must be 0 or more and finite, got -1"),
        ({"features": 1.0, "compile": True}, "compile and features exclude each other"),
        ({"norm_batches": -1}, "norm_batches must be 0 or more and finite, got -1"),
    ],
)
def test_settings_are_checked(setting, expected):
    with pytest.raises(ConfigError, match=expected):
        Recovery(**setting)


def recipe(**recovery):
    return make_recipe(
        {
            "model": {"build": "idap:digits_vit"},
            "data": {"name": "digits"},
            "goals": {"macs": 0.5},
            "recovery": recovery,
        },
        "here",
    )


def test_recipes_know_every_setting():
    written = {
        "steps": 100,
        "minutes": "none",
        "precision": "bf16",
        "channels_last": False,
        "compile": False,
        "features": 0.5,
        "norm_batches": 10,
    }
    expected = Recovery(steps=100, precision="bf16", channels_last=False, features=0.5, norm_batches=10)
    assert recipe(**written).config().recovery == expected
    assert recipe(minutes=1, channels_last="auto").config().recovery == Recovery(minutes=1)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("precision", "half", "recovery.precision is the text 'half', expected 'auto', 'float32' or 'bf16'"),
        ("steps", 1.5, "recovery.steps is the number 1.5, expected a whole number"),
        ("channels_last", 2, "recovery.channels_last"),
    ],
)
def test_recipes_refuse_what_is_no_value(key, value, expected):
    with pytest.raises(ConfigError, match=expected):
        recipe(**{key: value})
