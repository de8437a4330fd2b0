"""Qwen-Image (Qwen team 2025, arXiv 2508.02324): a flow in an MMDiT; Qwen2.5-VL reads the text.

As its report and diffusers' pipeline have it: a caption stands in a fixed request to describe the
picture, whose own tokens are dropped; the VAE is one of videos, a picture its only frame, its
latents normalised channel by channel and packed 2 x 2; a shift that grows with the picture (mu 0.5
at 256 tokens, 0.9 at 8192). Guidance is true guidance, by a negative prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextModel

from core.families import checkpoint_keys, text
from core.families.base import Cond, Parts
from core.families.common import ComponentFamily, TokenizerSpec, layer_count, pack, unpack
from core.families.loading import CheckpointLayout, ComponentSpec
from core.families.qwen.spec import SIDE, SPEC
from core.families.timestep_sampling import STEPS, TimestepSampling, by_share

LENGTH = 512                                # tokens after the request, its end among them
LEARNS = TimestepSampling(line=((256, 0.5), (8192, 0.9)), told=by_share)


class Filmed(ComponentFamily):
    """A family whose VAE is Qwen-Image's."""

    def encode_image(self, parts: Parts, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            vae = parts.vae
            frame = pixels.to(vae.device, vae.dtype).unsqueeze(2)
            latents: Tensor = vae.encode(frame).latent_dist.mode().squeeze(2)
            mean, std = (torch.tensor(vae.config[key]).to(latents).view(1, -1, 1, 1)
                         for key in ("latents_mean", "latents_std"))
            return (latents - mean) / std

    def sizes(self, layout: CheckpointLayout) -> tuple[int, int]:
        """Native side and bucket step, px, as common.dit_sizes has them."""
        native = layout.configs["vae"].get("sample_size", SIDE)
        if not isinstance(native, int) or not 1 <= native <= 8192:
            raise ValueError(f"sample_size: {native}")
        return native, 8 * 2 ** len(layout.configs["vae"]["temperal_downsample"])


class QwenImage(Filmed):
    kind = SPEC.id
    spec = SPEC
    pieces = (
        ComponentSpec("transformer", QwenImageTransformer2DModel, "denoiser"),
        ComponentSpec("vae", AutoencoderKLQwenImage, "vae", ("vae.",), checkpoint_keys.film_vae,
                      alone="vae_film"),
        ComponentSpec("text_encoder", Qwen2_5_VLTextModel, "text",
                      ("text_encoders.qwen25_7b.transformer.",), checkpoint_keys.decoder,
                      alone="qwen25_vl",
                      wide=True, config=lambda read: Qwen2_5_VLConfig.from_dict(read).text_config))
    vocabularies: ClassVar = {      # four of its tokens are the end of the request
        "text_encoder": TokenizerSpec("qwen25", LENGTH - 4)}
    pipe = QwenImagePipeline

    def adapt(self, layout: CheckpointLayout) -> None:
        shapes = self.shapes(layout)
        layout.configs["transformer"]["num_layers"] = layer_count(shapes, "transformer_blocks.")

    def empty(self, layout: CheckpointLayout) -> Parts:
        return Parts(layout.source, layout.scheduler, "flow", *self.sizes(layout),
                     is_video_vae=True,
                     guidance="true_cfg_scale",
                     flow=LEARNS)

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        request, start = _request()
        found = text.padded(parts.text["tokenizer"], [request.format(one) for one in prompts],
                            start + LENGTH)
        return {"text_encoder": found.input_ids, "text_encoder.mask": found.attention_mask}

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        start = _request()[1]
        out, mask = text.read(parts.text["text_encoder"], tokens)
        return {"text": out.last_hidden_state[:, start:], "mask": mask[:, start:]}

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = noisy.shape[2] // 2, noisy.shape[3] // 2
        found = denoiser(
            hidden_states=pack(noisy), timestep=t / STEPS, encoder_hidden_states=cond["text"],
            encoder_hidden_states_mask=cond["mask"].bool(),
            img_shapes=[[(1, height, width)]] * len(noisy), return_dict=False)[0]
        return unpack(found, height, width)

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        return {"prompt_embeds": cond["text"], "prompt_embeds_mask": cond["mask"].bool(),
                "negative_prompt_embeds": negative["text"],
                "negative_prompt_embeds_mask": negative["mask"].bool()}


@cache
def _request() -> tuple[str, int]:
    """The request around a caption, as the pipeline has it, and how many tokens stand before it."""
    bare = QwenImagePipeline(None, None, None, None, None)
    return bare.prompt_template_encode, bare.prompt_template_encode_start_idx
