"""A few of every kind of architecture, with the same proofs as `make conformance`."""

import importlib.util

import pytest

from tests.conformance.catalogue import CASES, case
from tests.conformance.proofs import examine
from tests.conformance.report import exact

REPRESENTATIVE = (
    "timm:test_vit_relpos",  # head width computed from the residual width
    "timm:resnest14d",  # code that takes another way by a size
    "timm:convnext_atto_rms",
    "timm:levit_128s",  # a cache of tensors in a plain attribute
    "timm:efficientvit_b0",
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:swin_t",
    "transformers:bert",
    "transformers:gpt2",
    "transformers:t5",
    "transformers:llama",
    "transformers:qwen2",
    "transformers:modernbert",  # rewritten with and without a mask
    "transformers:mixtral",
    "transformers:mamba",
    "diffusers:UNet2DModel",
    "written:dcgan_generator",
    "written:unet",
    "written:yolo_shuffle",
    "written:weight_norm",
    "written:lstm",
    "written:multihead_attention",
    "written:tied_embedding",
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other libraries, while they are imported
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_the_architecture_is_cut_exactly(name: str) -> None:
    for package in ("torchvision", "timm", "transformers", "diffusers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; make installs it")
    row = examine(case(name), most_blocks=3)
    assert not row.failure
    assert row.groups > 0 and row.prunable > 0.9 and row.removed > 0.2
    assert exact(vars(row)), row


def test_names_are_unique() -> None:
    assert len({known.name for known in CASES}) == len(CASES) == 234


@pytest.mark.filterwarnings("ignore")
def test_the_catalogue_holds_every_family_of_timm() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed; make installs it")
    modules = {timm.models._registry._model_to_module[c.name[5:]] for c in CASES if c.name.startswith("timm:")}
    assert modules == set(timm.list_modules())
