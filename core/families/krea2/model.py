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
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLTextModel

from core.families import checkpoint_keys, loading, text
from core.families.base import Cond, Parts
from core.families.checkpoint_keys import Tensors
from core.families.common import TokenizerSpec, denoiser_spec
from core.families.flux import packed
from core.families.krea2.spec import SPEC
from core.families.loading import CheckpointLayout, ComponentSpec, layer_count
from core.families.qwen.model import FILM_VAE, FilmVaeFamily
from core.families.timestep_sampling import TimestepSampling

LENGTH = 512                                # tokens, the request's end among them


def _finish_names(tensors: Tensors) -> Tensors:
    """Renames the parameters that belong to no layer."""
    converted: Tensors = {}
    for name, value in tensors.items():
        # The original code has the six vectors of a block in a row.
        if match := re.fullmatch(r"blocks\.(\d+)\.mod\.lin", name):
            name, value = f"transformer_blocks.{match[1]}.scale_shift_table", value.reshape(6, -1)
        elif name == "last.modulation.lin":
            name = "final_layer.scale_shift_table"
        converted[name] = value
    return converted


class Krea2(FilmVaeFamily):
    kind = SPEC.id
    spec = SPEC
    components = (
        denoiser_spec(Krea2Transformer2DModel, SPEC, _finish_names), FILM_VAE,
        ComponentSpec("text_encoder", Qwen3VLTextModel, "text", (), checkpoint_keys.decoder,
                      file_kind="qwen3_vl", outgrows_fp16=True,
                      config=lambda config: Qwen3VLConfig.from_dict(config).text_config))
    tokenizers: ClassVar = {"text_encoder": TokenizerSpec("qwen3", LENGTH - 4)}
    pipe = Krea2Pipeline
    sampling = TimestepSampling(line=((256, 0.5), (6400, 1.15)))
    no_guidance_value = 0.0

    def adapt(self, layout: CheckpointLayout) -> None:
        shapes = self.shapes(layout)
        layout.configs["transformer"]["num_layers"] = layer_count(shapes, "transformer_blocks.")

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        # The end of the request stands behind the padding.
        tokenizer, request = parts.text["tokenizer"], _request()
        end = request.prompt_template_encode_num_suffix_tokens
        head = text.padded(
            tokenizer, [request.prompt_template_encode_prefix + prompt for prompt in prompts],
            request.prompt_template_encode_start_idx + LENGTH - end)
        tail = text.padded(tokenizer, [request.prompt_template_encode_suffix] * len(prompts), end)
        return {"text_encoder": torch.cat([head.input_ids, tail.input_ids], 1),
                "text_encoder.mask": torch.cat([head.attention_mask, tail.attention_mask], 1)}

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        encoder, start = parts.text["text_encoder"], _request().prompt_template_encode_start_idx
        # Padding counts no position.
        place = (tokens["text_encoder.mask"].long().cumsum(-1) - 1).clamp(min=0)
        out, mask = text.read(encoder, tokens, output_hidden_states=True,
                              position_ids=place.to(encoder.device).expand(3, -1, -1))
        layers = torch.stack([out.hidden_states[n] for n in self._layers(parts)], 2)[:, start:]
        # Padding goes to the end: the transformer gives all text tokens the same position.
        mask, order = mask[:, start:].sort(dim=1, descending=True, stable=True)
        return {"text": layers.take_along_dim(order[:, :, None, None], 1), "mask": mask}

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        places = torch.cat([noisy.new_zeros(cond["text"].shape[1], 3), packed.positions(noisy)])
        return packed.predict(denoiser, noisy, t, cond["text"], position_ids=places,
                              encoder_attention_mask=cond["mask"].bool())

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        # The pipeline counts positions once for both texts: they must be of one length.
        texts, masks = (text.alike(cond[name], negative[name]) for name in ("text", "mask"))
        return {"prompt_embeds": texts[0], "prompt_embeds_mask": masks[0].bool(),
                "negative_prompt_embeds": texts[1], "negative_prompt_embeds_mask": masks[1].bool()}

    def pipe_options(self, parts: Parts) -> dict[str, Any]:
        return {"is_distilled": parts.distilled is not None,
                "text_encoder_select_layers": self._layers(parts)}

    def _layers(self, parts: Parts) -> tuple[int, ...]:
        """The layers of the text encoder that are read: the base's, else the pipeline's."""
        source = parts.source
        index = loading.read_json(source / "model_index.json", source) if source.is_dir() else {}
        layers = index.get("text_encoder_select_layers")
        return tuple(layers or _request().text_encoder_select_layers)


@cache
def _request() -> Krea2Pipeline:
    """A pipeline without models, which knows the request around a caption."""
    return Krea2Pipeline(None, None, None, None, None)
