"""Stable Diffusion 3 and 3.5: what is known of it without loading it."""

from __future__ import annotations

from core.families.layer_names import Naming, Part, Rename, clip_part, dit_part, fused, renames
from core.families.spec import DistilledSigns, FamilySpec, Found, Shapes, VaeSigns, starts
from core.families.targets import ALIASES, JOINT, JOINT_FF

BLOCK, THEIR_BLOCK = "transformer_blocks.{}.", "joint_blocks.{}."
RENAMES = (
    fused(f"{BLOCK}attn.to_*", f"{THEIR_BLOCK}x_block.attn.qkv"),
    fused(f"{BLOCK}attn2.to_*", f"{THEIR_BLOCK}x_block.attn2.qkv"),
    fused(f"{BLOCK}attn.add_*_proj", f"{THEIR_BLOCK}context_block.attn.qkv"),
    *renames((
        ("attn.to_out.0", "x_block.attn.proj"), ("attn2.to_out.0", "x_block.attn2.proj"),
        ("attn.to_add_out", "context_block.attn.proj"),
        ("attn.norm_q", "x_block.attn.ln_q"), ("attn.norm_k", "x_block.attn.ln_k"),
        ("attn2.norm_q", "x_block.attn2.ln_q"), ("attn2.norm_k", "x_block.attn2.ln_k"),
        ("attn.norm_added_q", "context_block.attn.ln_q"),
        ("attn.norm_added_k", "context_block.attn.ln_k"),
        ("ff.net.0.proj", "x_block.mlp.fc1"), ("ff.net.2", "x_block.mlp.fc2"),
        ("ff_context.net.0.proj", "context_block.mlp.fc1"),
        ("ff_context.net.2", "context_block.mlp.fc2"),
        ("norm1.linear", "x_block.adaLN_modulation.1"),
        ("norm1_context.linear", "context_block.adaLN_modulation.1")), BLOCK, THEIR_BLOCK),
    *renames((
        ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        ("pos_embed.proj", "x_embedder.proj"), ("proj_out", "final_layer.linear"))),
    Rename(("norm_out.linear",), "final_layer.adaLN_modulation.1", swapped=True))
NAMING: Naming = (
    dit_part(RENAMES),
    clip_part("text_encoder", "lora_te1", "clip_l"),
    clip_part("text_encoder_2", "lora_te2", "clip_g"),
    Part("text_encoder_3", "lora_te3", native="text_encoders.t5xxl.transformer"),
)


def recognize(shapes: Shapes) -> Found | None:
    diffusers = {"pos_embed.proj.weight", "transformer_blocks.0.norm1_context.linear.weight"}
    fits = diffusers <= shapes.keys() or starts("joint_blocks.0.")(shapes)
    return Found("sd3", "sd3") if fits else None


SPEC = FamilySpec(
    id="sd3", title="Stable Diffusion 3 / 3.5", native_size=1024, bucket_step=64,
    lora_presets={"attention": JOINT, "attention+ff": JOINT + JOINT_FF,
                  "all-linear": (*JOINT, *JOINT_FF, "context_embedder")},
    lora_aliases=ALIASES, base_version="sd3", architecture="stable-diffusion-3-medium",
    implementation="https://github.com/Stability-AI/sd3-ref",
    encoders=("text_encoder", "text_encoder_2", "text_encoder_3"), cfg=4.5, lora_format="diffusers",
    model="StableDiffusion3", short_title="SD 3", file="denoiser", tokens=255,
    naming=NAMING, recognize=recognize, pipelines={"StableDiffusion3Pipeline": "sd3"},
    distilled=DistilledSigns(steps=4),
    # SD 3.5's in the original names, SD 3's in diffusers'
    vae=VaeSigns("Stable Diffusion 3", (
        "6ad8546282f0f74d6a1184585f1c9fe6f1509f38f284e7c4f7ed578554209859",
        "f9b67a279283625caee39d61eacb5324243848477b4eb535355eaaa8423d4e09"), scale=1.5305),
    lora_signs=(
        (r"joint_blocks", None),
        *((r"(^|\.)transformer_blocks[._]\d+[._](attn2?|ff(_context)?)[._].*(down|lora_A)", width)
          for width in (1536, 2432))),
    metadata_names=("sd3", "stable-diffusion-3"),
    kohya_targets=(*JOINT, *JOINT_FF, "norm1.linear", "norm1_context.linear"),
    trainer_names=("sd3", "sd3lora", "stablediffusion3", "stablediffusion35"))
