"""Z-Image: what is known of it without loading it."""

from __future__ import annotations

from core.families.layer_names import Naming, dit_part, fused, renames
from core.families.spec import DistilledSigns, FamilySpec, Found, Shapes
from core.families.targets import ATTENTION, ATTENTION_ALIASES

FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


BLOCKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
RENAMES = (
    *(rename for block in (f"{name}.attention." for name in BLOCKS) for rename in (
        fused(f"{block}to_*", f"{block}qkv"),
        *renames((("to_out.0", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm")),
                 block, block))),
    *renames((("all_x_embedder.2-1", "x_embedder"), ("all_final_layer.2-1", "final_layer"))))
NAMING: Naming = (dit_part(RENAMES),)

SHIFT, TURBO_SHIFT = 6.0, 3.0               # of the schedulers


def recognize(shapes: Shapes) -> Found | None:
    fits = "layers.0.adaLN_modulation.0.weight" in shapes
    return Found("zimage", "zimage") if fits else None


SPEC = FamilySpec(
    id="zimage", title="Z-Image", native_size=1024, bucket_step=64,
    lora_presets={"attention": ATTENTION, "attention+ff": ATTENTION + FEED_FORWARD,
                  "all-linear": (*ATTENTION, *FEED_FORWARD, "adaLN_modulation.0")},
    lora_aliases=ATTENTION_ALIASES, base_version="zimage", architecture="z-image",
    implementation="https://github.com/Tongyi-MAI/Z-Image", cfg=5.0, lora_format="diffusers",
    model="ZImage", short_title="Z-Image", file="denoiser", tokens=500, fp16=False,
    naming=NAMING, recognize=recognize,
    pipelines={"ZImagePipeline": "zimage"}, distilled=DistilledSigns(shift=TURBO_SHIFT),
    lora_signs=(
        (r"(layers|refiner)[._]\d+[._](attention[._]to_|adaLN_modulation[._]0\.)", None),
        (r"(layers|refiner)[._]\d+[._](attention|feed_forward)[._].*(down|lora_A)", 3840)),
    metadata_names=("zimage", "z-image"),
    kohya_targets="attention+ff",
    trainer_names=("zimage", "zimagelora"))
