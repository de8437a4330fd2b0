"""Sana: what is known of it without loading it."""

from __future__ import annotations

from core.families.layer_names import Naming, dit_part, fused, renames
from core.families.lumina2.spec import GEMMA
from core.families.spec import FamilySpec, Found, Shapes
from core.families.targets import ALIASES, ATTENTION

FEED_FORWARD = ("ff.conv_inverted", "ff.conv_point")


BLOCK, THEIR_BLOCK = "transformer_blocks.{}", "blocks.{}"
RENAMES = (
    fused(f"{BLOCK}.attn1.to_*", f"{THEIR_BLOCK}.attn.qkv"),
    fused(f"{BLOCK}.attn2.to_*", f"{THEIR_BLOCK}.cross_attn.kv_linear", "kv"),
    *renames((
        (".attn1.to_out.0", ".attn.proj"), (".attn1.norm_q", ".attn.q_norm"),
        (".attn1.norm_k", ".attn.k_norm"), (".attn2.to_q", ".cross_attn.q_linear"),
        (".attn2.to_out.0", ".cross_attn.proj"), (".attn2.norm_q", ".cross_attn.q_norm"),
        (".attn2.norm_k", ".cross_attn.k_norm"),
        (".ff.conv_inverted", ".mlp.inverted_conv.conv"),
        (".ff.conv_depth", ".mlp.depth_conv.conv"), (".ff.conv_point", ".mlp.point_conv.conv"),
        ("", "")), BLOCK, THEIR_BLOCK),
    *renames((
        ("patch_embed.proj", "x_embedder.proj"),
        ("time_embed.emb.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_embed.emb.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("time_embed.linear", "t_block.1"),
        ("caption_projection.linear_1", "y_embedder.y_proj.fc1"),
        ("caption_projection.linear_2", "y_embedder.y_proj.fc2"),
        ("caption_norm", "attention_y_norm"), ("proj_out", "final_layer.linear"))))
NAMING: Naming = (dit_part(RENAMES), GEMMA)


def recognize(shapes: Shapes) -> Found | None:
    fits = {"blocks.0.mlp.inverted_conv.conv.weight",
            "transformer_blocks.0.ff.conv_inverted.weight"} & shapes.keys()
    return Found("sana", "sana") if fits else None


SPEC = FamilySpec(
    id="sana", title="Sana", native_size=1024, bucket_step=32,
    lora_presets={"attention": ATTENTION, "attention+ff": ATTENTION + FEED_FORWARD,
                  "all-linear": (*ATTENTION, *FEED_FORWARD, "proj_out")},
    lora_aliases=ALIASES | {"fc1": "ff.conv_inverted", "fc2": "ff.conv_point"},
    base_version="sana", architecture="sana",
    implementation="https://github.com/NVlabs/Sana", cfg=4.5, lora_format="diffusers",
    model="Sana", short_title="Sana", file="denoiser", tokens=299,
    naming=NAMING, recognize=recognize, pipelines={"SanaPipeline": "sana"},
    lora_signs=(
        (r"[._]ff[._]conv_(inverted|point)\b|attn1[._]to_[qkv]\.", 2240),
        (r"[._]ff[._]conv_(inverted|point)\b", None)),
    metadata_names=("sana",),
    trainer_names=("sana", "sanalora"))
