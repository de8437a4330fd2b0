"""Krea 2: what is known of it without loading it."""

from __future__ import annotations

from core.families.layer_names import Naming, dit_part, renames
from core.families.qwen.spec import SIDE
from core.families.spec import FamilySpec, Found, Shapes
from core.families.targets import ATTENTION, ATTENTION_ALIASES

GATED = (*ATTENTION, "to_gate")
FF = ("ff.gate", "ff.up", "ff.down")
ENDS = ("img_in", "txt_in.linear_1", "txt_in.linear_2", "time_mod_proj", "final_layer.linear")


LAYERS = (
    ("attn.to_q", "attn.wq"), ("attn.to_k", "attn.wk"), ("attn.to_v", "attn.wv"),
    ("attn.to_out.0", "attn.wo"), ("attn.to_gate", "attn.gate"), ("ff", "mlp"),
    ("attn.norm_q", "attn.qknorm.qnorm"), ("attn.norm_k", "attn.qknorm.knorm"),
    ("norm1", "prenorm"), ("norm2", "postnorm"))
RENAMES = (
    *renames(LAYERS, "transformer_blocks.{}.", "blocks.{}."),
    *renames(LAYERS, "text_fusion.layerwise_blocks.{}.", "txtfusion.layerwise_blocks.{}."),
    *renames(LAYERS, "text_fusion.refiner_blocks.{}.", "txtfusion.refiner_blocks.{}."),
    *renames((
        ("img_in", "first"), ("time_embed.linear_1", "tmlp.0"),
        ("time_embed.linear_2", "tmlp.2"), ("time_mod_proj", "tproj.1"),
        ("txt_in.norm", "txtmlp.0"), ("txt_in.linear_1", "txtmlp.1"),
        ("txt_in.linear_2", "txtmlp.3"), ("text_fusion.projector", "txtfusion.projector"),
        ("final_layer.linear", "last.linear"), ("final_layer.norm", "last.norm"))))
NAMING: Naming = (dit_part(RENAMES),)


def recognize(shapes: Shapes) -> Found | None:
    fits = {"txtfusion.projector.weight", "text_fusion.projector.weight"} & shapes.keys()
    return Found("krea2", "krea2") if fits else None


SPEC = FamilySpec(
    id="krea2", title="Krea 2", native_size=SIDE, bucket_step=64,
    lora_presets={"attention": GATED, "attention+ff": GATED + FF,
                  "all-linear": (*GATED, *FF, *ENDS)},
    lora_aliases=ATTENTION_ALIASES | {
        "wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0"},
    base_version="krea2", architecture="krea-2",
    implementation="https://github.com/krea-ai/krea-2", cfg=5.5, lora_format="diffusers",
    model="Krea2", short_title="Krea 2", file="denoiser", tokens=507,
    naming=NAMING, recognize=recognize, pipelines={"Krea2Pipeline": "krea2"},
    lora_signs=((r"txtfusion|text_fusion|blocks[._]\d+[._]attn[._](to_gate|w[qkvo])\b", None),),
    metadata_names=("krea2", "krea-2"),
    trainer_names=("krea2", "krea2lora"))
