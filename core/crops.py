"""How each picture of a folder will be scaled and cut, from the base's own facts. No weights are
read: configs and headers tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from core import buckets, families, focus, paths
from core.buckets import Crop, Point, Size
from core.choices import Choices
from core.dataset import Dataset, relative_name
from core.faults import Fault
from core.looks import Table, subject_of
from core.reading import from_json

TOKENIZER = paths.DEMO / "base" / "tokenizer"       # CLIP's own, shipped once


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What a base asks of pictures and captions."""

    area: Size                              # px; most pixels of a bucket
    step: int                               # px; sides of buckets are multiples of it
    shortest: int                           # px
    longest: int                            # px
    no_upscale: bool = False
    token_limit: int = 75
    count_tokens: Callable[[Sequence[str]], list[int]] | None = None    # without start and end


@dataclass(frozen=True, slots=True)
class Planned:
    """One picture as the training will see it."""

    crop: Crop
    size: Size                              # px of the original, as seen
    focus: Point | None = None

    @property
    def scale(self) -> float:
        """Above 1: the picture is enlarged."""
        return max(self.crop.resized[0] / self.size[0], self.crop.resized[1] / self.size[1])

    @property
    def cut(self) -> float:
        """The share of the picture's area that is cut away."""
        kept = self.crop.size[0] * self.crop.size[1]
        return max(1 - kept / (self.crop.resized[0] * self.crop.resized[1]), 0.0)

    @property
    def sides_cut(self) -> tuple[float, float, float, float]:
        """Shares of width or height cut away at left, top, right, bottom."""
        (wide, high), (left, top, right, bottom) = self.crop.resized, self.crop.box
        return left / wide, top / high, 1 - right / wide, 1 - bottom / high


def plan_crops(sizes: Sequence[Size], facts: BaseFacts,
               focus_at: Sequence[Point | None] | None = None) -> list[Planned]:
    """Each picture's bucket and crop, in their order, by the functions that training uses."""
    chosen = buckets.assign_buckets(sizes, facts.area, facts.step, facts.shortest, facts.longest,
                                    facts.no_upscale)
    points = focus_at if focus_at is not None else [None] * len(sizes)
    return [Planned(buckets.crop_to(size, bucket, point), size, point)
            for size, bucket, point in zip(sizes, chosen, points, strict=True)]


def focus_points(data: Dataset, chosen: Choices, table: Table | None = None) -> list[Point | None]:
    """Where each picture is cut about: the point set by hand; else, where `table` is given
    (looks.RECORD rows of the same pictures), the subject found; else None, the centre."""
    points: list[Point | None] = []
    for index, picture in enumerate(data.pictures):
        point = chosen.focus.get(relative_name(picture.path, data.folder))
        if point is None and table is not None and (box := subject_of(table, index)):
            point = focus.centre(box)
        points.append(point)
    return points


def count_buckets(planned: Sequence[Planned], repeats: Sequence[int]) -> dict[Size, int]:
    """Pictures, with their repeats, in each bucket; the fullest first."""
    counts: Counter[Size] = Counter()
    for one, times in zip(planned, repeats, strict=True):
        counts[one.crop.size] += times
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


# --- the base ---------------------------------------------------------------------------------

def base_facts(source: Path, area: Size | None = None, no_upscale: bool = False) -> BaseFacts:
    """Facts of a diffusers folder or a single .safetensors file, as the engine derives them.
    Raises Fault where that can't be told."""
    family = families.detect(source)
    configs = source if source.is_dir() else paths.FAMILY_CONFIGS / family
    if not (configs / "unet").is_dir():
        listed = families.MODULES[family]
        side = listed.native_size
        return facts_for(area or (side, side), listed.step, no_upscale, listed.tokens)
    unet, vae = (_read(configs / part / "config.json", source) for part in ("unet", "vae"))
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        native = int(unet["sample_size"]) * factor
        step = factor * 2 ** (len(unet["block_out_channels"]) - 1)
        step *= 2 if unet.get("addition_embed_type") == "text_time" else 1     # SDXL's buckets
    except (KeyError, TypeError, ValueError):
        raise Fault("checks.base_unknown", path=source) from None
    tokenizer = source / "tokenizer" if (source / "tokenizer").is_dir() else TOKENIZER
    counter = TokenCounter(tokenizer)
    return facts_for(area or (native, native), step, no_upscale, counter.limit, counter)


def facts_for(area: Size, step: int, no_upscale: bool = False, token_limit: int = 75,
              count_tokens: Callable[[Sequence[str]], list[int]] | None = None) -> BaseFacts:
    """The engine's rule for the sides of buckets: from half to twice the square's side."""
    side = isqrt(area[0] * area[1])
    return BaseFacts(area, step, side // 2, side * 2, no_upscale, token_limit, count_tokens)


def _read(path: Path, source: Path) -> Mapping[str, Any]:
    try:
        data = from_json(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise Fault("checks.base_unknown", path=source) from None
    return data if isinstance(data, dict) else {}


class TokenCounter:
    """Counts as the base's own text encoder does. transformers is imported when it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokenizer: Any = None

    @property
    def limit(self) -> int:
        told = _read(self.folder / "tokenizer_config.json", self.folder)
        longest = told.get("model_max_length", 77)
        return longest - 2 if isinstance(longest, int) and 2 < longest < 10_000 else 75

    def __call__(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        if self._tokenizer is None:
            from transformers import CLIPTokenizer
            try:
                self._tokenizer = CLIPTokenizer.from_pretrained(self.folder)
            except (OSError, ValueError) as error:
                raise Fault("checks.tokenizer_unreadable", folder=self.folder,
                            reason=str(error).split("\n")[0]) from None
        ids = self._tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return [len(one) for one in ids]
