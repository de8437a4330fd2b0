"""Lumina-Image 2.0: what is known of it without loading it."""

from __future__ import annotations

from core.families.layer_names import Naming, Part, Rename, dit_part, fused, renames
from core.families.spec import FamilySpec, Found, Shapes
from core.families.targets import ATTENTION, ATTENTION_ALIASES

FEED_FORWARD = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")


def block_renames(block: str, norms: tuple[tuple[str, str], ...]) -> tuple[Rename, ...]:
    """The layers of one kind of block; `norms` are its norms before attention."""
    return (
        # Three heads of queries share one of keys and values.
        fused(f"{block}attn.to_*", f"{block}attention.qkv", shares=(3, 1, 1)),
        *renames((
            ("attn.to_out.0", "attention.out"), ("attn.norm_q", "attention.q_norm"),
            ("attn.norm_k", "attention.k_norm"), *norms, ("norm2", "attention_norm2"),
            *((f"feed_forward.linear_{n}", f"feed_forward.w{n}") for n in (1, 2, 3))),
            block, block))


MODULATED = (("norm1.norm", "attention_norm1"), ("norm1.linear", "adaLN_modulation.1"))
RENAMES = (
    *block_renames("layers.{}.", MODULATED),
    *block_renames("noise_refiner.{}.", MODULATED),
    *block_renames("context_refiner.{}.", (("norm1", "attention_norm1"),)),
    *renames((
        ("time_caption_embed.caption_embedder", "cap_embedder"),
        ("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
        ("norm_out.linear_2", "final_layer.linear"))))
GEMMA = Part("text_encoder", "lora_te", native="text_encoders.gemma2_2b.transformer.model")
NAMING: Naming = (dit_part(RENAMES), GEMMA)


def recognize(shapes: Shapes) -> Found | None:
    original = {"cap_embedder.0.weight", "layers.0.adaLN_modulation.1.weight"} <= shapes.keys()
    fits = original or "time_caption_embed.caption_embedder.0.weight" in shapes
    return Found("lumina2", "lumina2") if fits else None


SPEC = FamilySpec(
    id="lumina2", title="Lumina 2", native_size=1024, bucket_step=64,
    lora_presets={"attention": ATTENTION, "attention+ff": ATTENTION + FEED_FORWARD,
                  "all-linear": (*ATTENTION, *FEED_FORWARD, "norm1.linear")},
    lora_aliases=ATTENTION_ALIASES, base_version="lumina2", architecture="lumina-2",
    implementation="https://github.com/Alpha-VLLM/Lumina-Image-2.0", cfg=4.0,
    model="Lumina2", short_title="Lumina 2", file="denoiser", tokens=220, fp16=False,
    naming=NAMING, recognize=recognize,
    pipelines={"Lumina2Pipeline": "lumina2", "Lumina2Text2ImgPipeline": "lumina2"},
    lora_signs=(
        (r"(layers|refiner)[._]\d+[._](attn[._]to_|adaLN_modulation[._]1\.)", None),
        (r"(layers|refiner)[._]\d+[._](attention|feed_forward)[._].*(down|lora_A)", 2304)),
    metadata_names=("lumina",),
    trainer_names=("lumina", "lumina2", "luminalora", "lumina2lora"))
