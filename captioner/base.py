"""What a captioner hands over: tags or sentences for prepared pictures, a batch at a time.

Torch comes with the captioner's own file; this one stays light for the command line and window.
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
    """What one captioner says about one picture."""

    sentence: str = ""
    tags: tuple[Tag, ...] = ()              # best first


@dataclass(frozen=True, slots=True)
class CaptionerSpec:
    id: str                                 # "blip"; the name after --with
    title: str                              # "BLIP"
    makes: str                              # sentence | tags | both
    default_model: str                      # "demo", a hub repository or an address; see `models`
    models: tuple[str, ...] = ()            # known good choices, as the user writes them


class Captioner(Protocol):
    """Opened once per job. `prepare` may run in several threads; `describe` runs in one."""

    spec: ClassVar[CaptionerSpec]

    def __init__(self, config: CaptionConfig) -> None:
        """Reads the options; cheap. Raises UserError where they make no sense."""

    def load(self) -> None:
        """Reads the weights from this machine. Raises UserError where they are missing (naming the
        command that fetches them) or can't be read."""

    def prepare(self, image: Image.Image) -> Any:
        """An upright RGB picture -> what `describe` takes (an array, bytes); in a thread."""

    def describe(self, batch: Sequence[Any]) -> list[Description]:
        """One description per prepared picture, in order. The same whatever the batch size.
        A torch.OutOfMemoryError or MemoryError makes the runner halve the batch."""

    def identity(self) -> str:
        """Names weights and options: the same identity gives the same descriptions."""
