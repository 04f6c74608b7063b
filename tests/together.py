"""Run a function in two processes at once: this one and another."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

PATIENCE = timedelta(seconds=120)


def in_two(work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Call a function of a test module in two gloo processes; give what it returned, or raised, in each."""
    code = (
        "import pickle, sys, tests.conftest; from tests.together import taking_part; "
        f"from {work.__module__} import {work.__name__} as work; "
        f"args = pickle.load(open({str(folder / 'args')!r}, 'rb')); "
        f"found = taking_part(1, {str(folder)!r}, work, args); "
        f"pickle.dump(found, open({str(folder / 'other')!r}, 'wb'))"
    )
    with (folder / "args").open("wb") as file:
        pickle.dump(args, file)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as other:
        mine = taking_part(0, str(folder), work, args)
        assert other.wait(PATIENCE.seconds) == 0
    with (folder / "other").open("rb") as file:
        return [mine, pickle.load(file)]


def taking_part(rank: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=PATIENCE
    )
    try:
        return work(*args)
    except Exception as error:
        return error
    finally:
        torch.distributed.destroy_process_group()
