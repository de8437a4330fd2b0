"""Krea 2 (Krea 2026), raw and turbo: a flow in one stream of text and picture tokens; layers of
Qwen3-VL are fused into the text.

As its reference code and diffusers' pipeline have it: Qwen-Image's VAE and its request around a
caption, padded in the middle, padding without a position; text tokens stand at the origin, so that
their order means nothing and what is padded can go to the end; a shift that grows with the picture
(mu 0.5 at 256 tokens, 1.15 at 6400; turbo draws with 1.15 always, and learns as raw does). Train on
raw, its makers say, and draw with turbo.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLTextModel

from core.families import checkpoint_keys, text
from core.families.base import Cond, Parts
from core.families.checkpoint_keys import Tensors
from core.families.common import (
    TokenizerSpec,
    index_of,
    layer_count,
    pack,
    unpack,
)
from core.families.flux.model import positions
from core.families.krea2.spec import SPEC
from core.families.loading import CheckpointLayout, ComponentSpec
from core.families.qwen.model import Filmed
from core.families.timestep_sampling import STEPS, TimestepSampling

LENGTH = 512                                # tokens, the request's end among them
LEARNS = TimestepSampling(line=((256, 0.5), (6400, 1.15)))


def _diffusers_names(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    found: Tensors = {}
    for name, value in checkpoint_keys.by_table(SPEC.naming[0])(tensors, config).items():
        if match := re.fullmatch(r"blocks\.(\d+)\.mod\.lin", name):     # six vectors in a row
            name, value = f"transformer_blocks.{match[1]}.scale_shift_table", value.reshape(6, -1)
        found["final_layer.scale_shift_table" if name == "last.modulation.lin" else name] = value
    return found


class Krea2(Filmed):
    kind = SPEC.id
    spec = SPEC
    pieces = (
        ComponentSpec("transformer", Krea2Transformer2DModel, "denoiser", convert=_diffusers_names),
        ComponentSpec("vae", AutoencoderKLQwenImage, "vae", ("vae.",), checkpoint_keys.film_vae,
                      alone="vae_film"),
        ComponentSpec("text_encoder", Qwen3VLTextModel, "text", (), checkpoint_keys.decoder,
                      alone="qwen3_vl",
                      wide=True, config=lambda read: Qwen3VLConfig.from_dict(read).text_config))
    vocabularies: ClassVar = {
        "text_encoder": TokenizerSpec("qwen3", LENGTH - 4)}
    pipe = Krea2Pipeline

    def adapt(self, layout: CheckpointLayout) -> None:
        shapes = self.shapes(layout)
        layout.configs["transformer"]["num_layers"] = layer_count(shapes, "transformer_blocks.")

    def empty(self, layout: CheckpointLayout) -> Parts:
        return Parts(layout.source, layout.scheduler, "flow", *self.sizes(layout),
                     is_video_vae=True,
                     no_guidance_value=0.0, flow=LEARNS)

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer, bare = parts.text["tokenizer"], _bare()
        end = bare.prompt_template_encode_num_suffix_tokens
        head = text.padded(
            tokenizer, [bare.prompt_template_encode_prefix + one for one in prompts],
            bare.prompt_template_encode_start_idx + LENGTH - end)
        tail = text.padded(tokenizer, [bare.prompt_template_encode_suffix] * len(prompts), end)
        return {"text_encoder": torch.cat([head.input_ids, tail.input_ids], 1),
                "text_encoder.mask": torch.cat([head.attention_mask, tail.attention_mask], 1)}

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        encoder, start = parts.text["text_encoder"], _bare().prompt_template_encode_start_idx
        place = (tokens["text_encoder.mask"].long().cumsum(-1) - 1).clamp(min=0)
        out, mask = text.read(encoder, tokens, output_hidden_states=True,
                              position_ids=place.to(encoder.device).expand(3, -1, -1))
        layers = torch.stack([out.hidden_states[n] for n in self._layers(parts)], 2)[:, start:]
        mask, order = mask[:, start:].sort(dim=1, descending=True, stable=True)
        return {"text": layers.take_along_dim(order[:, :, None, None], 1), "mask": mask}

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = noisy.shape[2] // 2, noisy.shape[3] // 2
        places = torch.cat([noisy.new_zeros(cond["text"].shape[1], 3),
                            positions(height, width, noisy)])
        found = denoiser(
            hidden_states=pack(noisy), encoder_hidden_states=cond["text"], timestep=t / STEPS,
            position_ids=places, encoder_attention_mask=cond["mask"].bool(), return_dict=False)[0]
        return unpack(found, height, width)

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        """Both as long as each other: the pipeline counts positions once for the two."""
        length = max(cond["mask"].shape[1], negative["mask"].shape[1])
        (words, mask), (others, hidden) = (
            (torch.nn.functional.pad(one["text"], (0, 0, 0, 0, 0, length - one["text"].shape[1])),
             torch.nn.functional.pad(one["mask"], (0, length - one["mask"].shape[1])).bool())
            for one in (cond, negative))
        return {"prompt_embeds": words, "prompt_embeds_mask": mask,
                "negative_prompt_embeds": others, "negative_prompt_embeds_mask": hidden}

    def pipe_options(self, parts: Parts) -> dict[str, Any]:
        return {"is_distilled": parts.distilled is not None,
                "text_encoder_select_layers": self._layers(parts)}

    def _layers(self, parts: Parts) -> tuple[int, ...]:
        own = index_of(parts.source).get("text_encoder_select_layers")
        return tuple(own or _bare().text_encoder_select_layers)


@cache
def _bare() -> Krea2Pipeline:
    """A pipeline without models, which knows the request around a caption."""
    return Krea2Pipeline(None, None, None, None, None)
