"""Models remember by which plan they came from their original, so that what is compressed again saves one plan."""

from torch import nn

from idap.errors import PlanError
from idap.structure.chain import check_follows
from idap.structure.plan import Plan

_NAME = "_idap_plan"


def origin(model: nn.Module) -> Plan | None:
    """The plan that led from the original to a model that `load` or `compress` returned.

    It is an attribute of the model: copies of the model have it, its state dict does not.

    Returns:
        None for any other model.
    """
    found = vars(model).get(_NAME)
    return found if isinstance(found, Plan) else None


def remember_(model: nn.Module, plan: Plan) -> None:
    """Let a model remember the plan that led to it from its original."""
    vars(model)[_NAME] = plan


def forget_(model: nn.Module) -> None:
    """Make a model an original of its own, such as one that was given another head after it was loaded."""
    vars(model).pop(_NAME, None)


def checked_origin(model: nn.Module, plan: Plan) -> Plan | None:
    """The plan that a model remembers, if plans for the model can follow it.

    Args:
        model: that is to be compressed.
        plan: any plan for it.

    Raises:
        PlanError: the model was changed since it was loaded; names the first tensor.
    """
    found = origin(model)
    try:
        if found is not None:
            check_follows(found, plan)
    except PlanError as error:
        raise PlanError(
            f"the model was made by idap.load or compress and changed since: {error}. If what it is now shall count as "
            "the original, call idap.saving.origin.forget_(model) first; plan.json will then be one for this model."
        ) from error
    return found
