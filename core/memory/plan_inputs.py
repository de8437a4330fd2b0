"""What a plan needs to know: this machine, a base by its name, the pictures by their headers.

Cheap facts only, no torch: 10,000 pictures are weighed in seconds, none is decoded.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import factorial
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from core import families, i18n, paths, plugins, threads
from core.config import TrainConfig
from core.dataset import captions, curation, image_folder
from core.dataset.buckets import BucketRule, Size
from core.dataset.crops import TokenCounter
from core.dataset.images import FORMATS, MAX_MEGAPIXELS, Look, prepare
from core.errors import UserError
from core.families.detection import Base
from core.lora_files.library import prompts_of
from core.memory import plan
from core.memory.plan import Data, Machine, Plan
from core.system import gpu, machine

# --- the config ---

def without_code(config: TrainConfig) -> tuple[TrainConfig, dict[str, str]]:
    """The config as a plan may count it, and what it doesn't count: the code that `adapter` and
    `optimizer` name runs by the user's start alone. The usual ones stand in its place."""
    named = {key: value for key in ("adapter", "optimizer")
             if "." in (value := getattr(config, key)) or plugins.is_named(value)}
    if not named:
        return config, {}
    usual: dict[str, Any] = {key: TrainConfig.model_fields[key].default for key in named}
    usual |= {"optimizer_args": {}} if "optimizer" in named else {}
    return config.with_changes(**usual), named


# --- the machine and the base ---

def machine_here(device: str = "auto") -> Machine:
    """Where training would go: the first visible card, Apple's chip, else the CPU. Never raises."""
    total, free = machine.ram()
    disk = machine.disk_free(paths.cache_dir()) or 0.0
    card = gpu.chosen(gpu.report()) if device in ("auto", "cuda") else None
    if card is not None:
        return Machine("cuda", card.name, card.total_mb, card.free_mb, card.capability, free, disk)
    apple = device in ("auto", "mps") and sys.platform == "darwin" and any(
        chip.support == "mps" for chip in machine.accelerators())
    return Machine("mps" if apple else "cpu", machine.cpu_name(), total, free, ram_mb=free,
                   disk_mb=disk)


def base_of(name: str, family: str = "auto") -> Base:
    """`demo`, a folder, a file, or a family's id for its standard shapes. Raises UserError."""
    if name == "demo":
        return Base.of(paths.DEMO / "base", family)
    path = paths.expanded(name)
    if os.path.exists(path):
        return Base.of(path, family)
    if name in families.SPECS:
        return Base.of(_shapes(name), name)
    raise UserError("plan.no_base", base=name, folder=Path.cwd(), known=", ".join(families.SPECS),
                    nearest=(i18n.nearest(name, [*families.SPECS, "demo"], 1) or ["demo"])[0])


def _shapes(family: str) -> Path:
    """A base without weights: the family's configs, and the tokenizer that ships with the app."""
    folder = paths.cache_dir() / "shapes" / family
    configs = paths.family_configs(family)
    files = [(path, path.relative_to(configs)) for path in configs.rglob("*.json")]
    # Families that read with CLIP first and bring no tokenizer take the demo base's: it is CLIP's.
    if b'"clip_text_model"' in (configs / "text_encoder" / "config.json").read_bytes():
        source = configs if (configs / "tokenizer").is_dir() else paths.DEMO / "base"
        files += [(path, path.relative_to(source)) for path in (source / "tokenizer").iterdir()]
    for path, inner in dict(files).items():
        if not (folder / inner).exists():
            with paths.atomic(folder / inner) as fresh:
                shutil.copyfile(path, fresh)
    return folder


# --- the pictures ---

@dataclass(frozen=True, slots=True)
class Pictures:
    """What of a folder of pictures decides how much memory a run takes."""

    sizes: tuple[Size, ...]                     # px, as seen
    repeats: tuple[int, ...]
    captions: tuple[str, ...]
    regular: tuple[Size, ...] = ()              # of regularisation pictures


def pictures_of(config: TrainConfig) -> Pictures:
    """A config's folders. Raises UserError as `pictures_in` does."""
    metadata = paths.expanded(config.metadata_path) if config.metadata_path else None
    pictures = pictures_in(paths.expanded(config.train_data_dir), metadata)
    if not config.reg_data_dir:
        return pictures
    regular = pictures_in(paths.expanded(config.reg_data_dir))
    return replace(pictures, captions=pictures.captions + regular.captions, regular=regular.sizes)


def pictures_in(folder: Path, metadata: Path | None = None) -> Pictures:
    """The pictures of a folder by their headers alone, without those left out. A torn picture
    counts: training's scan finds it. Raises UserError where the folder has none."""
    prepare()
    pictures = image_folder.scan(
        folder, metadata, left_out=curation.load(folder).left_out,
        look_all=lambda files: threads.in_order(header, files, "weigh")).pictures
    return Pictures(tuple(p.size for p in pictures), tuple(p.repeats for p in pictures),
                    tuple(p.caption for p in pictures))


def data_of(config: TrainConfig, pictures: Pictures, facts: Mapping[str, float],
            family: str = "") -> Data:
    """The bucket whose batch is the largest, and how much the cache will hold. `facts`: `native`
    and `step` px of the base (core.memory.plan's "base")."""
    rule = BucketRule.of(config, facts["native"], facts["step"])
    assigned = rule.assign(pictures.sizes + pictures.regular)
    repeats = (*pictures.repeats, *[1] * len(pictures.regular))
    bucket, batch = heaviest_batch(assigned, repeats, config.batch_size)
    # How many embeddings there are: one a chunk of each different caption, and the empty caption's.
    texts = sorted({captions.with_trigger(text, config.trigger_word) for text in pictures.captions})
    counts = chunks_of(tuple(texts), family, config.max_tokens)
    if config.shuffle_tags:
        free = (max(0, len(captions.split_tags(text)) - config.keep_tokens) for text in texts)
        shuffles = [captions.MOST_SHUFFLES if config.enable_wildcard else
                    min(captions.MOST_SHUFFLES, factorial(min(tags, 4))) for tags in free]
        embeddings = 1 + sum(k * n for k, n in zip(shuffles, counts, strict=True))
    elif config.enable_wildcard:
        embeddings = 1 + captions.MOST_SHUFFLES * sum(counts)
    else:
        embeddings = sum(counts) + ("" not in texts)
    return Data(len(assigned) + config.reg_from_base, embeddings, batch, bucket,
                max(counts, default=1), drawn_chunks(config, family))


def heaviest_batch(assigned: Iterable[Size], repeats: Iterable[int],
                   batch_size: int) -> tuple[Size, int]:
    """The bucket whose batch has the most pixels, and how many pictures it holds."""
    counts: Counter[Size] = Counter()
    for bucket, times in zip(assigned, repeats, strict=True):
        counts[bucket] += times
    filled = {bucket: min(batch_size, count) for bucket, count in counts.items()}
    largest = max(filled, key=lambda b: (filled[b] * b[0] * b[1], b))
    return largest, filled[largest]


class BatchPlanner:
    """A planner (core.memory.relief) that buckets the pictures anew for each config."""

    def __init__(self, base: Base, where: Machine, pictures: Pictures | None = None) -> None:
        self.base, self.machine, self.pictures = base, where, pictures
        self.facts = plan.ask("base", base, plan.numbers_of("auto", where, base.family))

    def data(self, config: TrainConfig) -> Data | None:
        return (data_of(config, self.pictures, self.facts, self.base.family) if self.pictures
                else None)

    def __call__(self, config: TrainConfig) -> Plan:
        return plan.plan_run(config, self.base, self.machine, self.data(config))


def drawn_chunks(config: TrainConfig, family: str) -> int:
    """Chunks of the longest prompt of previews."""
    return max(chunks_of(tuple(prompts_of(config)), family, config.max_tokens), default=1)


@functools.lru_cache(maxsize=8)
def chunks_of(texts: tuple[str, ...], family: str, max_tokens: int) -> tuple[int, ...]:
    """In how many chunks each text is read."""
    # A token is a byte or more, so that short texts need no tokenizer.
    long = [text for text in texts if len(text.encode()) > families.CHUNK
            and families.chunks_of(family, len(text.encode()), max_tokens) > 1]
    tokens = dict(zip(long, TokenCounter()(long), strict=True))
    return tuple(families.chunks_of(family, tokens.get(text, 0), max_tokens) for text in texts)


def header(path: Path) -> Look | UserError:
    """A picture's size as seen; nothing is decoded, transparency isn't looked for."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_MEGAPIXELS * 1_000_000:
                return UserError("dataset.too_large", file=path, limit=MAX_MEGAPIXELS)
            return ((height, width) if _is_rotated(image) else (width, height)), False
    except Image.DecompressionBombError:
        return UserError("dataset.too_large", file=path, limit=MAX_MEGAPIXELS)
    except Exception as error:          # the training's scan finds out what it is
        return UserError("dataset.corrupt", file=path, reason=error)


def _is_rotated(image: Image.Image) -> bool:
    """Whether EXIF says that the picture lies on a side."""
    # Pillow has rotated the size of a TIFF already. A PNG that says so after its pixels would have
    # to be decoded.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return False
    with contextlib.suppress(Exception):        # broken EXIF; the picture itself is fine
        return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return False

