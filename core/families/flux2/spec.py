"""Flux.2 klein: what is known of it without loading it."""

from __future__ import annotations

from core.families.flux.spec import BLOCK, DOUBLE, SHARED, SINGLE, SINGLE_BLOCK
from core.families.layer_names import Naming, dit_part, renames
from core.families.spec import DistilledSigns, FamilySpec, Found, Shapes, starts
from core.families.targets import ATTENTION_ALIASES, JOINT

FUSED = ("attn.to_qkv_mlp_proj", "attn.to_out")         # a single block's attention is one matrix
FF = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
ENDS = ("x_embedder", "context_embedder", "proj_out")

RENAMES = (
    *SHARED,
    *renames((
        ("ff.linear_in", "img_mlp.0"), ("ff.linear_out", "img_mlp.2"),
        ("ff_context.linear_in", "txt_mlp.0"), ("ff_context.linear_out", "txt_mlp.2")),
        BLOCK, DOUBLE),
    *renames((("attn.to_qkv_mlp_proj", "linear1"), ("attn.to_out", "linear2")),
             SINGLE_BLOCK, SINGLE),
    *renames((
        ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
        ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
        ("double_stream_modulation_img.linear", "double_stream_modulation_img.lin"),
        ("double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin"),
        ("single_stream_modulation.linear", "single_stream_modulation.lin"))))
NAMING: Naming = (dit_part(RENAMES),)


def recognize(shapes: Shapes) -> Found | None:
    if not starts("single_stream_modulation.")(shapes):
        return None
    guided = starts("guidance_in.", "time_guidance_embed.guidance_embedder.")(shapes)
    return Found("flux2_dev") if guided else Found("flux2_klein", "flux2")


SPEC = FamilySpec(
    id="flux2", title="Flux.2 klein", native_size=1024, bucket_step=64,
    lora_presets={"attention": JOINT + FUSED, "attention+ff": JOINT + FUSED + FF,
                  "all-linear": (*JOINT, *FUSED, *FF, *ENDS)},
    lora_aliases=ATTENTION_ALIASES | {"fc1": "ff.linear_in", "fc2": "ff.linear_out"},
    base_version="flux2", architecture="flux-2-klein",
    implementation="https://github.com/black-forest-labs/flux2", cfg=4.0,
    model="Flux2", short_title="Flux.2", file="denoiser", tokens=500,
    naming=NAMING, recognize=recognize,
    pipelines={"Flux2KleinPipeline": "flux2_klein"}, relatives={"Flux2Pipeline": "flux2_dev"},
    names_of="flux", distilled=DistilledSigns(steps=4, words=r"(?<=klein[-_ .])[49]b"),
    lora_signs=(
        (r"to_qkv_mlp_proj|ff(_context)?[._]linear_(in|out)\b|_stream_modulation", None),
        # Files in the original code's names: by the sides of a single block's second matrix.
        (r"single_blocks[._]\d+[._]linear2\b.*(down|lora_A)", 12288),
        (r"single_blocks[._]\d+[._]linear2\b.*(down|lora_A)", 16384)),
    metadata_names=("flux2", "flux-2"),
    kohya_targets="attention+ff",
    trainer_names=("flux2", "flux2klein", "flux2lora"))
