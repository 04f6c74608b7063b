"""The smallest model of each of timm's families (`timm.list_modules()`)."""

from functools import partial

from torch import nn

from tests.conformance import vision_operators
from tests.conformance.case import Case, Inputs, image

SMALLEST = """
test_vit_relpos starnet_s050 dla46x_c mobilenetv3_small_050 mobilevit_xxs edgenext_xx_small ese_vovnet19b_slim_dw
mnasnet_small repghostnet_050 efficientvit_m0 ghostnet_050 cspnext_tiny iformer_t xcit_nano_12_p8_224 efficientvit_b0
swiftformer_xs efficientformerv2_s0 pvt_v2_b0 convnext_atto_rms fasternet_t0 lcnetv2_small inception_next_atto
cs3darknet_focus_s rexnet_100 mobileone_s1 pit_ti_224 hardcorenas_b fastvit_t8 repvit_m1 regnetx_004_tv coat_tiny
convit_tiny deit_tiny_patch16_224 vit_tiny_patch16_224 gmlp_ti16_224 hgnetv2_b0 shvit_s1 vit_tiny_r_s16_p8_224
nf_regnet_b0 cpubone_nano efficientvim_m1 vit_tiny_patch16_dinov3_qkvb mambaout_femto levit_128s densenet121
crossvit_tiny_240 dpn48b maxvit_pico_rw_256 visformer_tiny resnest14d resnetv2_18 resnet18 legacy_seresnet18
poolformer_s12 cait_xxs24_224 skresnet18 gcvit_xxtiny tiny_vit_5m_224 efficientformer_l1 hrnet_w18_small lowformer_b0
botnet26t_256 nest_tiny convmixer_768_32 vitamin_small_224 tnt_s_legacy_patch16_224 rdnet_tiny twins_svt_small
mvitv2_tiny res2net50_14w_8s volo_d1_224 sequencer2d_s hiera_tiny_224 swin_tiny_patch4_window7_224
swinv2_cr_tiny_224 davit_tiny focalnet_tiny_srf selecsls42 tresnet_m nextvit_small swinv2_tiny_window8_256
legacy_xception inception_v3 xception41p csatv2 inception_v4 samvit_base_patch16_224 beit_base_patch16_224
inception_resnet_v2 mobilenetv5_base vgg11 pnasnet5large nasnetalarge naflexvit_base_patch16_gap sam2_hiera_tiny
qwen3_vit_88m deepseek_vit_412m gemma4_vit_167m
"""

ANY_SIZE = ("gemma4_vit_167m", "qwen3_vit_88m")


def _build(name: str) -> nn.Module:
    vision_operators.make_importable()
    import timm

    model: nn.Module = timm.create_model(name)
    return model


def _inputs(name: str) -> Inputs:
    vision_operators.make_importable()
    import timm

    if name in ANY_SIZE:  # 768 pixels by default: 2,304 tokens
        return (image(192),), {}
    size: tuple[int, int, int] = timm.get_pretrained_cfg(name).input_size
    return (image(size[-1], size[0]),), {}


CASES = tuple(Case(f"timm:{name}", partial(_build, name), partial(_inputs, name)) for name in SMALLEST.split())
