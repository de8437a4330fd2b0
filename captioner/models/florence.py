"""Florence-2: detailed sentences from a small open model (0.23 or 0.77 billion weights, MIT).

transformers' own classes, so no code of the repository is run. The prompt is a task of the model
(caption, detailed, more detailed) or, for fine-tunes, text of their own.
Source: Xiao et al., Florence-2, CVPR 2024.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors import SafetensorError

from captioner.base import Description
from captioner.config import CaptionConfig
from captioner.models.sentences import whole_sentences
from core.base_models import hub
from core.errors import UserError
from core.serialization import from_json
from core.weights import precision

DEFAULT_MODEL = "florence-community/Florence-2-base"
FILES = ("config.json", "*.safetensors")
TASKS = {"": "<DETAILED_CAPTION>", "caption": "<CAPTION>", "short": "<CAPTION>",
         "detailed": "<DETAILED_CAPTION>", "detailed caption": "<DETAILED_CAPTION>",
         "more": "<MORE_DETAILED_CAPTION>", "more detailed": "<MORE_DETAILED_CAPTION>",
         "more detailed caption": "<MORE_DETAILED_CAPTION>"}
# Tasks that answer with boxes.
NO_SENTENCE = {"<OD>", "<OCR>", "<OCR_WITH_REGION>", "<DENSE_REGION_CAPTION>", "<REGION_PROPOSAL>"}
LENGTH = 256                            # tokens; the model mostly ends long before


class Florence:
    title: ClassVar[str] = "Florence-2"

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self.model_name = config.models.get("florence") or DEFAULT_MODEL
        self.task = task_of(config.prompt)
        self.length = config.max_tokens or LENGTH

    def load(self) -> None:
        path = hub.find(self.model_name, FILES)
        folder = path.parent if path.is_file() else path
        try:
            config = from_json((folder / "config.json").read_text("utf-8"))
            kind = str(config.get("model_type"))
        except (OSError, ValueError, AttributeError):
            raise UserError("vision.no_config", folder=folder) from None
        if kind != "florence2":
            raise UserError("vision.other_model", folder=folder, kind=kind)
        # The first releases came with code of their own instead of transformers' classes.
        if "auto_map" in config:
            raise UserError("vision.old_layout", folder=folder, model=DEFAULT_MODEL)
        if not any(folder.glob("*.safetensors")):
            raise UserError("vision.no_safetensors", folder=folder)
        self.precision = precision.choose(self.config.precision, self.config.device)
        from transformers import AutoProcessor, Florence2ForConditionalGeneration
        from transformers.utils import logging
        # Its progress bar would break ours.
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self.model, info = Florence2ForConditionalGeneration.from_pretrained(
                folder, dtype=self.precision.weights, local_files_only=True, use_safetensors=True,
                output_loading_info=True)
        # It is a RuntimeError too, and the runner has a sentence for it.
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError,
                SafetensorError) as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "?"
            raise UserError("vision.unreadable", folder=folder, reason=reason) from None
        if missing := sorted(info["missing_keys"]):
            raise UserError("vision.incomplete", folder=folder, count=len(missing),
                            first=missing[0])
        self.model.eval().to(self.precision.device)
        # The prompt is the same for all pictures. The processor wants one beside it.
        blank = Image.new("RGB", (8, 8))
        self.prompt_ids = self.processor(text=self.task, images=blank,
                                         return_tensors="pt")["input_ids"]

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """Returns the image processor's pixels, (3, H, W) float32."""
        pixels: torch.Tensor = self.processor.image_processor(
            images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return pixels

    def describe(self, batch: Sequence[torch.Tensor]) -> list[Description]:
        if not batch:
            return []
        if not self.config.sample:
            return self._describe(torch.stack(list(batch)))
        # Each picture alone with a seed of its own, so that neighbours don't change its sentence.
        described = []
        for pixels in batch:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                content = zlib.crc32(pixels.numpy().tobytes())
                torch.manual_seed((self.config.seed + content) % 2**63)
                described += self._describe(pixels[None])
        return described

    def identity(self) -> str:
        config = self.config
        drawn = f"{config.seed}|{config.temperature}|{config.top_p}" if config.sample else "beams"
        return f"florence|{hub.stamp(self.model_name)}|{self.task}|{self.length}|" \
               f"{config.min_tokens}|{config.beams}|{drawn}|{config.precision}"

    @torch.inference_mode()
    def _describe(self, pixels: torch.Tensor) -> list[Description]:
        """(N, 3, H, W) -> N descriptions"""
        search: dict[str, Any] = {"do_sample": False, "num_beams": self.config.beams}
        if self.config.sample:
            search = {"do_sample": True, "num_beams": 1, "top_k": 0, "top_p": self.config.top_p,
                      "temperature": self.config.temperature}
        prompt_ids = self.prompt_ids.expand(len(pixels), -1).to(self.precision.device)
        ids = self.model.generate(
            input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids),
            pixel_values=pixels.to(self.precision.device, self.precision.weights),
            max_new_tokens=self.length, min_new_tokens=min(self.config.min_tokens, self.length),
            **search)
        texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        end = self.model.config.text_config.eos_token_id
        descriptions = []
        for text, row in zip(texts, ids, strict=True):
            text = " ".join(re.sub(r"<[\w/]+>", " ", text).split())
            # At the limit the model forces an end token: only an earlier one is its own.
            complete = bool((row[1:self.length] == end).any())
            descriptions.append(Description(text if complete else whole_sentences(text)))
        return descriptions


def task_of(prompt: str) -> str:
    """The model's task for '', 'detailed', '<CAPTION>' and their like; other text stays.

    Raises UserError `vision.task` for tasks that answer with boxes, and for a task with more text.
    """
    text = prompt.strip()
    task = TASKS.get(text.lower().strip("<>").replace("_", " "), text)
    known = [name for name in {*TASKS.values(), *NO_SENTENCE} if name in task]
    if task in NO_SENTENCE or (known and task not in TASKS.values()):
        raise UserError("vision.task", prompt=prompt)
    return task
