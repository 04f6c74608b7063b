"""The nets have the shapes, names and sizes they promise, and published weights reach their accuracy."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from idap.data.tensors import IMAGENET_MEAN, IMAGENET_STD, normalise, read_delta_images
from idap.models.nets import Attention, DigitsResNet, DigitsViT, SubsampledShortcut, cifar_resnet20, cifar_resnet56


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "shape", "outputs"),
    [
        (DigitsResNet(), (1, 8, 8), 10),
        (DigitsResNet(width=4, blocks=(1, 2), num_classes=3), (1, 8, 8), 3),
        (DigitsViT(), (1, 8, 8), 10),
        (DigitsViT(dim=16, depth=2, heads=2, mlp=24, patch=4, num_classes=3), (1, 8, 8), 3),
        (cifar_resnet20(), (3, 32, 32), 10),
    ],
    ids=["resnet", "small resnet", "vit", "small vit", "cifar resnet"],
)
def test_images_become_logits_and_every_parameter_learns(model, shape, outputs):
    torch.manual_seed(0)
    logits = model(torch.randn(3, *shape))
    assert logits.shape == (3, outputs)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_defaults_are_small():
    assert parameters(DigitsResNet()) == 174_970
    assert parameters(DigitsViT()) == 115_450


def test_attention_equals_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_attention_runs_with_a_head_less():
    attention = Attention(12, 3)
    attention.num_heads = 2
    attention.qkv, attention.proj = nn.Linear(12, 24), nn.Linear(8, 12)
    assert attention(torch.randn(2, 5, 12)).shape == (2, 5, 12)


def test_subsampled_shortcut_keeps_every_second_pixel_between_zeros():
    x = torch.arange(1.0, 33.0).reshape(1, 2, 4, 4)
    y = SubsampledShortcut(2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, (0, 3)].any()


@pytest.mark.parametrize(
    ("build", "name", "count"),
    [(cifar_resnet20, "cifar10_resnet20", 269_722), (cifar_resnet56, "cifar10_resnet56", 853_018)],
)
def test_published_weights_fit(build, name, count, real_data):
    model = build()
    model.load_state_dict(load_file(real_data / "weights" / f"{name}.safetensors"))
    assert parameters(model) == count


def test_published_resnet20_answers_915_of_the_first_1000_test_images(real_data):
    # The whole test set gives the published 9,173 of 10,000; a tenth of it is quick.
    images, labels = read_delta_images(real_data / "cifar10_test.npz")
    model = cifar_resnet20().eval()
    model.load_state_dict(load_file(real_data / "weights" / "cifar10_resnet20.safetensors"))
    with torch.no_grad():
        logits = model(normalise(images[:1000], mean=IMAGENET_MEAN, std=IMAGENET_STD))
    assert (logits.argmax(1) == labels[:1000]).sum() == 915
