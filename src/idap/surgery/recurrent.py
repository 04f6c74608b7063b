"""Recurrent layers: torch's kernels read their weights without checking the shapes, so a plan is checked for them."""

from torch import nn

from idap.errors import PlanError
from idap.structure.plan import Plan


def check_recurrent(model: nn.Module, plan: Plan) -> None:
    """Check that the weights of each recurrent layer fit each other, and its sizes, after a cut.

    Args:
        model: before the cut.
        plan: that fits the tensors of the model otherwise.

    Raises:
        PlanError: names the first weight whose shape is another than the layer's sizes make it.
    """
    for path, module in model.named_modules():
        if not isinstance(module, nn.RNNBase) or plan.removes(path):
            continue
        sizes = {name: getattr(module, name) for name in ("input_size", "hidden_size", "num_layers", "proj_size")}
        sizes |= {name: value for name, value in plan.attributes.get(path, {}).items() if name in sizes}
        directions = 2 if module.bidirectional else 1
        written = sizes["proj_size"] or sizes["hidden_size"]
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1) * sizes["hidden_size"]
        for layer in range(sizes["num_layers"]):
            for suffix in ("", "_reverse")[:directions]:
                read = sizes["input_size"] if layer == 0 else written * directions
                wanted = {"weight_ih": (gates, read), "weight_hh": (gates, written), "weight_hr": (written, gates // 4)}
                for name, shape in ({**wanted, "bias_ih": (gates,), "bias_hh": (gates,)}).items():
                    _check_shape(module, plan, f"{path}.{name}_l{layer}{suffix}".removeprefix("."), shape)


def _check_shape(module: nn.RNNBase, plan: Plan, name: str, wanted: tuple[int, ...]) -> None:
    held = getattr(module, name.rpartition(".")[2], None)
    if held is None:
        return
    kept = plan.tensors.get(plan.aliases.get(name, name), {})
    found = tuple(len(kept[dim]) if dim in kept else size for dim, size in enumerate(held.shape))
    if found != wanted:
        raise PlanError(
            f"the plan makes {name!r} {found}, and the sizes of that recurrent layer make it {wanted}; a plan that "
            "idap wrote cuts them together"
        )
