"""Florence-2: detailed sentences from a small open model (0.23 or 0.77 billion weights, MIT).

transformers' own classes, so no code of the repository is run. The prompt is a task of the model
(caption, detailed, more detailed) or, for fine-tunes, text of their own.
Source: Xiao et al., Florence-2, CVPR 2024.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors import SafetensorError

from captioner.base import CaptionerSpec, Description
from captioner.config import CaptionConfig
from captioner.models.sentences import whole_sentences
from core.base_models import hub
from core.errors import UserError
from core.serialization import from_json
from core.weights import precision

NEEDS = ("config.json", "*.safetensors")
TASKS = {"": "<DETAILED_CAPTION>", "caption": "<CAPTION>", "short": "<CAPTION>",
         "detailed": "<DETAILED_CAPTION>", "detailed caption": "<DETAILED_CAPTION>",
         "more": "<MORE_DETAILED_CAPTION>", "more detailed": "<MORE_DETAILED_CAPTION>",
         "more detailed caption": "<MORE_DETAILED_CAPTION>"}
NO_SENTENCE = {"<OD>", "<OCR>", "<OCR_WITH_REGION>", "<DENSE_REGION_CAPTION>", "<REGION_PROPOSAL>"}
LENGTH = 256                            # tokens; the model ends by itself far before


class Florence:
    spec: ClassVar[CaptionerSpec] = CaptionerSpec(
        id="florence", title="Florence-2", makes="sentence",
        default_model="florence-community/Florence-2-base",
        models=("florence-community/Florence-2-base", "florence-community/Florence-2-large"))

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self.model_name = config.models.get("florence") or self.spec.default_model
        self.task = task_of(config.prompt)
        default = CaptionConfig.model_fields["max_tokens"].default
        self.length = LENGTH if config.max_tokens in (None, default) else config.max_tokens
        self.model: Any = None
        self.processor: Any = None

    def load(self) -> None:
        found = hub.find(self.model_name, NEEDS)
        folder = found.parent if found.is_file() else found
        _check(folder)
        self.number = precision.choose(self.config.precision, self.config.device)
        self.model, self.processor = _read(folder, self.number.weights)
        self.model.to(self.number.device)
        blank = Image.new("RGB", (8, 8))
        self.prompt_ids = self.processor(text=self.task, images=blank,
                                         return_tensors="pt")["input_ids"]

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """-> (3, H, W) float32, as the model's image processor makes them"""
        pixels: torch.Tensor = self.processor.image_processor(
            images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return pixels

    def describe(self, batch: Sequence[torch.Tensor]) -> list[Description]:
        if not batch:
            return []
        if not self.config.sample:
            return self._described(torch.stack(list(batch)))
        described = []
        for one in batch:               # alone, so that the batch size doesn't change the draws
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed((self.config.seed + zlib.crc32(one.numpy().tobytes())) % 2**63)
                described += self._described(one[None])
        return described

    def identity(self) -> str:
        config = self.config
        drawn = f"{config.seed}|{config.temperature}|{config.top_p}" if config.sample else "beams"
        return f"florence|{hub.stamp(self.model_name)}|{self.task}|{self.length}|" \
               f"{config.min_tokens}|{config.beams}|{drawn}|{config.precision}"

    @torch.inference_mode()
    def _described(self, pixels: torch.Tensor) -> list[Description]:
        """(N, 3, H, W) -> N sentences"""
        ids = self.prompt_ids.expand(len(pixels), -1).to(self.number.device)
        written = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids),
            pixel_values=pixels.to(self.number.device, self.number.weights),
            max_new_tokens=self.length, min_new_tokens=min(self.config.min_tokens, self.length),
            **self._search())
        texts = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        end = self.model.config.text_config.eos_token_id
        # the model forces an end at the limit itself: only an earlier one is its own
        return [Description(sentence=_tidy(text, bool((row[1:self.length] == end).any())))
                for text, row in zip(texts, written, strict=True)]

    def _search(self) -> dict[str, Any]:
        if self.config.sample:
            return {"do_sample": True, "num_beams": 1, "top_k": 0, "top_p": self.config.top_p,
                    "temperature": self.config.temperature}
        return {"do_sample": False, "num_beams": self.config.beams}


def task_of(prompt: str) -> str:
    """'', 'detailed', '<CAPTION>' -> the model's task; other text stays.

    Raises UserError `vision.task` for tasks that answer with boxes, and for a task with more text.
    """
    text = prompt.strip()
    task = TASKS.get(text.lower().strip("<>").replace("_", " "), text)
    known = [name for name in {*TASKS.values(), *NO_SENTENCE} if name in task]
    if task in NO_SENTENCE or (known and task not in TASKS.values()):
        raise UserError("vision.task", prompt=prompt)
    return task


def _tidy(text: str, ended: bool) -> str:
    text = " ".join(re.sub(r"<[\w/]+>", " ", text).split())
    return text if ended else whole_sentences(text)


def _check(folder: Path) -> None:
    """What can be told before torch reads a byte."""
    try:
        config = from_json((folder / "config.json").read_text("utf-8"))
        kind = str(config.get("model_type"))
    except (OSError, ValueError, AttributeError):
        raise UserError("vision.no_config", folder=folder) from None
    if kind != "florence2":
        raise UserError("vision.other_model", folder=folder, kind=kind)
    if "auto_map" in config:
        raise UserError("vision.old_layout", folder=folder, model=Florence.spec.default_model)
    if not any(folder.glob("*.safetensors")):
        raise UserError("vision.no_safetensors", folder=folder)


def _read(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoProcessor, Florence2ForConditionalGeneration
    from transformers.utils import logging
    logging.disable_progress_bar()      # it would tear our own
    logging.set_verbosity_error()
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model, info = Florence2ForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True,
            output_loading_info=True)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError,
            SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "?"
        raise UserError("vision.unreadable", folder=folder, reason=reason) from None
    if missing := sorted(info["missing_keys"]):
        raise UserError("vision.incomplete", folder=folder, count=len(missing), first=missing[0])
    return model.eval(), processor
