"""Flux.1 dev and schnell: what is known of it without loading it."""

from __future__ import annotations

from pathlib import Path

from core.families.layer_names import Naming, Part, Rename, clip_part, dit_part, fused, renames
from core.families.spec import DistilledSigns, FamilySpec, Found, Shapes, VaeSigns, side, starts
from core.families.targets import ALIASES, JOINT, JOINT_FF
from core.serialization import json_object

BLOCK, DOUBLE = "transformer_blocks.{}.", "double_blocks.{}."
SINGLE_BLOCK, SINGLE = "single_transformer_blocks.{}.", "single_blocks.{}."
# Of Flux.2 as well.
SHARED = (
    fused(f"{BLOCK}attn.to_*", f"{DOUBLE}img_attn.qkv"),
    fused(f"{BLOCK}attn.add_*_proj", f"{DOUBLE}txt_attn.qkv"),
    *renames((
        ("attn.to_out.0", "img_attn.proj"), ("attn.to_add_out", "txt_attn.proj"),
        ("attn.norm_q", "img_attn.norm.query_norm"), ("attn.norm_k", "img_attn.norm.key_norm"),
        ("attn.norm_added_q", "txt_attn.norm.query_norm"),
        ("attn.norm_added_k", "txt_attn.norm.key_norm")), BLOCK, DOUBLE),
    *renames((("attn.norm_q", "norm.query_norm"), ("attn.norm_k", "norm.key_norm")),
             SINGLE_BLOCK, SINGLE),
    *renames((("x_embedder", "img_in"), ("context_embedder", "txt_in"),
              ("proj_out", "final_layer.linear"))),
    Rename(("norm_out.linear",), "final_layer.adaLN_modulation.1", swapped=True))
RENAMES = (
    *SHARED,
    # One matrix for attention and the first feed-forward layer, which is four times as wide.
    Rename((*(f"{SINGLE_BLOCK}attn.to_{x}" for x in "qkv"), f"{SINGLE_BLOCK}proj_mlp"),
           f"{SINGLE}linear1", (1, 1, 1, 4)),
    *renames((
        ("ff.net.0.proj", "img_mlp.0"), ("ff.net.2", "img_mlp.2"),
        ("ff_context.net.0.proj", "txt_mlp.0"), ("ff_context.net.2", "txt_mlp.2"),
        ("norm1.linear", "img_mod.lin"), ("norm1_context.linear", "txt_mod.lin")),
        BLOCK, DOUBLE),
    *renames((
        ("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
        ("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
        ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
        ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
        ("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
        ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"))),
    *renames((("proj_out", "linear2"), ("norm.linear", "modulation.lin")), SINGLE_BLOCK, SINGLE))
NAMING: Naming = (
    dit_part(RENAMES),
    clip_part("text_encoder", "lora_te1", "clip_l"),
    Part("text_encoder_2", "lora_te3", native="text_encoders.t5xxl.transformer"))

# The parameter of a norm, in the original code and in newer files.
SCALES = ("scale", "weight")


def recognize(shapes: Shapes) -> Found | None:
    if starts(*(f"double_blocks.0.img_attn.norm.key_norm.{leaf}" for leaf in SCALES))(shapes):
        channels = side(shapes, "img_in.weight", 1)
    elif {"single_transformer_blocks.0.proj_mlp.weight",
          "time_text_embed.text_embedder.linear_1.weight"} <= shapes.keys():
        channels = side(shapes, "x_embedder.weight", 1)
    else:
        return None
    # Relatives read more than the 64 channels of packed latents.
    if channels in (0, 128, 384):
        return Found({0: "video", 128: "flux_control", 384: "flux_fill"}[channels])
    guided = starts("guidance_in.", "time_text_embed.guidance_embedder.")(shapes)
    return Found("flux_dev" if guided else "flux_schnell", "flux")


def variant(folder: Path) -> str:
    """dev takes guidance as an input, schnell doesn't."""
    config = json_object(folder / "transformer" / "config.json")
    return "flux_dev" if config.get("guidance_embeds") else "flux_schnell"


SPEC = FamilySpec(
    id="flux", title="Flux.1", native_size=1024, bucket_step=64,
    lora_presets={"attention": JOINT, "attention+ff": (*JOINT, *JOINT_FF, "proj_mlp"),
                  "all-linear": (*JOINT, *JOINT_FF, "proj_mlp", "proj_out")},
    lora_aliases=ALIASES, base_version="flux1",
    architecture="flux-1-dev", implementation="https://github.com/black-forest-labs/flux",
    encoders=("text_encoder", "text_encoder_2"), cfg=3.5,
    model="Flux1", short_title="Flux", file="denoiser", tokens=511,
    naming=NAMING, recognize=recognize, pipelines={"FluxPipeline": "flux_dev"}, variant=variant,
    relatives={"FluxFillPipeline": "flux_fill", "FluxControlPipeline": "flux_control",
               "FluxKontextPipeline": "flux_kontext"},
    namesakes={("flux_dev", "kontext"): "flux_kontext"},
    distilled=DistilledSigns(steps_of={"flux_schnell": 4}, guided=("flux_dev",),
                             named={"flux_schnell": "Flux.1 schnell"}),
    # ae.safetensors of Flux.1, Z-Image and Lumina 2; the same in diffusers' names, in bf16
    vae=VaeSigns("Flux.1", (
        "afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38",
        "f5b59a26851551b67ae1fe58d32e76486e1e812def4696a4bea97f16604d40a3"), scale=0.3611),
    lora_signs=((r"double_blocks|single_blocks|single_transformer_blocks", None),),
    metadata_names=("flux1", "flux-1"),
    kohya_targets=(*JOINT, *JOINT_FF, "proj_mlp", "proj_out", "norm1.linear",
                   "norm1_context.linear", "norm.linear"),
    trainer_names=("flux", "flux1", "fluxlora", "fluxdev1"))
