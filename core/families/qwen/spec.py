"""Qwen-Image: what is known of it without loading it."""

from __future__ import annotations

from core.families.layer_names import Naming, Part
from core.families.spec import FamilySpec, Found, Shapes, VaeSigns
from core.families.targets import ALIASES, JOINT

SIDE = 1024                                 # px; the pipeline's, as the VAE's config has none
FF = tuple(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2"))

NAMING: Naming = (Part("transformer", "lora_unet", native="diffusion_model"),)


def recognize(shapes: Shapes) -> Found | None:
    if "txt_in.text_norm.weight" in shapes:
        return Found("qwen21")
    if "__index_timestep_zero__" in shapes:     # a mark in files of Edit's later versions
        return Found("qwen_edit")
    if "time_text_embed.addition_t_embedding.weight" in shapes:
        return Found("qwen_layered")
    fits = "txt_norm.weight" in shapes and "transformer_blocks.0.img_mod.1.weight" in shapes
    return Found("qwen", "qwen") if fits else None


SPEC = FamilySpec(
    id="qwen", title="Qwen-Image", native_size=SIDE, bucket_step=64,
    lora_presets={"attention": JOINT, "attention+ff": JOINT + FF,
                  "all-linear": (*JOINT, *FF, "img_mod.1", "txt_mod.1")},
    lora_aliases=ALIASES | {"fc1": FF[0], "fc2": FF[1]},
    base_version="qwen_image", architecture="qwen-image",
    implementation="https://github.com/QwenLM/Qwen-Image", cfg=4.0, lora_format="diffusers",
    model="QwenImage", short_title="Qwen-Image", file="denoiser", tokens=507, fp16=False,
    naming=NAMING, recognize=recognize, pipelines={"QwenImagePipeline": "qwen"},
    relatives={"QwenImageEditPipeline": "qwen_edit", "QwenImageEditPlusPipeline": "qwen_edit"},
    namesakes={("qwen", "edit"): "qwen_edit"},
    # qwen_image_vae.safetensors of ComfyUI's model lists
    vae=VaeSigns("Qwen-Image", (
        "a70580f0213e67967ee9c95f05bb400e8fb08307e017a924bf3441223e023d1f",),
        key="temperal_downsample"),
    lora_signs=(
        (r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)[._]", None),
        # Attention alone: a block beyond the last that Flux.1 has of them.
        (r"transformer_blocks[._](19|[2-5]\d)[._]attn[._](to|add)_[qkv].*(down|lora_A)", 3072)),
    metadata_names=("qwen_image", "qwen-image"),
    kohya_targets="attention+ff",
    trainer_names=("qwen", "qwenimage", "qwenimagelora"))
