"""What all tests share."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.conformance.vision_operators import make_importable

collect_ignore = ["typed_user.py"]  # read by mypy, not run

if importlib.util.find_spec("torchvision") is not None:
    make_importable()  # torchmetrics imports torchvision where it is installed

# Several test processes run side by side; more threads than cores would only slow them down.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Find the folder of real data sets and weights, or skip."""
    named = os.environ.get("IDAP_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is missing; set IDAP_DATA to the folder that holds it")
    return folder


# The same examples in every run: a change that is green here is green elsewhere.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def state_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The key of the user is none of the tests' business; they have one of their own, also in processes they start."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True, scope="module")
def fused_attention_as_it_was():
    """Benchmark scripts own their process and may switch what belongs to all of it; tests put that back."""
    fused = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(fused)
