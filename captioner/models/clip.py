"""CLIP by open_clip: ranks a vocabulary against pictures, and measures how alike pictures are.

Score of entry i of a category: softmax over the category of s * cos(picture, text_i), with s the
model's own learned scale and text_i the normalised mean over the category's prompt templates
(zero-shot classification, Radford et al. 2021, arXiv 2103.00020, section 3.1). SigLIP models
(arXiv 2303.15343) are scored the same way; their bias cancels in a softmax.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import huggingface_hub.constants
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.factory import _MODEL_CONFIGS, load_checkpoint
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from captioner.base import Description
from captioner.config import CaptionConfig
from captioner.models import tagging, weights
from core import paths
from core.dataset.cache import Cache, key
from core.errors import UserError
from core.hashes import fingerprint
from core.serialization import from_json
from core.weights import precision

Prepared = NDArray[np.uint8]                # (H, W, 3), resized and cropped for the model
CONFIG = "open_clip_config.json"
VOCABULARY = "vocabulary.yaml"              # beside the weights: the model's own words
TEXTS_AT_ONCE = 256
MOST_TAGS = 12                              # unless the config says otherwise
# What open_clip raises on files that don't fit.
BROKEN = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError, OSError,
          SafetensorError, StopIteration)


class ClipTagger:
    title: ClassVar[str] = "CLIP"

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self.name = config.models.get("clip", "demo")
        self.most = config.most_tags or MOST_TAGS
        self.user_vocabulary = (tagging.load_vocabulary(paths.expanded(config.vocabulary))
                                if config.vocabulary else None)

    # --- loading ---

    def load(self) -> None:
        folder = find(self.name)
        self.precision = precision.choose(self.config.precision, self.config.device)
        # The user's vocabulary, the model's own, or ours.
        self.vocabulary = self._vocabulary(folder)
        settings = _settings(folder, self.name)
        try:
            with _quiet_and_offline():
                self.model, self.tokenizer = _open(folder, settings)
        except BROKEN as error:
            raise weights.broken("clip", self.name, folder, error) from None
        self.model.eval().requires_grad_(False)
        self.model.to(self.precision.device, self.precision.weights)
        preprocess = PreprocessCfg(**self.model.visual.preprocess_cfg)
        steps = image_transform_v2(preprocess, is_train=False).transforms
        # The last two steps, x / 255 and (x - mean) / std, are done on the model's device.
        self._resize = steps[:-2]
        self._mean, self._std = (torch.tensor(v, device=self.precision.device).view(3, 1, 1)
                                 for v in (steps[-1].mean, steps[-1].std))
        # CLIP's learned temperature: cosines are too close to one another for a softmax.
        self.scale = float(self.model.logit_scale.exp())
        self.embeddings = self._vocabulary_embeddings()

    def _vocabulary(self, folder: Path) -> tagging.Vocabulary:
        if self.user_vocabulary is not None:
            return self.user_vocabulary
        beside = folder / VOCABULARY
        return tagging.load_vocabulary(beside) if beside.exists() else tagging.built_in()

    def identity(self) -> str:
        """Names the weights, the vocabulary and the options that change tags."""
        folder = find(self.name)
        vocabulary = self._vocabulary(folder)
        c = self.config
        options = (vocabulary, self.most, c.tag_threshold, tuple(c.exclude), c.precision)
        chosen = hashlib.sha256(repr(options).encode()).hexdigest()[:16]
        return f"clip:{_fingerprint(folder)}:{chosen}"

    # --- texts ---

    def _vocabulary_embeddings(self) -> list[Tensor]:
        """One (entries, D) for each category, cached on disk: the mean of the normalised
        embeddings of an entry's prompts, normalised again."""
        cache = Cache("vocabularies", _fingerprint(find(self.name)))
        name = key(tagging.digest(self.vocabulary), str(self.precision.weights))
        embeddings = cache.get(name)
        if embeddings is None:
            embeddings = {}
            for number, category in enumerate(self.vocabulary):
                prompts = [category.prompts(entry) for entry in category.entries]
                rows = self.embed_texts([text for texts in prompts for text in texts])
                parts = torch.split(rows, [len(texts) for texts in prompts])
                means = torch.stack([part.mean(0) for part in parts])
                embeddings[str(number)] = F.normalize(means, dim=-1)
            # A full disk costs time at the next start, not this one.
            with contextlib.suppress(OSError):
                cache.put(name, embeddings)
        return [embeddings[str(n)].to(self.precision.device) for n in range(len(self.vocabulary))]

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Returns (len(texts), D) float32 of length one each, on the model's device."""
        parts = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            ids = self.tokenizer(list(texts[start:start + TEXTS_AT_ONCE]))
            parts.append(_encode_text(self.model, ids.to(self.precision.device)))
        return F.normalize(torch.cat(parts).float(), dim=-1)

    # --- pictures ---

    def prepare(self, image: Image.Image) -> Prepared:
        """Resizes and crops as open_clip does. The result is bytes: a quarter of the memory, and
        the arithmetic is done once for the whole batch."""
        for step in self._resize:
            image = step(image)
        return np.asarray(image)

    @torch.inference_mode()
    def embed_images(self, batch: Sequence[Prepared]) -> Tensor:
        """Prepared pictures -> (N, D) float32, each of length one, on the model's device."""
        pixels = torch.from_numpy(np.stack(batch)).to(self.precision.device).permute(0, 3, 1, 2)
        pixels = pixels.contiguous().float().div_(255).sub_(self._mean).div_(self._std)
        embedded = self.model.encode_image(pixels.to(self.precision.weights))
        return F.normalize(embedded.float(), dim=-1)

    def scores(self, batch: Sequence[Prepared]) -> list[NDArray[np.float64]]:
        """(pictures, entries) for each category, each row a distribution over its entries."""
        pictures = self.embed_images(batch)
        return [tagging.softmax((self.scale * pictures @ texts.T).cpu().numpy())
                for texts in self.embeddings]

    def describe(self, batch: Sequence[Prepared]) -> list[Description]:
        c = self.config
        scores = self.scores(batch)
        descriptions = []
        for n in range(len(batch)):
            tags = [tag for category, rows in zip(self.vocabulary, scores, strict=True)
                    for tag in tagging.choose(category, rows[n], c.tag_threshold, c.exclude)]
            descriptions.append(Description(tags=tagging.best(tags, self.most)))
        return descriptions


def _encode_text(model: Any, ids: Tensor) -> Tensor:
    """encode_text without the padding behind the longest text. A causal text tower that is read at
    the end of the text never sees it, and the prompts of a vocabulary fill 8 of 77 positions."""
    longest = int(ids.argmax(1).max()) + 1
    if (type(model) is not open_clip.CLIP or model.text_pool_type != "argmax"
            or model.attn_mask is None or longest >= ids.shape[1]):
        return model.encode_text(ids)       # type: ignore[no-any-return]
    positions = torch.nn.Parameter(model.positional_embedding[:longest], requires_grad=False)
    mask = model.attn_mask[:longest, :longest]
    with (mock.patch.dict(model._parameters, positional_embedding=positions),
          mock.patch.dict(model._buffers, attn_mask=mask)):
        return model.encode_text(ids[:, :longest])      # type: ignore[no-any-return]


# --- files ---

def find(name: str) -> Path:
    """The folder of the weights. `name` is open_clip's (`ViT-B-32/laion2b_s34b_b79k`), a hub
    repository, or a folder."""
    architecture, _, tag = name.partition("/")
    pretrained = get_pretrained_cfg(architecture, tag) if tag else {}
    repository = str(pretrained.get("hf_hub", "")).rpartition("/")[0]
    return weights.find("clip", name, repository or name)


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """open_clip_config.json, or the same from open_clip's own registry."""
    try:
        settings: dict[str, Any] = from_json((folder / CONFIG).read_text("utf-8"))
        if not isinstance(settings.get("model_cfg"), dict):
            raise ValueError("model_cfg is missing")
        return settings
    except (ValueError, AttributeError, UnicodeDecodeError) as error:
        raise UserError("clip.bad_config", file=folder / CONFIG, problem=error) from None
    except OSError:
        architecture, _, tag = name.partition("/")
        model = open_clip.get_model_config(architecture)
        if model is None or not tag:
            raise UserError("clip.no_config", folder=folder, file=CONFIG) from None
        return {"model_cfg": model, "preprocess_cfg": get_pretrained_cfg(architecture, tag)}


def _open(folder: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The model with its weights from safetensors, and its tokenizer."""
    file = weights.safetensors_of("clip", folder, ("open_clip_model.safetensors",
                                                   "model.safetensors"))
    model_cfg, preprocess = settings["model_cfg"], settings.get("preprocess_cfg") or {}
    # timm would fetch weights of its own.
    if "timm_model_name" in (vision := model_cfg.get("vision_cfg", {})):
        model_cfg = {**model_cfg, "vision_cfg": {**vision, "timm_model_pretrained": False}}
    # open_clip makes models only by name, so the config gets one for this moment.
    name = "darkroom-" + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    with mock.patch.dict(_MODEL_CONFIGS, {name: model_cfg}):
        model = open_clip.create_model(
            name, load_weights=False, pretrained_image=False, pretrained_text=False,
            force_preprocess_cfg={k: v for k, v in preprocess.items() if k != "size"})
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}" if (folder / CONFIG).exists()
                                            else name)
    # The file that was chosen above: never a pickle, which could run code.
    load_checkpoint(model, str(file))
    return model, tokenizer


@contextlib.contextmanager
def _quiet_and_offline() -> Iterator[None]:
    """Keeps open_clip from fetching files that the user didn't ask for, and from logging.

    It logs through the root logger, which would install a handler for the whole application, and
    warns of random weights before it gets the right ones.
    """
    def drop(_: logging.LogRecord) -> bool:
        return False

    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    # A filter of the root drops only what is logged at the root itself.
    root.addFilter(drop)
    try:
        with mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True):
            yield
    finally:
        root.removeFilter(drop)
        root.removeHandler(silent)


def _fingerprint(folder: Path) -> str:
    files = [*folder.glob("*.safetensors"), *folder.glob(CONFIG)]
    return fingerprint((path, "") for path in files)
