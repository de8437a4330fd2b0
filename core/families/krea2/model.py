"""Krea 2 (Krea 2026), raw and turbo: a flow in one stream of text and picture tokens; layers of
Qwen3-VL are fused into the text.

As its reference code and diffusers' pipeline have it: Qwen-Image's VAE and its request around a
caption, padded in the middle, padding without a position; text tokens stand at the origin, so that
their order means nothing and what is padded can go to the end; a shift that grows with the picture
(mu 0.5 at 256 tokens, 1.15 at 6400; turbo draws with 1.15 always, and learns as raw does). Train on
raw, its makers say, and draw with turbo.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLTextModel

from core.families import checkpoint_keys, text
from core.families.base import Cond, FamilySpec, Parts
from core.families.common import (
    ATTENTION,
    ATTENTION_ALIASES,
    Vocabulary,
    index_of,
    layer_count,
    pack,
    unpack,
)
from core.families.flux.model import positions
from core.families.loading import Layout, Piece
from core.families.qwen.model import SIDE, Filmed
from core.objectives.flow import STEPS, Sampling

LENGTH = 512                                # tokens, the request's end among them
LEARNS = Sampling(line=((256, 0.5), (6400, 1.15)))
GATED = (*ATTENTION, "to_gate")
FF = ("ff.gate", "ff.up", "ff.down")
ENDS = ("img_in", "txt_in.linear_1", "txt_in.linear_2", "time_mod_proj", "final_layer.linear")


class Krea2(Filmed):
    kind = "krea2"
    spec: ClassVar[FamilySpec] = FamilySpec(
        id="krea2", title="Krea 2", native_size=SIDE, bucket_step=64,
        lora_presets={"attention": GATED, "attention+ff": GATED + FF,
                      "all-linear": (*GATED, *FF, *ENDS)},
        lora_aliases=ATTENTION_ALIASES | {
            "wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0"},
        kohya_prefix="lora_unet", base_version="krea2", architecture="krea-2",
        implementation="https://github.com/krea-ai/krea-2", cfg=5.5, lora_format="diffusers")
    pieces = (
        Piece("transformer", Krea2Transformer2DModel, "denoiser", convert=checkpoint_keys.krea2),
        Piece("vae", AutoencoderKLQwenImage, "vae", ("vae.",), checkpoint_keys.film_vae,
              alone="vae_film"),
        Piece("text_encoder", Qwen3VLTextModel, "text", (), checkpoint_keys.decoder,
              alone="qwen3_vl",
              wide=True, config=lambda read: Qwen3VLConfig.from_dict(read).text_config))
    vocabularies: ClassVar = {
        "text_encoder": Vocabulary("qwen3", LENGTH - 4)}
    pipe = Krea2Pipeline

    def adapt(self, layout: Layout) -> None:
        shapes = self.shapes(layout)
        layout.configs["transformer"]["num_layers"] = layer_count(shapes, "transformer_blocks.")

    def empty(self, layout: Layout) -> Parts:
        return Parts(layout.source, layout.scheduler, "flow", *self.sizes(layout), film=True,
                     unguided=0.0, flow=LEARNS)

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
