"""The events of a job: frozen dataclasses, one JSON line each.

The worker emits them, events.jsonl keeps them, the command line and the window read them.
Unknown kinds and unknown fields in a line are ignored, so that an older app reads a newer run.
"""

from __future__ import annotations

import functools
import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from pydantic import TypeAdapter

from core.serialization import from_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    kind: ClassVar[str] = ""
    at: float = field(default_factory=time.time)      # Unix time, s


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStarted(Event):
    kind = "started"
    job: str                                          # train | caption | generate
    pid: int
    config: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase(Event):
    kind = "phase"
    name: str                                         # scan | load | cache | train | save | verify
    done: int = 0
    total: int = 0                                    # 0: unknown
    eta_s: float = 0.0                                # 0: unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Event):
    kind = "plan"
    plan: dict[str, Any]                              # as core.memory.plan.as_dict gives it


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Event):
    kind = "step"
    step: int                                         # optimizer steps done
    total: int
    epoch: float
    loss: float | None                                # mean since the last Step; None: not finite
    lr: float
    steps_per_s: float
    eta_s: float
    memory_mb: float = 0.0                            # CUDA reserved, else resident memory
    free_mb: float | None = None                      # left there for everyone
    temperature_c: float | None = None                # of the card
    validation: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(Event):
    kind = "sample"
    step: int
    path: str
    prompt: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(Event):
    kind = "checkpoint"
    step: int
    path: str
    final: bool = False
    best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Captioned(Event):
    kind = "captioned"
    path: str
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Note(Event):
    kind = "note"
    key: str                                          # of its sentence, see core/i18n.py
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Faulted(Event):
    kind = "fault"
    code: str
    params: dict[str, Any] = field(default_factory=dict)
    fixes: list[dict[str, Any]] = field(default_factory=list)
    details: str = ""                                 # traceback, for "copy diagnostics"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnded(Event):
    kind = "ended"
    state: str                                        # done | stopped | failed
    result: dict[str, Any] = field(default_factory=dict)


KINDS: dict[str, type[Event]] = {c.kind: c for c in (
    JobStarted, Phase, Planned, Step, Sample, Checkpoint, Captioned, Note, Faulted, JobEnded)}


def to_line(event: Event) -> str:
    """One line of JSON without its line break. Paths and the like become strings."""
    return json.dumps({"kind": event.kind, **asdict(event)}, ensure_ascii=False, default=str)


def from_line(line: str) -> Event | None:
    """The event of a line. None for a torn line, for values of other types than the event's, and
    for a kind that this version doesn't know."""
    try:
        data = from_json(line)
        event: Event = _adapter(data.pop("kind")).validate_python(data)
        return event
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


# building one takes milliseconds, and a journal has thousands of lines
@functools.cache
def _adapter(kind: str) -> TypeAdapter[Any]:
    return TypeAdapter(KINDS[kind])
