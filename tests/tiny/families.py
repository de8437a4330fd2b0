"""A tiny random-weight base of each family's real classes, as a diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

from tests.tiny import TOKENIZER

DATA = Path(__file__).parents[1] / "data"

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "steps_offset": 1}
WORDS = ["<pad>", "</s>", "<unk>", "red", "green", "blue", "orange", "purple", "teal", "disc",
         ",", "flat", "number", *map(str, range(10))]
QWEN_WORDS = ["system", "user", "assistant", "Describe", "the", "image", "by", ":"]


def vae(channels: int = 4, levels: int = 3, **more: Any) -> AutoencoderKL:
    """f4: 32 px are 8 latent pixels."""
    return AutoencoderKL(
        block_out_channels=(*(8,) * (levels - 1), 16),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=channels,
        norm_num_groups=4, sample_size=8 * 2 ** (levels - 1), **more)


def clip(cls: Any = CLIPTextModel, width: int = 32) -> Any:
    return cls(CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, projection_dim=width, bos_token_id=49406, eos_token_id=49407))


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=pad)


def t5(width: int = 32) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=width, d_ff=64, d_kv=8,
                                   num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; an end mark, as T5 has it."""
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>", model_max_length=512)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Words, marks and line breaks, so that a request is cut in as many tokens as by Qwen's own."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*WORDS, "\n", *QWEN_WORDS, *marks]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\w\s]|\w+"), "removed", invert=True)
    made.add_special_tokens(marks)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|endoftext|>",
                                   unk_token="<unk>", model_max_length=2048)


def film_vae() -> AutoencoderKLQwenImage:
    """f4, of videos."""
    return AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=2,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.0, 2.0])


def unet(cross: int, **more: Any) -> UNet2DConditionModel:
    """Three levels of two layers, as SDXL's: names in files follow from them."""
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(8, 16, 16), attention_head_dim=4,
        norm_num_groups=4, cross_attention_dim=cross, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), **more)


def sd2() -> Any:
    return StableDiffusionPipeline(
        vae=vae(), unet=unet(32), text_encoder=clip(),
        tokenizer=clip_tokenizer("!"), safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(**SCHEDULE, prediction_type="v_prediction", clip_sample=False,
                                set_alpha_to_one=False), requires_safety_checker=False)


def sdxl() -> Any:
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer("!"),
        unet=unet(64, addition_embed_type="text_time",
                  addition_time_embed_dim=8, projection_class_embeddings_input_dim=80),
        scheduler=EulerDiscreteScheduler(**SCHEDULE))


def sd3() -> Any:
    return StableDiffusion3Pipeline(
        vae=vae(16, shift_factor=0.06, scaling_factor=1.5),
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2,
            attention_head_dim=8, num_attention_heads=4, joint_attention_dim=64,
            caption_projection_dim=32, pooled_projection_dim=56, pos_embed_max_size=24,
            dual_attention_layers=(0,), qk_norm="rms_norm"),
        text_encoder=clip(CLIPTextModelWithProjection), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, 24), tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=t5(64), tokenizer_3=word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def flux(guided: bool = True) -> Any:
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
               "base_image_seq_len": 256, "max_image_seq_len": 4096}
    return FluxPipeline(
        vae=vae(4, shift_factor=0.1, scaling_factor=0.36),
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            pooled_projection_dim=32, guidance_embeds=guided, axes_dims_rope=(4, 4, 8)),
        text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=t5(),
        tokenizer_2=word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**(dynamic if guided else {})))


def chroma() -> Any:
    return ChromaPipeline(
        vae=vae(4, shift_factor=0.1, scaling_factor=0.36),
        transformer=ChromaTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=16,
            approximator_layers=1),
        text_encoder=t5(), tokenizer=word_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With the chat template that was published with Qwen3."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = (DATA / "qwen3_chat.jinja").read_text("utf-8")
    return tokenizer


def zimage() -> Any:
    return ZImagePipeline(
        vae=vae(16, shift_factor=0.1, scaling_factor=0.36), tokenizer=chat_tokenizer(),
        transformer=ZImageTransformer2DModel(
            in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            cap_feat_dim=32, axes_dims=[8, 4, 4], axes_lens=[1024, 64, 64]),
        text_encoder=Qwen3Model(Qwen3Config(
            vocab_size=80, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0))


READER = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
          "num_key_value_heads": 1}
TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2,
         "out_hidden_size": 32}


def qwen() -> Any:
    read = {**READER, "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                "mrope_section": [2, 3, 3]}}
    return QwenImagePipeline(
        vae=film_vae(), tokenizer=qwen_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6)),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
            text_config=read, vision_config=TOWER | {"fullatt_block_indexes": [0]})),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
            max_image_seq_len=8192, shift_terminal=0.02))


def flux2() -> Any:
    batch_norm = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4,
        sample_size=32)
    batch_norm.bn.running_mean.uniform_(-0.3, 0.3)
    batch_norm.bn.running_var.uniform_(0.2, 2.0)
    return Flux2KleinPipeline(
        vae=batch_norm, tokenizer=chat_tokenizer(),
        transformer=Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=48, guidance_embeds=False,
            axes_dims_rope=(4, 4, 4, 4)),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(
            vocab_size=80, hidden_size=16, intermediate_size=16, num_hidden_layers=29,
            num_attention_heads=1, num_key_value_heads=1, head_dim=8)),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
            base_image_seq_len=256, max_image_seq_len=4096))


def krea2() -> Any:
    read = {**READER, "num_hidden_layers": 3, "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6,
                                "mrope_section": [2, 3, 3], "mrope_interleaved": True}}
    tower = TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Krea2Pipeline(
        vae=film_vae(), tokenizer=qwen_tokenizer(), text_encoder_select_layers=(1, 2),
        transformer=Krea2Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            num_key_value_heads=1, intermediate_size=48, timestep_embed_dim=16,
            text_hidden_dim=32, num_text_layers=2, text_num_attention_heads=2,
            text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6)),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=read, vision_config=tower)),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=6400))


def gemma() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16))


def lumina2() -> Any:
    """f8: its pipeline knows no other VAE."""
    return Lumina2Pipeline(
        vae=vae(16, 4, shift_factor=0.1, scaling_factor=0.36), tokenizer=word_tokenizer(),
        transformer=Lumina2Transformer2DModel(
            sample_size=8, hidden_size=48, num_layers=1, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 4, 4),
            axes_lens=(300, 64, 64), cap_feat_dim=32),
        text_encoder=gemma(), scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0))


def sana() -> Any:
    """f4. Its pipeline's list of sizes knows no smaller ones than those of 16 latent pixels."""
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    return SanaPipeline(
        vae=AutoencoderDC(
            latent_channels=8, attention_head_dim=4, encoder_block_types=blocks,
            decoder_block_types=blocks, encoder_block_out_channels=(8, 8, 16),
            decoder_block_out_channels=(8, 8, 16), encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)), downsample_block_type="conv",
            upsample_block_type="interpolate", scaling_factor=0.41),
        transformer=SanaTransformer2DModel(
            sample_size=8, in_channels=8, out_channels=8, num_layers=2, num_attention_heads=2,
            attention_head_dim=16, num_cross_attention_heads=2, cross_attention_head_dim=16,
            cross_attention_dim=32, caption_channels=32, qk_norm="rms_norm_across_heads"),
        text_encoder=gemma(), tokenizer=word_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0))


MADE: dict[str, Callable[[], Any]] = {"sd2": sd2, "sdxl": sdxl, "sd3": sd3, "flux": flux,
                                    "chroma": chroma, "zimage": zimage, "qwen": qwen,
                                    "flux2": flux2, "krea2": krea2, "lumina2": lumina2,
                                    "sana": sana}


def base(family: str, folder: Path) -> Path:
    torch.manual_seed(7)
    MADE[family]().save_pretrained(folder, safe_serialization=True)
    told = folder / "vae" / "config.json"
    config = json.loads(told.read_text("utf-8"))
    told.write_text(json.dumps({"sample_size": 32} | config), "utf-8")     # which some leave out
    return folder
