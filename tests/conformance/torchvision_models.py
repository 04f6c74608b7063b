"""Every classifier of torchvision, its segmenters, and the networks inside its detectors, with random weights."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from tests.conformance import vision_operators
from tests.conformance.case import Case, Inputs, image

CLASSIFIERS = """
alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169 densenet201
efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6
efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf
regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf regnet_y_128gf regnet_y_16gf regnet_y_1_6gf
regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50
resnext101_32x8d resnext101_64x4d resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5
shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn vgg13
vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2 wide_resnet50_2
"""
"""Names of `torchvision.models.list_models(module=torchvision.models)` of torchvision 0.28."""

SEGMENTERS: tuple[str, ...] = (
    "fcn_resnet50",
    "deeplabv3_resnet50",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)

LARGE = ("convnext_large", "regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32")
"""More than 150 million parameters."""

SIZES = {"inception_v3": 80, "maxvit_t": 224, "vit_h_14": 70}
"""Image sizes of the models that don't take 64 pixels."""

OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "vit_b_16": {"image_size": 64},
    "vit_b_32": {"image_size": 64},
    "vit_h_14": {"image_size": 70},
    "vit_l_16": {"image_size": 64},
    "vit_l_32": {"image_size": 64},
}

NOTES = {
    "googlenet": "the auxiliary classifiers are built, and not run in eval mode",
    "inception_v3": "the auxiliary classifier is built, and not run in eval mode",
    **dict.fromkeys(LARGE, "large"),
}


class TwoStage(nn.Module):
    """The networks of Faster R-CNN, without the proposals and the pooling between them.

    The feature maps are returned too: pooling takes them to the box head, so their width must stay.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor, pooled: Tensor) -> dict[str, Any]:
        """Run the backbone and the proposal head on images, and the box head on pooled features."""
        maps: OrderedDict[str, Tensor] = self.detector.backbone(images)
        features = list(maps.values())
        objectness, proposals = self.detector.rpn.head(features)
        scores, boxes = self.detector.roi_heads.box_predictor(self.detector.roi_heads.box_head(pooled))
        return {
            "features": features,
            "objectness": objectness,
            "proposals": proposals,
            "scores": scores,
            "boxes": boxes,
        }


class OneStage(nn.Module):
    """The networks of RetinaNet or SSD, without the anchors and the selection of boxes."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Run the backbone and the heads on images."""
        heads: dict[str, Tensor] = self.detector.head(list(self.detector.backbone(images).values()))
        return heads


def _torchvision() -> Any:
    vision_operators.make_importable()
    import torchvision

    return torchvision


def classifier(name: str) -> Case:
    """The named classification model."""

    def build() -> nn.Module:
        module: nn.Module = _torchvision().models.get_model(name, weights=None, **OPTIONS.get(name, {}))
        return module

    def inputs() -> Inputs:
        return (image(SIZES.get(name, 64)),), {}

    return Case(f"torchvision:{name}", build, inputs, notes=NOTES.get(name, ""))


def segmenter(name: str) -> Case:
    """The named segmentation model, which returns a dictionary."""

    def build() -> nn.Module:
        models = _torchvision().models
        module: nn.Module = models.get_model(name, weights=None, weights_backbone=None, num_classes=11)
        return module

    def inputs() -> Inputs:
        return (image(96),), {}

    return Case(f"torchvision:{name}", build, inputs, ("out",))


def detector(name: str, wrapper: type[nn.Module]) -> Case:
    """The networks of the named detection model."""

    def build() -> nn.Module:
        models = _torchvision().models
        return wrapper(models.get_model(name, weights=None, weights_backbone=None, num_classes=11))

    def inputs() -> Inputs:
        if wrapper is TwoStage:
            return (image(96), torch.randn(5, 256, 7, 7)), {}
        return (image(96),), {}

    return Case(f"torchvision:{name}", build, inputs, notes="backbone and heads, without the post-processing")


CASES: tuple[Case, ...] = (
    *(classifier(name) for name in CLASSIFIERS.split()),
    *(segmenter(name) for name in SEGMENTERS),
    detector("fasterrcnn_resnet50_fpn", TwoStage),
    detector("fasterrcnn_mobilenet_v3_large_fpn", TwoStage),
    detector("retinanet_resnet50_fpn", OneStage),
    detector("ssdlite320_mobilenet_v3_large", OneStage),
)
