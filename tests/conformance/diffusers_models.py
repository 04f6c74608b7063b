"""Small models of the diffusers library, from configuration, with random weights."""

from typing import Any

import torch
from torch import nn

from tests.conformance import vision_operators
from tests.conformance.case import Case, Inputs, image


def _diffusers() -> Any:
    vision_operators.make_importable()
    import diffusers

    return diffusers


def _steps() -> torch.Tensor:
    return torch.tensor([17, 431])


def _unet() -> nn.Module:
    module: nn.Module = _diffusers().UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 48, 80),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=12,
        norm_num_groups=8,
    )
    return module


def _unet_inputs() -> Inputs:
    return (), {"sample": image(16), "timestep": _steps()}


def _conditional_unet() -> nn.Module:
    module: nn.Module = _diffusers().UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 48, 80),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=72,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return module


def _conditional_unet_inputs() -> Inputs:
    return (), {"sample": image(16, channels=4), "timestep": _steps(), "encoder_hidden_states": torch.randn(2, 9, 72)}


def _vq() -> nn.Module:
    module: nn.Module = _diffusers().VQModel(
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 48),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=6,
        num_vq_embeddings=37,
        norm_num_groups=8,
    )
    return module


def _autoencoder() -> nn.Module:
    module: nn.Module = _diffusers().AutoencoderKL(
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 48),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=6,
        norm_num_groups=8,
    )
    return module


def _autoencoder_inputs() -> Inputs:
    return (), {"sample": image(32)}


def _transformer() -> nn.Module:
    module: nn.Module = _diffusers().DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=20,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=50,
        norm_num_groups=8,
    )
    return module


def _transformer_inputs() -> Inputs:
    return (), {
        "hidden_states": image(16, channels=4),
        "timestep": _steps(),
        "class_labels": torch.tensor([3, 41]),
    }


CASES: tuple[Case, ...] = (
    Case("diffusers:UNet2DModel", _unet, _unet_inputs, ("sample",)),
    Case("diffusers:UNet2DConditionModel", _conditional_unet, _conditional_unet_inputs, ("sample",)),
    Case("diffusers:VQModel", _vq, _autoencoder_inputs, ("sample",)),
    Case("diffusers:AutoencoderKL", _autoencoder, _autoencoder_inputs, ("sample",)),
    Case("diffusers:DiTTransformer2DModel", _transformer, _transformer_inputs, ("sample",)),
)
