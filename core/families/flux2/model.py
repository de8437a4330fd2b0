"""Flux.2 klein (Black Forest Labs 2026), 4B and 9B: a flow; three layers of Qwen3 are the text.

No paper; what is here is the reference code's and diffusers' own: latents normalised by the VAE's
batch norm in tokens of 2 x 2; layers 9, 18 and 27 of the text side by side, padding included, since
the transformer has no mask. klein has no guidance as an input. The base models draw with true
guidance, the distilled ones without. Noise levels are learned on Flux.1's line (mu 0.5 to 1.15):
the sampler's shift (e^2 at 4096 tokens) would leave 2 % of the draws below 1/2, and the trainers
that its users know all stay below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from core.families import checkpoint_keys, text
from core.families.base import Cond, Parts
from core.families.common import FlowFamily, TokenizerSpec, denoiser_spec
from core.families.flux import packed
from core.families.flux2.spec import SPEC
from core.families.loading import CheckpointLayout, ComponentSpec, block_counts
from core.families.timestep_sampling import FLUX_LINE, TimestepSampling

LENGTH = 512                                # tokens
LAYERS = (9, 18, 27)                        # of the text encoder, by their outputs
QWEN3_8B = {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
QWEN3 = tuple(f"text_encoders.{size}.transformer." for size in ("qwen3_4b", "qwen3_8b"))


def read_layers(config: dict[str, Any]) -> Any:
    """The config of Qwen3 up to one layer beyond the last that is read: the output of the very last
    layer is normalised."""
    layers = min(config["num_hidden_layers"], LAYERS[-1] + 1)
    return Qwen3Config.from_dict(config | {"num_hidden_layers": layers, "layer_types": None})


class Klein(Flux2KleinPipeline):            # type: ignore[misc]
    """Takes a negative prompt, as the other families' pipelines do."""

    def __call__(self, negative_prompt: str = "", **options: Any) -> Any:
        if negative_prompt:
            options["negative_prompt_embeds"] = self.encode_prompt(negative_prompt)[0]
        return super().__call__(**options)


class Flux2(FlowFamily):
    kind = SPEC.id
    spec = SPEC
    components = (
        denoiser_spec(Flux2Transformer2DModel, SPEC),
        ComponentSpec("vae", AutoencoderKLFlux2, "vae", ("vae.",),
                      checkpoint_keys.batch_normed_vae, file_kind="vae_32"),
        ComponentSpec("text_encoder", Qwen3Model, "text", QWEN3, checkpoint_keys.decoder,
                      file_kind="qwen3", outgrows_fp16=True, config=read_layers))
    # Eleven of its tokens are the chat template's.
    tokenizers: ClassVar = {
        "text_encoder": TokenizerSpec("qwen3", LENGTH - 11, chat=text.QWEN3_CHAT)}
    pipe = Klein
    sampling = TimestepSampling(line=FLUX_LINE)

    def adapt(self, layout: CheckpointLayout) -> None:
        # 4B and 9B differ in sizes that the shapes tell.
        shapes = self.shapes(layout)
        config = layout.configs["transformer"]
        heads = shapes["x_embedder.weight"][0] // config["attention_head_dim"]
        config |= {**block_counts(shapes), "num_attention_heads": heads,
                   "joint_attention_dim": shapes["context_embedder.weight"][1]}
        if config["joint_attention_dim"] == len(LAYERS) * QWEN3_8B["hidden_size"]:
            layout.configs["text_encoder"] |= QWEN3_8B

    def tokenize(self, parts: Parts, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer = parts.text["tokenizer"]
        return text.masked_tokens(tokenizer, text.chat(tokenizer, prompts, thinking=False), LENGTH)

    def encode_tokens(self, parts: Parts, tokens: dict[str, Tensor]) -> Cond:
        out, _ = text.read(parts.text["text_encoder"], tokens, output_hidden_states=True)
        return {"text": torch.cat([out.hidden_states[layer] for layer in LAYERS], -1)}

    def encode_image(self, parts: Parts, pixels: Tensor) -> Tensor:
        # The VAE's batch norm normalises tokens of 2 x 2 latent pixels.
        with torch.no_grad():
            vae = parts.vae
            latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
            height, width = latents.shape[2] // 2, latents.shape[3] // 2
            spread = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
            normal = (packed.pack(latents) - vae.bn.running_mean) / spread
            return packed.unpack(normal.to(latents), height, width)

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = noisy.shape[2] // 2, noisy.shape[3] // 2
        return packed.predict(
            denoiser, noisy, t, cond["text"], img_ids=places(noisy, (height, width), 1),
            txt_ids=places(noisy, (cond["text"].shape[1],), 3))

    def prompt_arguments(self, cond: Cond, negative: Cond) -> dict[str, Tensor]:
        return {"prompt_embeds": cond["text"], "negative_prompt_embeds": negative["text"]}

    def pipe_options(self, parts: Parts) -> dict[str, Any]:
        # Of a distilled base the pipeline would ignore the user's cfg. Where the user says nothing
        # it is 1 all the same (core.families.distilled).
        return {"is_distilled": False}


def places(like: Tensor, sides: tuple[int, ...], axis: int) -> Tensor:
    """(tokens, 4): time, row, column and word of each token. `sides` are those of the grid of
    tokens, whose first side is counted in the column `axis`."""
    ids = like.new_zeros(*sides, 4)
    for n, side in enumerate(sides):
        count = torch.arange(side, device=like.device, dtype=like.dtype)
        ids[..., axis + n] = count.view([-1 if m == n else 1 for m in range(len(sides))])
    return ids.flatten(0, -2)
