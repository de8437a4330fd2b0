"""WD taggers: Danbooru tags for anime pictures, by ONNX Runtime (v2 and v3 models).

A model is a folder with model.onnx and selected_tags.csv (tag_id, name, category, count; the
category is 0 general, 4 character, 9 rating). The input is NHWC, BGR, 0..255: the whole picture on
a white square. The output is one probability for each row of the csv. Other taggers with such a csv
take NCHW, which is RGB, normalized as the config beside it says; some give logits.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from captioner.base import Description, Tag
from captioner.captions.text import is_face, tag_key
from captioner.config import CaptionConfig
from core.base_models import hub
from core.errors import UserError
from core.jobs.events import Note
from core.serialization import json_object

DEFAULT_MODEL = "SmilingWolf/wd-vit-tagger-v3"
FILES = ("model.onnx", "selected_tags.csv")
CATEGORIES = {0: "general", 4: "character"}     # ratings (9) and all others are left out
GENERAL, CHARACTER = 0.35, 0.85                 # thresholds as published with the models
PACKAGE = "onnxruntime"
SIDE = 448                              # px, where a model takes any size and its config says none
LARGEST_SIDE = 4096
# Of normalized inputs, where the config says nothing: -1..1.
MEAN, STD = 0.5, 0.5
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
# Of several outputs with a score for each tag, the first that is named so.
OUTPUTS = ("refined", "prob", "pred", "output", "logit")

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
        self._read_signature(file)
        self.logits, self.notes = False, list[Note]()
        try:
            tried = self._run([square(Image.new("RGB", (8, 8), "gray"), self.side)])
        except MemoryError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError("wd.unreadable", path=file, reason=reason) from None
        if tried.shape != (1, len(self.labels)):
            raise UserError("wd.other_tags", path=file, tags=tried.shape[-1],
                            rows=len(self.labels))

    def _read_signature(self, file: Path) -> None:
        """What the model takes and gives. A dimension of any size has a name, not a number."""
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        shape = list(inputs[0].shape)
        known = [(size if isinstance(size, int) and size > 0 else None) for size in shape]
        if len(inputs) != 1 or len(shape) != 4 or inputs[0].type not in DTYPES:
            raise UserError("wd.not_a_tagger", path=file, shape=shape)
        self.channels_first = known[1] == 3 and known[3] != 3
        channels, *sides = known[1:] if self.channels_first else [known[3], *known[1:3]]
        if channels not in (3, None) or len(set(sides) - {None}) > 1:
            raise UserError("wd.not_a_tagger", path=file, shape=shape)
        fitting = [one for one in outputs if one.shape and one.shape[-1] == len(self.labels)]
        if not fitting:
            tags = outputs[0].shape[-1] if outputs[0].shape else 0
            if isinstance(tags, int) and tags > 0:
                raise UserError("wd.other_tags", path=file, tags=tags, rows=len(self.labels))
            fitting = outputs[:1]
        self.output = next((one.name for word in OUTPUTS for one in fitting
                            if word in one.name.lower()), fitting[0].name)
        self.dtype, self.one_by_one = DTYPES[inputs[0].type], known[0] == 1
        own_side, self.mean, self.std = preprocessing(file.parent)
        self.side = next(filter(None, sides), own_side)

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
        pixels: npt.NDArray[Any] = np.stack(group)
        if self.channels_first:
            rgb = pixels[..., ::-1].transpose(0, 3, 1, 2)
            pixels = rgb if self.dtype is np.uint8 else (rgb / 255 - self.mean) / self.std
        given = {self.session.get_inputs()[0].name: np.ascontiguousarray(pixels, self.dtype)}
        try:
            scores = self.session.run([self.output], given)[0]
        # onnxruntime has no class of its own for a lack of memory.
        except Exception as error:
            if re.search(r"alloc|out of memory", str(error), re.IGNORECASE):
                raise MemoryError(str(error)) from None
            raise
        found: npt.NDArray[np.float32] = np.asarray(scores, dtype=np.float32)
        # No probability is outside of 0..1, but for what half precision rounds.
        if not self.logits and (found.min() < -0.01 or found.max() > 1.01):
            self.logits = True
            self.notes.append(Note(key="wd.logits"))
        if self.logits:
            # The sigmoid, in a form that doesn't overflow.
            found = (0.5 + 0.5 * np.tanh(found / 2)).astype(np.float32)
        return found


# --- files ---

def preprocessing(folder: Path) -> tuple[int, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Side, mean and standard deviation as the config beside a model has them (timm's or
    transformers'), else the usual ones."""
    found: dict[str, Any] = {}
    for name in ("config.json", "preprocessor_config.json"):
        data = json_object(folder / name)
        inner = data.get("pretrained_cfg")
        found |= data | (inner if isinstance(inner, dict) else {})
    size = found.get("input_size") or found.get("size")
    mean = found.get("mean", found.get("image_mean"))
    std = found.get("std", found.get("image_std"))
    # By channel, as the pixels are.
    by_channel = (3, 1, 1)
    side = (size[-1] if isinstance(size, list) and size else
            size.get("height") if isinstance(size, dict) else None)
    side = side if isinstance(side, int) and 0 < side <= LARGEST_SIDE else SIDE
    with contextlib.suppress(TypeError, ValueError):
        return (side, np.array(mean, np.float32).reshape(by_channel),
                np.array(std, np.float32).reshape(by_channel))
    return side, np.full(by_channel, MEAN, np.float32), np.full(by_channel, STD, np.float32)


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
