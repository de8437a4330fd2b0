"""BLIP and BLIP-2 by transformers: a sentence per picture, by beam search or by sampling.

The model's config.json tells which of the two it is. All pictures of a batch have one size and one
prompt, so nothing is padded, and a picture gets the same sentence in a batch as alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from captioner.base import Description
from captioner.config import CaptionConfig
from captioner.models import weights
from core.errors import UserError
from core.hashes import fingerprint
from core.serialization import from_json
from core.weights import precision

CLASSES = {"blip": "BlipForConditionalGeneration", "blip-2": "Blip2ForConditionalGeneration"}
# What transformers raises on files that don't fit.
BROKEN = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError)
LENGTH = 40                                 # tokens, unless the config says otherwise
Prepared = NDArray[np.float32]              # (3, H, W), from the model's own processor


class Blip:
    title: ClassVar[str] = "BLIP"

    def __init__(self, config: CaptionConfig) -> None:
        self.most = config.max_tokens or LENGTH
        if config.min_tokens > self.most:
            raise UserError("blip.lengths", least=config.min_tokens, most=self.most)
        self.config = config
        self.name = config.models.get("blip", "demo")

    def load(self) -> None:
        folder = weights.find("blip", self.name)
        kind = model_type(folder)
        weights.safetensors_of("blip", folder, ("model.safetensors",))
        self.precision = precision.choose(self.config.precision, self.config.device)
        # Its progress bar would break ours.
        transformers.utils.logging.disable_progress_bar()
        try:
            self.processor = transformers.AutoProcessor.from_pretrained(
                folder, local_files_only=True)
            model = getattr(transformers, CLASSES[kind]).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=self.precision.weights)
        except BROKEN as error:
            raise weights.broken("blip", self.name, folder, error) from None
        self.model = model.eval().requires_grad_(False).to(self.precision.device)
        # The prompt's token ids as one row; BLIP-2's have places for the picture's own tokens.
        self.prompt: dict[str, Tensor] = {}
        if self.config.prompt:
            blank = Image.new("RGB", (32, 32))
            inputs = self.processor(images=blank, text=self.config.prompt, return_tensors="pt")
            self.prompt = {k: inputs[k] for k in ("input_ids", "attention_mask")}

    def identity(self) -> str:
        """Names the weights and the options that change sentences."""
        c = self.config
        folder = weights.find("blip", self.name)
        options = (c.prompt, self.most, c.min_tokens, c.precision,
                   (c.temperature, c.top_p, c.seed) if c.sample else c.beams)
        files = [*folder.glob("*.safetensors"), folder / "config.json"]
        chosen = hashlib.sha256(repr(options).encode()).hexdigest()[:16]
        return f"blip:{fingerprint((path, '') for path in files)}:{chosen}"

    # --- pictures ---

    def prepare(self, image: Image.Image) -> Prepared:
        with torch.inference_mode():
            pixels = self.processor.image_processor(images=image, return_tensors="pt")
        array: Prepared = pixels["pixel_values"][0].numpy()
        return array

    def describe(self, batch: Sequence[Prepared]) -> list[Description]:
        return [Description(sentence=text) for text in self.sentences(batch)]

    @torch.inference_mode()
    def sentences(self, batch: Sequence[Prepared]) -> list[str]:
        device = self.precision.device
        pixels = torch.from_numpy(np.stack(batch)).to(device, self.precision.weights)
        prompt = {k: v.repeat(len(batch), 1).to(device) for k, v in self.prompt.items()}
        c = self.config
        options: dict[str, Any] = {"num_beams": c.beams}
        if c.sample:
            # Not generate()'s own sampling: a picture's draws would depend on its neighbours.
            steps: list[Any] = [transformers.TemperatureLogitsWarper(c.temperature)]
            if c.top_p < 1:
                steps.append(transformers.TopPLogitsWarper(c.top_p))
            steps.append(GumbelNoise([seed_of(picture, c.seed) for picture in batch]))
            options = {"num_beams": 1, "logits_processor": transformers.LogitsProcessorList(steps)}
        ids = self.model.generate(pixel_values=pixels, **prompt, do_sample=False,
                                  max_new_tokens=self.most, min_new_tokens=c.min_tokens, **options)
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [with_prompt(text, c.prompt) for text in texts]


class GumbelNoise(transformers.LogitsProcessor):  # type: ignore[misc]
    """Makes greedy search sample: argmax(logits + Gumbel noise) is a draw from their softmax
    (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030). Every picture has its own generator, so
    its sentence doesn't depend on the other pictures of the batch."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [torch.rand(scores.shape[1], generator=g, dtype=torch.float64)
                for g in self.generators]
        noise = -(-torch.stack(rows).clamp_min(1e-300).log()).log()
        return scores.float() + noise.to(scores.device, torch.float32)


def seed_of(picture: Prepared, seed: int) -> int:
    """A seed from the picture's content: the same in any batch, order and run."""
    content = hashlib.sha256(np.ascontiguousarray(picture).tobytes() + seed.to_bytes(8, "little"))
    return int.from_bytes(content.digest()[:7], "little")


def with_prompt(text: str, prompt: str) -> str:
    """Puts the prompt before the sentence; a question (it ends in ? or :) is left out instead."""
    text, prompt = " ".join(text.split()), " ".join(prompt.split())
    # Some models repeat the prompt, in lower case.
    rest = text[len(prompt):].lstrip() if text.lower().startswith(prompt.lower()) else text
    if not prompt or prompt.endswith(("?", ":", "？", "：")):
        return rest
    return f"{prompt} {rest}".strip()


def model_type(folder: Path) -> str:
    """"blip" or "blip-2". Raises UserError for another model's folder."""
    file = folder / "config.json"
    try:
        settings = from_json(file.read_text("utf-8"))
        kind = str(settings["model_type"])
    except OSError:
        raise UserError("blip.no_config", folder=folder) from None
    except (ValueError, KeyError, TypeError):
        raise UserError("blip.bad_config", file=file) from None
    if kind not in CLASSES:
        raise UserError("blip.other_model", folder=folder, kind=kind)
    return kind
