"""Lumina-Image 2.0: what is known of it without loading it."""

from __future__ import annotations

from core.families.layer_names import Naming, Part, Rename
from core.families.spec import FamilySpec, Found, Shapes
from core.families.targets import ATTENTION, ATTENTION_ALIASES

FEED_FORWARD = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")


def _renames() -> tuple[Rename, ...]:
    """Three heads of queries share one of keys and values."""
    found: list[Rename] = []
    for block in ("layers.{}", "noise_refiner.{}", "context_refiner.{}"):
        ours, theirs = f"{block}.attn", f"{block}.attention"
        norms = ((("norm1", "attention_norm1"),) if block.startswith("context") else
                 (("norm1.norm", "attention_norm1"), ("norm1.linear", "adaLN_modulation.1")))
        inner = (*norms, ("norm2", "attention_norm2"),
                 *((f"feed_forward.linear_{n}", f"feed_forward.w{n}") for n in (1, 2, 3)))
        found += [Rename(tuple(f"{ours}.to_{x}" for x in "qkv"), f"{theirs}.qkv", (3, 1, 1)),
                  Rename((f"{ours}.to_out.0",), f"{theirs}.out"),
                  Rename((f"{ours}.norm_q",), f"{theirs}.q_norm"),
                  Rename((f"{ours}.norm_k",), f"{theirs}.k_norm"),
                  *(Rename((f"{block}.{a}",), f"{block}.{b}") for a, b in inner)]
    ends = (("time_caption_embed.caption_embedder", "cap_embedder"),
            ("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
            ("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
            ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
            ("norm_out.linear_2", "final_layer.linear"))
    return (*found, *(Rename((a,), b) for a, b in ends))


RENAMES = _renames()
NAMING: Naming = (
    Part("transformer", "lora_unet", native="diffusion_model", renames=RENAMES,
         kohya_native=True),
    Part("text_encoder", "lora_te", native="text_encoders.gemma2_2b.transformer.model"),
)


def recognize(shapes: Shapes) -> Found | None:
    original = {"cap_embedder.0.weight", "layers.0.adaLN_modulation.1.weight"} <= shapes.keys()
    fits = original or "time_caption_embed.caption_embedder.0.weight" in shapes
    return Found("lumina2", "lumina2") if fits else None


SPEC = FamilySpec(
    id="lumina2", title="Lumina 2", native_size=1024, bucket_step=64,
    lora_presets={"attention": ATTENTION, "attention+ff": ATTENTION + FEED_FORWARD,
                  "all-linear": (*ATTENTION, *FEED_FORWARD, "norm1.linear")},
    lora_aliases=ATTENTION_ALIASES,
    kohya_prefix="lora_unet", base_version="lumina2", architecture="lumina-2",
    implementation="https://github.com/Alpha-VLLM/Lumina-Image-2.0", cfg=4.0,
    model="Lumina2", short_title="Lumina 2", file="denoiser", tokens=220, fp16=False,
    naming=NAMING, recognize=recognize,
    pipelines={"Lumina2Pipeline": "lumina2", "Lumina2Text2ImgPipeline": "lumina2"},
    lora_signs=(
        (r"(layers|refiner)[._]\d+[._](attn[._]to_|adaLN_modulation[._]1\.)", None),
        (r"(layers|refiner)[._]\d+[._](attention|feed_forward)[._].*(down|lora_A)", 2304),
    ),
    metadata_names=("lumina",))
