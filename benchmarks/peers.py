"""How important Torch-Pruning, with its own code, takes the inner channels of CIFAR ResNets to be.

scores = importance("taylor", subject, structure, batches)   # group name of idap -> one number per channel

The inner channels are those between the two convolutions of a block. Torch-Pruning misreads the parameter-free
shortcuts of these networks, which subsample and pad, so nothing else of them can be compared. Needs the extra bench.

Its criteria are taken with their defaults: the scores that the tensors of a group give a channel are averaged, then
divided by their mean over the group's channels, which is what lets it rank globally. Where 1.6.1 fails:

    obdc           its own preparation stops with an error on a network without attention; the same hooks are set here
    hessian        as it is: the squared gradient of each sample overwrites that of the one before, the last one stays
    hessian_mean   the same formula on the mean over the samples, which is what its documentation describes
    activation     each forward pass overwrites the one before; here one pass holds all the images
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.subjects import Batch, Subject
from idap.structure.analysis import Structure

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_pruning
    from torch_pruning import importance as theirs

Scorer = Callable[[Any], Tensor]
Prepare = Callable[[nn.Module, Subject, Sequence[Batch]], Scorer]

LAYERS = ("conv1", "bn1", "conv2")
"""What holds the inner channels of a block."""


def inner_groups(model: nn.Module, structure: Structure) -> dict[str, str]:
    """Match blocks with groups.

    Args:
        model: a `CifarResNet`, or another network of blocks with `conv1`, `bn1` and `conv2`.
        structure: of that model.

    Returns:
        Path of a block -> name of the group of channels whose first writer is the block's `conv1`.

    Raises:
        LookupError: there is no such group, or it isn't all output channels of `conv1` and no others.
    """
    found = {}
    for path, block in _blocks(model):
        weight = f"{path}.conv1.weight"
        groups = [group for group in structure.groups if group.writers and group.writers[0].weight == weight]
        if [(group.size, len(group.writers)) for group in groups] != [(block.conv1.out_channels, 1)]:
            raise LookupError(f"the channels that {weight} writes are not one group, but {groups}.")
        found[path] = groups[0].name
    return found


def importance(
    criterion: str, subject: Subject, structure: Structure, batches: Sequence[Batch], *, seed: int = 0
) -> dict[str, Tensor]:
    """Score the inner channels by one criterion of Torch-Pruning.

    Args:
        criterion: one of CRITERIA.
        subject: a ResNet for CIFAR; its model is copied.
        structure: of the subject's model.
        batches: calibration batches; a criterion that needs data sees each of them once, in eval mode.
        seed: of what is drawn: the scores of "random", the labels of "obdc".

    Returns:
        Group name -> scores, float64 of shape (group.size,); higher is more important.

    Raises:
        LookupError: Torch-Pruning and idap don't mean the same channels.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"there is no criterion {criterion!r}; criteria are {', '.join(CRITERIA)}.")
    groups = inner_groups(subject.model, structure)
    model = copy.deepcopy(subject.model).eval().requires_grad_(True)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=subject.example()[0])
        model.zero_grad()
        scorer = CRITERIA[criterion](model, subject, batches)
        return {name: _scored(scorer, graph, model.get_submodule(path)) for path, name in groups.items()}


def _blocks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, part in model.named_modules():
        if all(hasattr(part, name) for name in LAYERS):
            yield path, part


def _scored(scorer: Scorer, graph: Any, block: Any) -> Tensor:
    """Score all output channels of a block's first convolution, and check that nothing else is taken with them."""
    channels = list(range(block.conv1.out_channels))
    group = graph.get_pruning_group(block.conv1, torch_pruning.prune_conv_out_channels, idxs=channels)
    layers = {item.dep.layer for item in group if isinstance(item.dep.layer, nn.Conv2d | nn.BatchNorm2d | nn.Linear)}
    if layers != {getattr(block, name) for name in LAYERS}:
        raise LookupError(f"Torch-Pruning cuts other layers with {block.conv1}:\n{group}")
    scores = scorer(group).detach().double()
    if scores.shape != (len(channels),) or not bool(scores.isfinite().all()):
        raise LookupError(f"Torch-Pruning scores {len(channels)} channels as {scores}.")
    return scores


def _plain(build: Callable[[], Scorer]) -> Prepare:
    """A criterion that looks at nothing but weights."""
    return lambda _model, _subject, _batches: build()


def _with_gradient(build: Callable[[], Scorer]) -> Prepare:
    """A criterion that reads the gradient of the loss, which adds up over the batches."""

    def prepare(model: nn.Module, subject: Subject, batches: Sequence[Batch]) -> Scorer:
        for batch in batches:
            subject.loss(subject.run(model, batch), batch).backward()
        return build()

    return prepare


def _hessian(model: nn.Module, subject: Subject, batches: Sequence[Batch]) -> Scorer:
    """As documented: one backward pass per sample, of each of which the criterion is told."""
    scorer = theirs.HessianImportance()
    for _ in _each_gradient(model, subject, batches):
        scorer.accumulate_grad(model)
    return scorer


def _hessian_mean(model: nn.Module, subject: Subject, batches: Sequence[Batch]) -> Scorer:
    """The criterion reads `grad` as squared gradients unless it was told of samples."""
    squares = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
    count = 0
    for _ in _each_gradient(model, subject, batches):
        count += 1
        for parameter, square in squares.items():
            square.addcmul_(parameter.grad, parameter.grad)
    for parameter, square in squares.items():
        parameter.grad = square / count
    return theirs.HessianImportance()


def _each_gradient(model: nn.Module, subject: Subject, batches: Sequence[Batch]) -> Iterator[None]:
    """Set `grad` to the gradient of one sample after the other."""
    for images, labels in batches:
        for sample in zip(images.split(1), labels.split(1), strict=True):
            model.zero_grad()
            subject.loss(subject.run(model, sample), sample).backward()
            yield


def _obdc(model: nn.Module, subject: Subject, batches: Sequence[Batch]) -> Scorer:
    """As in its examples: the Fisher information of labels drawn from the model's own predictions."""
    scorer = theirs.OBDCImportance(num_classes=subject.run(model, batches[0]).shape[1])
    scorer.modules = [getattr(block, name) for _, block in _blocks(model) for name in ("conv1", "conv2")]
    for layer in scorer.modules:
        layer.register_forward_pre_hook(scorer._save_input)
        layer.register_full_backward_hook(scorer._save_grad_output)
    for images, _ in batches:
        outputs = subject.run(model, (images,))
        drawn = torch.multinomial(outputs.detach().softmax(1), 1)[:, 0]
        subject.loss(outputs, (images, drawn)).backward()
        scorer.step()
    scorer._rm_hooks(model)
    return scorer


def _activation(model: nn.Module, subject: Subject, batches: Sequence[Batch]) -> Scorer:
    """The mean absolute value of what each convolution is given."""
    scorer = theirs.ActivationImportance()
    everything = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad(), scorer.compute_importance(model):
        subject.run(model, everything)
    return scorer


CRITERIA: dict[str, Prepare] = {
    "random": _plain(theirs.RandomImportance),
    "magnitude_l1": _plain(lambda: theirs.MagnitudeImportance(p=1)),
    "magnitude_l2": _plain(lambda: theirs.MagnitudeImportance(p=2)),
    "bn_scale": _plain(theirs.BNScaleImportance),
    "lamp": _plain(theirs.LAMPImportance),
    "fpgm": _plain(theirs.FPGMImportance),
    "activation": _activation,
    "taylor": _with_gradient(theirs.TaylorImportance),
    "taylor_multivariable": _with_gradient(lambda: theirs.TaylorImportance(multivariable=True)),
    "hessian": _hessian,
    "hessian_mean": _hessian_mean,
    "obdc": _obdc,
}
"""Name -> what readies a criterion, on a copy of the model that it may change."""
