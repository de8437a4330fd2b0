"""The interface of captioners: a batch of prepared pictures in, tags or sentences out.

Only the captioners' own files import torch: the command line and the window import this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from PIL import Image

    from captioner.config import CaptionConfig


@dataclass(frozen=True, slots=True)
class Tag:
    name: str                               # as written into captions, spaces for underscores
    score: float                            # 0..1; what it means is the captioner's
    category: str = "general"               # the vocabulary's: subject, style, character ...


@dataclass(frozen=True, slots=True)
class Description:
    """One captioner's sentence and tags for one picture."""

    sentence: str = ""
    tags: tuple[Tag, ...] = ()              # best first


class Captioner(Protocol):
    """Opened once per job. `prepare` may run in several threads; `describe` runs in one."""

    title: ClassVar[str]                    # "BLIP", as sentences name it

    def __init__(self, config: CaptionConfig) -> None:
        """Reads the options; cheap. Raises UserError where they make no sense."""

    def load(self) -> None:
        """Reads the weights from this machine. Raises UserError where they are missing (naming the
        command that fetches them) or can't be read."""

    def prepare(self, image: Image.Image) -> Any:
        """Turns an upright RGB picture into what `describe` takes (an array, bytes)."""

    def describe(self, batch: Sequence[Any]) -> list[Description]:
        """One description per prepared picture, in order; the batch size must not change them.
        A torch.OutOfMemoryError or MemoryError makes the runner halve the batch."""

    # Optional: `each(batch)` yields (place in the batch, Description or UserError) as answers come;
    # `of_one_picture` and `may_pass` are the codes of faults that belong to a picture, the latter
    # unless several follow one another; `listen(tell, control)` gets a function for notes that any
    # thread may call, and the job's control; `notes` are told after `load`.

    def identity(self) -> str:
        """Names weights and options: the same identity gives the same descriptions."""
