"""Krea 2: what is known of it without loading it."""

from __future__ import annotations

from core.families.layer_names import Naming, Part, Rename
from core.families.qwen.spec import SIDE
from core.families.spec import FamilySpec, Found, Shapes
from core.families.targets import ATTENTION, ATTENTION_ALIASES

GATED = (*ATTENTION, "to_gate")
FF = ("ff.gate", "ff.up", "ff.down")
ENDS = ("img_in", "txt_in.linear_1", "txt_in.linear_2", "time_mod_proj", "final_layer.linear")


def _renames() -> tuple[Rename, ...]:
    blocks = (("transformer_blocks.{}", "blocks.{}"),
              *((f"text_fusion.{one}.{{}}", f"txtfusion.{one}.{{}}")
                for one in ("layerwise_blocks", "refiner_blocks")))
    own = (("attn.to_q", "attn.wq"), ("attn.to_k", "attn.wk"), ("attn.to_v", "attn.wv"),
           ("attn.to_out.0", "attn.wo"), ("attn.to_gate", "attn.gate"), ("ff", "mlp"),
           ("attn.norm_q", "attn.qknorm.qnorm"), ("attn.norm_k", "attn.qknorm.knorm"),
           ("norm1", "prenorm"), ("norm2", "postnorm"))
    ends = (("img_in", "first"), ("time_embed.linear_1", "tmlp.0"),
            ("time_embed.linear_2", "tmlp.2"), ("time_mod_proj", "tproj.1"),
            ("txt_in.norm", "txtmlp.0"), ("txt_in.linear_1", "txtmlp.1"),
            ("txt_in.linear_2", "txtmlp.3"), ("text_fusion.projector", "txtfusion.projector"),
            ("final_layer.linear", "last.linear"), ("final_layer.norm", "last.norm"))
    return (*(Rename((f"{ours}.{a}",), f"{theirs}.{b}") for ours, theirs in blocks
              for a, b in own), *(Rename((a,), b) for a, b in ends))


RENAMES = _renames()
NAMING: Naming = (
    Part("transformer", "lora_unet", native="diffusion_model", renames=RENAMES,
         kohya_native=True),
)


def recognize(shapes: Shapes) -> Found | None:
    fits = {"txtfusion.projector.weight", "text_fusion.projector.weight"} & shapes.keys()
    return Found("krea2", "krea2") if fits else None


SPEC = FamilySpec(
    id="krea2", title="Krea 2", native_size=SIDE, bucket_step=64,
    lora_presets={"attention": GATED, "attention+ff": GATED + FF,
                  "all-linear": (*GATED, *FF, *ENDS)},
    lora_aliases=ATTENTION_ALIASES | {
        "wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0"},
    kohya_prefix="lora_unet", base_version="krea2", architecture="krea-2",
    implementation="https://github.com/krea-ai/krea-2", cfg=5.5, lora_format="diffusers",
    model="Krea2", short_title="Krea 2", file="denoiser", tokens=507,
    naming=NAMING, recognize=recognize,
    pipelines={"Krea2Pipeline": "krea2"},
    lora_signs=(
        (r"txtfusion|text_fusion|blocks[._]\d+[._]attn[._](to_gate|w[qkvo])\b", None),
    ),
    metadata_names=("krea2", "krea-2"))
