"""WD taggers: Danbooru tags for anime pictures, by ONNX Runtime (v2 and v3 models).

A model is a folder with model.onnx and selected_tags.csv (tag_id, name, category, count; the
category is 0 general, 4 character, 9 rating). The input is NHWC, BGR, 0..255: the whole picture on
a white square. The output is one probability for each row of the csv.
"""

from __future__ import annotations

import csv
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from captioner.base import Description, Tag
from captioner.captions.text import is_face, tag_key
from captioner.config import CaptionConfig
from core.base_models import hub
from core.errors import UserError

DEFAULT_MODEL = "SmilingWolf/wd-vit-tagger-v3"
FILES = ("model.onnx", "selected_tags.csv")
CATEGORIES = {0: "general", 4: "character"}     # ratings (9) and all others are left out
GENERAL, CHARACTER = 0.35, 0.85                 # thresholds as published with the models
PACKAGE = "onnxruntime"

Label = tuple[str, str]                         # the tag as captions have it; category, "": none
Pixels = npt.NDArray[np.uint8]                  # (side, side, 3), BGR


class WdTagger:
    title: ClassVar[str] = "WD tagger"

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self.model = config.models.get("wd") or DEFAULT_MODEL
        self.thresholds = {
            "general": GENERAL if config.tag_threshold is None else config.tag_threshold,
            "character": (CHARACTER if config.character_threshold is None
                          else config.character_threshold)}
        # The thresholds alone decide, as published, unless the user sets a number.
        self.most = config.most_tags

    def load(self) -> None:
        try:
            runtime = importlib.import_module(PACKAGE)
        except ImportError as error:
            raise UserError("wd.no_runtime", reason=error) from None
        folder = hub.find(self.model, FILES)
        folder = folder.parent if folder.is_file() else folder
        file, table = (folder / name for name in FILES)
        for path in (file, table):
            if not path.is_file():
                raise UserError("wd.incomplete", folder=folder, file=path.name)
        self.labels = read_labels(table, self.config)
        has_cuda = "CUDAExecutionProvider" in runtime.get_available_providers()
        device = self.config.device
        # `auto` falls back to the CPU; a GPU that the user asked for must be there.
        if device == "cuda" and not has_cuda:
            raise UserError("wd.no_cuda")
        gpu = ["CUDAExecutionProvider"] if has_cuda and device in ("auto", "cuda") else []
        options = runtime.SessionOptions()
        options.log_severity_level = 3              # errors only
        try:
            self.session = runtime.InferenceSession(
                str(file), options, providers=[*gpu, "CPUExecutionProvider"])
        # Its classes come from C++ and have no common base.
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError("wd.unreadable", path=file, reason=reason) from None
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        shape, tags = inputs[0].shape, outputs[0].shape[-1]
        # A dimension that may be of any size has a name instead of a number.
        if len(inputs) != 1 or len(shape) != 4 or shape[3] != 3 or not isinstance(shape[1], int):
            raise UserError("wd.not_a_tagger", path=file, shape=shape)
        if isinstance(tags, int) and tags != len(self.labels):
            raise UserError("wd.other_tags", path=file, tags=tags, rows=len(self.labels))
        self.side, self.one_by_one = shape[1], shape[0] == 1

    def prepare(self, image: Image.Image) -> Pixels:
        return square(image, self.side)

    def describe(self, batch: Sequence[Pixels]) -> list[Description]:
        # Some models were exported for a batch of one.
        groups = [[pixels] for pixels in batch] if self.one_by_one else [list(batch)]
        descriptions = []
        for scores in (row for group in groups if group for row in self._run(group)):
            tags = [Tag(tag, float(scores[at]), category)
                    for at in np.argsort(-scores, kind="stable")
                    for tag, category in [self.labels[at]]
                    if category and scores[at] >= self.thresholds[category]]
            descriptions.append(Description(tags=tuple(tags[:self.most])))
        return descriptions

    def identity(self) -> str:
        config = self.config
        return f"wd|{hub.stamp(self.model)}|{self.thresholds}|{self.most}|{config.underscores}|" \
               f"{config.escape_brackets}|{sorted(config.exclude)}"

    def _run(self, group: list[Pixels]) -> npt.NDArray[np.float32]:
        """(N, side, side, 3) -> (N, tags)"""
        pixels = np.stack(group).astype(np.float32)
        try:
            scores = self.session.run(None, {self.session.get_inputs()[0].name: pixels})[0]
        # onnxruntime has no class of its own for a lack of memory.
        except Exception as error:
            if re.search(r"alloc|out of memory", str(error), re.IGNORECASE):
                raise MemoryError(str(error)) from None
            raise
        return np.asarray(scores, dtype=np.float32)


# --- files ---

def read_labels(path: Path, config: CaptionConfig) -> list[Label]:
    """One label a row, in the model's order. Raises UserError `wd.bad_tags` with file and line."""
    labels, excluded = [], {tag_key(tag) for tag in config.exclude}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                category = CATEGORIES.get(int(row["category"]), "")
                name = row["name"].strip()
                labels.append((written(name, config.underscores, config.escape_brackets),
                               "" if tag_key(name) in excluded else category))
    except (KeyError, ValueError, AttributeError, TypeError, csv.Error):
        raise UserError("wd.bad_tags", path=path, line=len(labels) + 2) from None
    if not labels:
        raise UserError("wd.bad_tags", path=path, line=1)
    return labels


def written(name: str, underscores: bool = False, escape: bool = False) -> str:
    r"""`long_hair` -> `long hair`; with `escape` `fate_(series)` -> `fate \(series\)`. Faces such
    as ^_^ keep their underscores."""
    if not underscores and not is_face(name):
        name = name.replace("_", " ")
    return re.sub(r"([()])", r"\\\1", name) if escape else name


def square(image: Image.Image, side: int) -> Pixels:
    """The whole picture on a white square, resized (bicubic), as BGR bytes."""
    image = image.convert("RGB")
    longest = max(image.size)
    if image.size != (longest, longest):
        canvas = Image.new("RGB", (longest, longest), "white")
        canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        image = canvas
    if longest != side:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
