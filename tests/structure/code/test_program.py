"""A module's code as data: what survives JSON, and what is no code."""

import json
from typing import Any

import pytest

from idap.errors import PlanError
from idap.structure.code.program import Instruction, Program, Routine

ROUTINE = Routine(
    args=(("value", 0), ("list", ("value", 1), None)),
    kwargs=(("mask", None), ("sizes", ("tuple", ("value", 2), 3))),
    steps=(
        Instruction("", "mlp.0", (("value", 0),), (), (((), 3),)),
        Instruction(
            "torch.Tensor.view",
            "",
            (("value", 3), ("calc", "*", ("size", ("value", 0), 1), 4), -1),
            (),
            (((), 4),),
        ),
        Instruction("torch.max", "", (("value", 4),), (("dim", 1), ("keepdim", True)), ((("values",), 5), ((1,), 6))),
    ),
    output=("dict", ("logits", ("value", 5)), ("scale", ("own", "scale")), ("big", ("float", "inf"))),
)
PROGRAM = Program((ROUTINE, Routine((), (), (), None)))


def test_a_program_survives_json() -> None:
    again = Program.from_json(json.loads(json.dumps(PROGRAM.to_json())))
    assert again == PROGRAM and hash(again) == hash(PROGRAM)
    assert again.routines[0].steps[2].kwargs[1] == ("keepdim", True) and again.routines[1].output is None


@pytest.mark.parametrize("part", ["args", "kwargs", "steps", "output"])
def test_each_part_is_needed(part: str) -> None:
    data = json.loads(json.dumps(PROGRAM.to_json()))
    del data[1][part]
    with pytest.raises(PlanError, match=rf"this is not the code of a module: KeyError: '{part}'"):
        Program.from_json(data)


@pytest.mark.parametrize("data", [None, 3, [None], [3], [{"args": [], "kwargs": [], "output": None, "steps": 3}]])
def test_what_is_not_a_program_is_refused(data: Any) -> None:
    with pytest.raises(PlanError, match="this is not the code of a module: TypeError"):
        Program.from_json(data)


@pytest.mark.parametrize("step", [[], ["torch.relu"], ["torch.relu", "", [], [], [], []], None])
def test_a_step_has_five_parts(step: Any) -> None:
    data = json.loads(json.dumps(PROGRAM.to_json()))
    data[0]["steps"][0] = step
    with pytest.raises(PlanError, match="this is not the code of a module"):
        Program.from_json(data)
