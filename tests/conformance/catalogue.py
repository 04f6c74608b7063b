"""Every architecture that must work."""

from tests.conformance import diffusers_models, timm_models, torchvision_models, transformers_models, written
from tests.conformance.case import Case

CASES: tuple[Case, ...] = (
    *timm_models.CASES,
    *torchvision_models.CASES,
    *transformers_models.CASES,
    *diffusers_models.CASES,
    *written.CASES,
)


def case(name: str) -> Case:
    """The architecture of this name."""
    return next(known for known in CASES if known.name == name)
