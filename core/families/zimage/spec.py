"""Z-Image: what is known of it without loading it."""

from __future__ import annotations

from core.families.layer_names import Naming, Part, Rename
from core.families.spec import DistilledSigns, FamilySpec, Found, Shapes
from core.families.targets import ATTENTION, ATTENTION_ALIASES

FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


def _renames() -> tuple[Rename, ...]:
    found: list[Rename] = []
    for block in ("layers.{}", "noise_refiner.{}", "context_refiner.{}"):
        inner = f"{block}.attention"
        found += [Rename(tuple(f"{inner}.to_{x}" for x in "qkv"), f"{inner}.qkv"),
                  Rename((f"{inner}.to_out.0",), f"{inner}.out"),
                  Rename((f"{inner}.norm_q",), f"{inner}.q_norm"),
                  Rename((f"{inner}.norm_k",), f"{inner}.k_norm")]
    return (*found, Rename(("all_x_embedder.2-1",), "x_embedder"),
            Rename(("all_final_layer.2-1",), "final_layer"))


RENAMES = _renames()
NAMING: Naming = (
    Part("transformer", "lora_unet", native="diffusion_model", renames=RENAMES,
         kohya_native=True),
)


SHIFT, TURBO_SHIFT = 6.0, 3.0               # of the schedulers


def recognize(shapes: Shapes) -> Found | None:
    fits = "layers.0.adaLN_modulation.0.weight" in shapes
    return Found("zimage", "zimage") if fits else None


SPEC = FamilySpec(
    id="zimage", title="Z-Image", native_size=1024, bucket_step=64,
    lora_presets={"attention": ATTENTION, "attention+ff": ATTENTION + FEED_FORWARD,
                  "all-linear": (*ATTENTION, *FEED_FORWARD, "adaLN_modulation.0")},
    lora_aliases=ATTENTION_ALIASES,
    kohya_prefix="lora_unet", base_version="zimage", architecture="z-image",
    implementation="https://github.com/Tongyi-MAI/Z-Image", cfg=5.0, lora_format="diffusers",
    model="ZImage", short_title="Z-Image", file="denoiser", tokens=500, fp16=False,
    naming=NAMING, recognize=recognize,
    pipelines={"ZImagePipeline": "zimage"}, distilled=DistilledSigns(shift=TURBO_SHIFT),
    lora_signs=(
        (r"(layers|refiner)[._]\d+[._](attention[._]to_|adaLN_modulation[._]0\.)", None),
        (r"(layers|refiner)[._]\d+[._](attention|feed_forward)[._].*(down|lora_A)", 3840),
    ),
    metadata_names=("zimage", "z-image"))
