"""Small models of the transformers library, from configuration, with random weights and the heads people fine-tune."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.conformance import vision_operators
from tests.conformance.case import Case, Inputs, image

Make = Callable[[], Inputs]

VOCABULARY = 331
LABELS = {"num_labels": 10}
SHORT = {"vocab_size": VOCABULARY, "max_position_embeddings": 40}
STREAM = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 208}
GROUPED = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
PATCHES = {"image_size": 32, "patch_size": 8}
PAIR = {
    "d_model": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 208,
    "decoder_ffn_dim": 176,
}


def case(
    names: str, inputs: Make, contracts: tuple[str, ...] = ("logits",), notes: str = "", /, **options: Any
) -> Case:
    """One model.

    Args:
        names: the case, the model class and the configuration class, separated by spaces.
        inputs: makes the keyword inputs.
        contracts: the outputs to keep.
        notes: for the coverage table.
        options: arguments of the configuration; a function is called when the model is built.
    """
    name, model, config = names.split()

    def build() -> nn.Module:
        vision_operators.make_importable()
        import transformers

        settings = {key: value() if callable(value) else value for key, value in options.items()}
        module: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return module

    return Case(f"transformers:{name}", build, inputs, contracts, notes)


def tokens(vocabulary: int = VOCABULARY, length: int = 14) -> Tensor:
    """Random token numbers that avoid the first few, which are special."""
    return torch.randint(5, vocabulary, (2, length))


def text() -> Inputs:
    """Two sentences, the second one padded at its end."""
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, -3:] = 0
    return (), {"input_ids": tokens(), "attention_mask": mask}


def unmasked_text() -> Inputs:
    """Two sentences of the same length."""
    return (), {"input_ids": tokens()}


def translation() -> Inputs:
    """A source sentence and a target sentence of another length."""
    return (), {**text()[1], "decoder_input_ids": tokens(length=11)}


def pixels(size: int) -> Make:
    """Two images."""
    return lambda: ((), {"pixel_values": image(size)})


def captioned_images() -> Inputs:
    """Two images and two captions that end in the end-of-text token, where CLIP reads the text embedding."""
    sentences = tokens()
    sentences[:, -1] = VOCABULARY - 1
    return (), {"input_ids": sentences, "attention_mask": torch.ones_like(sentences), "pixel_values": image(32)}


def spectrogram() -> Inputs:
    """The spectrogram of some speech and the transcript so far."""
    return (), {"input_features": torch.randn(2, 20, 60), "decoder_input_ids": tokens(length=11)}


def waveform() -> Inputs:
    """The waveform of some speech."""
    return (), {"input_values": torch.randn(2, 1600)}


def _small_resnet() -> Any:
    import transformers

    return transformers.ResNetConfig(
        embedding_size=24,
        hidden_sizes=[40, 56, 72, 88],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )


CASES: tuple[Case, ...] = (
    case("bert BertForSequenceClassification BertConfig", text, **SHORT, **STREAM, **LABELS),
    case(
        "distilbert DistilBertForSequenceClassification DistilBertConfig",
        text,
        dim=96,
        n_layers=2,
        n_heads=6,
        hidden_dim=208,
        **SHORT,
        **LABELS,
    ),
    case(
        "roberta RobertaForMaskedLM RobertaConfig",
        text,
        ("logits",),
        "language-model head tied to the embedding; positions counted from the padding",
        **SHORT,
        **STREAM,
    ),
    case(
        "modernbert ModernBertForSequenceClassification ModernBertConfig",
        text,
        ("logits",),
        "fused qkv and fused gated MLP, rotary positions, local and global attention",
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=136,
        global_attn_every_n_layers=3,
        local_attention=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        **SHORT,
        **LABELS,
    ),
    case(
        "gpt2 GPT2LMHeadModel GPT2Config",
        text,
        ("logits",),
        "Conv1D weights are stored transposed; tied embedding",
        vocab_size=VOCABULARY,
        n_embd=96,
        n_layer=2,
        n_head=6,
        n_inner=208,
        n_positions=40,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    ),
    case(
        "t5 T5ForConditionalGeneration T5Config",
        translation,
        ("logits",),
        "relative position bias computed in the first layer and shared; tied embedding",
        vocab_size=VOCABULARY,
        d_model=96,
        d_kv=20,
        d_ff=208,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=6,
        use_cache=False,
    ),
    case("bart BartForConditionalGeneration BartConfig", translation, **SHORT, **PAIR, use_cache=False),
    case(
        "llama LlamaForCausalLM LlamaConfig",
        text,
        ("logits",),
        "grouped-query attention, 8 heads over 2",
        intermediate_size=224,
        use_cache=False,
        **SHORT,
        **GROUPED,
    ),
    case(
        "qwen2 Qwen2ForCausalLM Qwen2Config",
        text,
        ("logits",),
        "grouped-query attention, 6 heads over 3; tied embedding",
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
        **SHORT,
        **STREAM,
    ),
    case(
        "mixtral MixtralForCausalLM MixtralConfig",
        text,
        ("logits",),
        "experts_implementation='batched_mm'; 'eager' does not export",
        intermediate_size=88,
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation="batched_mm",
        use_cache=False,
        **SHORT,
        **GROUPED,
    ),
    case(
        "opt OPTForCausalLM OPTConfig",
        text,
        ("logits",),
        "embedding narrower than the stream, as in opt-350m",
        hidden_size=96,
        word_embed_proj_dim=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        ffn_dim=208,
        use_cache=False,
        **SHORT,
    ),
    case("vit ViTForImageClassification ViTConfig", pixels(32), **PATCHES, **STREAM, **LABELS),
    case(
        "swin SwinForImageClassification SwinConfig",
        pixels(64),
        image_size=64,
        patch_size=4,
        embed_dim=24,
        depths=[2, 2, 1],
        num_heads=[2, 4, 8],
        window_size=4,
        mlp_ratio=3.0,
        **LABELS,
    ),
    case(
        "convnextv2 ConvNextV2ForImageClassification ConvNextV2Config",
        pixels(64),
        ("logits",),
        "global response normalisation",
        hidden_sizes=[24, 40, 56, 72],
        depths=[1, 1, 2, 1],
        image_size=64,
        **LABELS,
    ),
    case(
        "segformer SegformerForSemanticSegmentation SegformerConfig",
        pixels(64),
        hidden_sizes=[16, 32, 48, 80],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 4, 8],
        sr_ratios=[8, 4, 2, 1],
        decoder_hidden_size=56,
        **LABELS,
    ),
    case(
        "detr DetrForObjectDetection DetrConfig",
        pixels(96),
        ("logits", "pred_boxes"),
        "backbone: the library's own ResNet, four basic blocks",
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=_small_resnet,
        num_queries=13,
        init_std=0.15,
        **PAIR,
        **LABELS,
    ),
    case(
        "yolos YolosForObjectDetection YolosConfig",
        pixels(32),
        ("logits", "pred_boxes"),
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=7,
        **STREAM,
        **LABELS,
    ),
    case(
        "clip CLIPModel CLIPConfig",
        captioned_images,
        ("logits_per_image", "logits_per_text"),
        "the joint embedding may shrink; keep text_embeds and image_embeds if it is used on its own",
        projection_dim=56,
        text_config=lambda: {
            **SHORT,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 144,
            "bos_token_id": 1,
            "eos_token_id": VOCABULARY - 1,
        },
        vision_config=lambda: {**STREAM, **PATCHES},
    ),
    case(
        "whisper WhisperForConditionalGeneration WhisperConfig",
        spectrogram,
        vocab_size=VOCABULARY,
        num_mel_bins=20,
        max_source_positions=30,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
        **PAIR,
    ),
    case(
        "wav2vec2 Wav2Vec2ForCTC Wav2Vec2Config",
        waveform,
        ("logits",),
        "grouped position convolution under weight_norm",
        vocab_size=37,
        conv_dim=(24, 40, 56),
        conv_stride=(5, 4, 4),
        conv_kernel=(10, 8, 4),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        **STREAM,
    ),
    case(
        "mamba MambaForCausalLM MambaConfig",
        unmasked_text,
        ("logits",),
        "the path without the fused kernels, whose scan is unrolled over the tokens",
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=112,
        state_size=11,
        time_step_rank=6,
        use_cache=False,
    ),
)
