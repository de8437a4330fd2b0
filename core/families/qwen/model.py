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
from core.families.common import FlowFamily, TokenizerSpec, checked_side
from core.families.flux import packed
from core.families.loading import CheckpointLayout, ComponentSpec, layer_count
from core.families.qwen.spec import SIDE, SPEC
from core.families.timestep_sampling import TimestepSampling, by_share

LENGTH = 512                                # tokens after the request, its end among them


FILM_VAE = ComponentSpec("vae", AutoencoderKLQwenImage, "vae", ("vae.",), checkpoint_keys.film_vae,
                         file_kind="vae_film")


class FilmVaeFamily(FlowFamily):
    """A family with Qwen-Image's VAE, which is one of videos."""

    is_video_vae = True

    def encode_image(self, parts: Parts, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            vae = parts.vae
            # A picture is a video of one frame.
            frame = pixels.to(vae.device, vae.dtype).unsqueeze(2)
            latents: Tensor = vae.encode(frame).latent_dist.mode().squeeze(2)
            mean, std = (torch.tensor(vae.config[key]).to(latents).view(1, -1, 1, 1)
                         for key in ("latents_mean", "latents_std"))
            return (latents - mean) / std

    def sizes(self, layout: CheckpointLayout) -> tuple[int, int]:
        vae = layout.configs["vae"]
        return (checked_side(vae.get("sample_size", SIDE)),
                8 * 2 ** len(vae["temperal_downsample"]))


class QwenImage(FilmVaeFamily):
    kind = SPEC.id
    spec = SPEC
    components = (
        ComponentSpec("transformer", QwenImageTransformer2DModel, "denoiser"),
        FILM_VAE,
        ComponentSpec("text_encoder", Qwen2_5_VLTextModel, "text",
                      ("text_encoders.qwen25_7b.transformer.",), checkpoint_keys.decoder,
                      file_kind="qwen25_vl", outgrows_fp16=True,
                      config=lambda config: Qwen2_5_VLConfig.from_dict(config).text_config))
    # Four of its tokens are the end of the request.
    tokenizers: ClassVar = {"text_encoder": TokenizerSpec("qwen25", LENGTH - 4)}
    pipe = QwenImagePipeline
    sampling = TimestepSampling(line=((256, 0.5), (8192, 0.9)), model_times=by_share)
    guidance = "true_cfg_scale"

    def adapt(self, layout: CheckpointLayout) -> None:
        shapes = self.shapes(layout)
        layout.configs["transformer"]["num_layers"] = layer_count(shapes, "transformer_blocks.")

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        request, start = _request()
        return text.masked_tokens(parts.text["tokenizer"], [request.format(p) for p in prompts],
                                  start + LENGTH)

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        start = _request()[1]
        out, mask = text.read(parts.text["text_encoder"], tokens)
        return {"text": out.last_hidden_state[:, start:], "mask": mask[:, start:]}

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = noisy.shape[2] // 2, noisy.shape[3] // 2
        return packed.predict(
            denoiser, noisy, t, cond["text"], encoder_hidden_states_mask=cond["mask"].bool(),
            img_shapes=[[(1, height, width)]] * len(noisy))

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        return {"prompt_embeds": cond["text"], "prompt_embeds_mask": cond["mask"].bool(),
                "negative_prompt_embeds": negative["text"],
                "negative_prompt_embeds_mask": negative["mask"].bool()}


@cache
def _request() -> tuple[str, int]:
    """The request around a caption, as the pipeline has it, and how many tokens stand before it."""
    pipeline = QwenImagePipeline(None, None, None, None, None)
    return pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx
