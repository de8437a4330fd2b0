"""Sana (Xie et al. 2024, arXiv 2410.10629): a flow by linear attention on a 32 x smaller picture;
Gemma 2 reads the text behind a long instruction (section 3.2), which an empty text goes without.

Noise levels are drawn logit-normally and shifted by 3, as its reference code
(github.com/NVlabs/Sana) learns; pictures are drawn by DPM-Solver++ on the same flow (section 2.3).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from torch import Tensor

from core.families import checkpoint_keys, text
from core.families.base import Cond, Parts
from core.families.checkpoint_keys import Tensors
from core.families.common import LARGEST_SIDE, FlowFamily, TokenizerSpec, denoiser_spec
from core.families.loading import CheckpointLayout, ComponentSpec, layer_count
from core.families.lumina2.model import TEXT_ENCODER, gemma_states
from core.families.sana.spec import SPEC
from core.families.timestep_sampling import TimestepSampling

LENGTH = 300                                # tokens that reach the transformer
INSTRUCTION = "\n".join(
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
HEAD = {2240: 112, 1152: 72}                # px of a cross-attention head, by the model's width


def _finish_names(tensors: Tensors) -> Tensors:
    """Renames a parameter that belongs to no layer."""
    table = tensors.pop("final_layer.scale_shift_table", None)
    return tensors if table is None else tensors | {"scale_shift_table": table}


class Unbinned(SanaPipeline):  # type: ignore[misc]
    """Draws the size that is asked for, not the nearest of a list, scaled."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return super().__call__(*args, **{"use_resolution_binning": False, **options})


class Sana(FlowFamily):
    kind = SPEC.id
    spec = SPEC
    components = (
        denoiser_spec(SanaTransformer2DModel, SPEC, _finish_names),
        ComponentSpec("vae", AutoencoderDC, "vae", ("vae.",), checkpoint_keys.deep_vae, "vae_dc"),
        TEXT_ENCODER)
    tokenizers: ClassVar = {"text_encoder": TokenizerSpec("gemma2", LENGTH)}
    pipe = Unbinned
    sampling = TimestepSampling("logit_normal")     # its shift is the scheduler's

    def adapt(self, layout: CheckpointLayout) -> None:
        shapes = self.shapes(layout)
        config, width = layout.configs["transformer"], shapes["patch_embed.proj.weight"][0]
        head = HEAD.get(width, config["cross_attention_head_dim"])
        is_normed = "transformer_blocks.0.attn1.norm_q.weight" in shapes
        config |= {
            "num_layers": layer_count(shapes, "transformer_blocks."), "cross_attention_dim": width,
            "num_attention_heads": width // config["attention_head_dim"],
            "cross_attention_head_dim": head, "num_cross_attention_heads": width // head,
            "qk_norm": "rms_norm_across_heads" if is_normed else None}

    def sizes(self, layout: CheckpointLayout) -> tuple[int, int]:
        config, vae = layout.configs["transformer"], layout.configs["vae"]
        step = config["patch_size"] * 2 ** (len(vae["encoder_block_out_channels"]) - 1)
        native = config["sample_size"] * step
        if not 1 <= native <= LARGEST_SIDE:
            raise ValueError(f"sample_size: {config['sample_size']}")
        return native, step

    def empty(self, layout: CheckpointLayout) -> Parts:
        # One number by two names: a config has either, each of diffusers' schedulers reads its own.
        shift = float(layout.scheduler.get("flow_shift", layout.scheduler.get("shift", 1.0)))
        parts = super().empty(layout)
        parts.scheduler = layout.scheduler | {"flow_shift": shift, "shift": shift}
        parts.flow = replace(self.sampling, shift=shift)
        return parts

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer = parts.text["tokenizer"]
        # Gemma's own is left, but this model has learned so.
        tokenizer.padding_side = "right"
        # The instruction's own tokens come on top; in a plan they are not known: as many again.
        is_plan = isinstance(tokenizer, text.Blank)
        extra = LENGTH if is_plan else len(tokenizer(INSTRUCTION).input_ids) - 2
        prompts = [prompt.lower().strip() for prompt in prompts]
        return text.masked_tokens(
            tokenizer, [p and INSTRUCTION + p for p in prompts], LENGTH + extra)

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        states, mask = gemma_states(parts, tokens, -1)
        # The start mark, and what stands behind the instruction.
        seen = [0, *range(1 - LENGTH, 0)]
        return {"text": states[:, seen], "mask": mask[:, seen]}

    def encode_image(self, parts: Parts, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            vae = parts.vae
            latents: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent
            return latents * float(vae.config.scaling_factor)

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        predicted: Tensor = denoiser(
            noisy, encoder_hidden_states=cond["text"], encoder_attention_mask=cond["mask"],
            timestep=t * denoiser.config.timestep_scale, return_dict=False)[0]
        # Some bases predict a variance, too.
        return predicted[:, :noisy.shape[1]]

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Any]:
        return {**text.masked_arguments(cond, negative), "negative_prompt": None}
