"""How each picture of a folder will be scaled and cut for a base.

No weights are read: the base's configs and headers say all that is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core import families, paths
from core.config import TrainConfig
from core.dataset.buckets import BucketRule, Crop, Point, Size, crop_to
from core.errors import UserError
from core.families.detection import Base
from core.families.registry import STANDARD

USUAL = TrainConfig()


@dataclass(frozen=True, slots=True)
class BaseFacts(BucketRule):
    """What a base asks of pictures and captions."""

    base: str = ""                          # its name; empty: none is known, SD 1.5 is assumed
    token_limit: int = 75
    # Tokens of each text, without start and end; None where the base has no such limit.
    count_tokens: Callable[[Sequence[str]], list[int]] | None = None
    # Why the facts of the base that was named are not known.
    fault: UserError | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """One picture as the training will see it."""

    crop: Crop
    size: Size                              # px of the original, as seen
    focus: Point | None = None

    @property
    def scale(self) -> float:
        """By how much the picture is scaled; above 1 it is enlarged."""
        return max(self.crop.resized[0] / self.size[0], self.crop.resized[1] / self.size[1])

    @property
    def cut(self) -> float:
        """The share of the picture's area that is cut away."""
        kept = self.crop.size[0] * self.crop.size[1]
        return max(1 - kept / (self.crop.resized[0] * self.crop.resized[1]), 0.0)

    @property
    def top_cut(self) -> float:
        """The share of the picture's height that is cut away above."""
        return self.crop.top / self.crop.resized[1]


def plan_crops(sizes: Sequence[Size], facts: BaseFacts, points: Sequence[Point | None]
               ) -> list[Planned]:
    """Returns each picture's bucket and crop, in their order, by the functions of training."""
    return [Planned(crop_to(size, bucket, point), size, point)
            for size, bucket, point in zip(sizes, facts.assign(sizes), points, strict=True)]


# --- the base ---------------------------------------------------------------------------------

def base_facts(source: Path, sizes: Callable[[Base], Mapping[str, float]],
               config: TrainConfig = USUAL) -> BaseFacts:
    """Returns the facts of a base for a run of `config`. Raises UserError where it is no base.

    `sizes` gives its `native` size and bucket `step` in px, as core.memory.plan.sizes does; it
    comes from the caller because core.memory is built upon this package.
    """
    base = Base.of(source, config.family)
    px = sizes(base)
    rule = BucketRule.of(config, px["native"], px["step"])
    counter, folder = None, source / "tokenizer"
    if base.family in families.SPECS and families.SPECS[base.family].chunked:
        counter = TokenCounter(folder) if folder.is_dir() else TokenCounter()
    limit = families.token_limit(base.family, config.max_tokens)
    return BaseFacts(**asdict(rule), base=source.name, token_limit=limit, count_tokens=counter)


def assumed_facts(config: TrainConfig = USUAL, fault: UserError | None = None) -> BaseFacts:
    """Returns the facts of Stable Diffusion 1.5, for where no base is known."""
    rule = BucketRule.of(config, STANDARD.native_size, STANDARD.bucket_step)
    return BaseFacts(**asdict(rule), token_limit=config.max_tokens,
                     count_tokens=TokenCounter(), fault=fault)


class TokenCounter:
    """Counts tokens as the base's own text encoder does, without those of start and end.

    The tokenizer is loaded at the first call. Raises UserError where it can't be.
    """

    def __init__(self, folder: Path = paths.CLIP_TOKENIZER) -> None:
        self.folder = folder
        self._tokenizer: Any = None

    def __call__(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        if self._tokenizer is None:
            # transformers takes seconds to import; the checks of a folder seldom need it.
            from transformers import CLIPTokenizer
            try:
                self._tokenizer = CLIPTokenizer.from_pretrained(self.folder)
            except (OSError, ValueError) as error:
                raise UserError("checks.tokenizer_unreadable", folder=self.folder,
                                reason=str(error).split("\n")[0]) from None
        tokens = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [len(ids) for ids in tokens.input_ids]
