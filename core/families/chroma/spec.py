"""Chroma: what is known of it without loading it."""

from __future__ import annotations

from core.families.flux.spec import NAMING as FLUX
from core.families.layer_names import Naming, Part, dit_part, renames
from core.families.spec import DistilledSigns, FamilySpec, Found, Shapes, starts
from core.families.targets import ALIASES, JOINT, JOINT_FF

# Flux with one network for all modulations.
RENAMES = (
    *FLUX[0].renames,
    *renames((("linear_1", "in_layer"), ("linear_2", "out_layer")),
             "distilled_guidance_layer.layers.{}.", "distilled_guidance_layer.layers.{}."))
NAMING: Naming = (
    dit_part(RENAMES), Part("text_encoder", "lora_te3", native="text_encoders.t5xxl.transformer"))


def recognize(shapes: Shapes) -> Found | None:
    if not starts("distilled_guidance_layer.")(shapes):
        return None
    pixels = starts("nerf_")(shapes)        # no VAE, another model
    return Found("chroma_radiance") if pixels else Found("chroma", "chroma")


SPEC = FamilySpec(
    id="chroma", title="Chroma", native_size=1024, bucket_step=64,
    lora_presets={"attention": JOINT, "attention+ff": (*JOINT, *JOINT_FF, "proj_mlp"),
                  "all-linear": (*JOINT, *JOINT_FF, "proj_mlp", "proj_out")},
    lora_aliases=ALIASES, base_version="chroma",
    architecture="chroma", implementation="https://github.com/lodestone-rock/flow", cfg=4.0,
    model="Chroma", short_title="Chroma", file="denoiser", tokens=511,
    naming=NAMING, recognize=recognize, pipelines={"ChromaPipeline": "chroma"}, names_of="flux",
    distilled=DistilledSigns(words="flash"), lora_signs=((r"distilled_guidance_layer", None),),
    metadata_names=("chroma",),
    trainer_names=("chroma", "chroma1", "chromalora"))
