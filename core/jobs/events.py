"""The events of a job: frozen dataclasses, one JSON line each.

The worker emits them, events.jsonl keeps them, the command line and the window read them.
Unknown kinds and unknown fields in a line are ignored, so that an older app reads a newer run;
types are checked when a line is read, so that a damaged one harms no reader.
"""

from __future__ import annotations

import functools
import json
import time
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError

from core.errors import Fix
from core.serialization import from_json

# A later Unix time than that of the year 2900 can't be shown on every system.
MOST_TIME = 3e10
Time = Annotated[float, Field(ge=0, le=MOST_TIME)]


class _Machine(BaseModel, allow_inf_nan=False, defer_build=True):
    total_mb: float
    free_mb: float


class _Plan(BaseModel, allow_inf_nan=False, defer_build=True):
    """What readers take from a plan for granted."""

    machine: _Machine
    needs_mb: float
    peak: str
    verdict: Literal["fits", "tight", "too_big"]
    phases: dict[str, dict[str, float]]
    outside: dict[str, float]


class _Result(BaseModel, allow_inf_nan=False, defer_build=True):
    """What readers take from a result for granted, where it is there."""

    seconds: float = 0.0
    samples: list[str] = []
    memory: dict[str, Any] | None = None


def _as(kind: type[BaseModel]) -> AfterValidator:
    def check(value: dict[str, Any]) -> dict[str, Any]:
        if value:
            kind.model_validate(value)
        return value

    return AfterValidator(check)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    kind: ClassVar[str] = ""
    at: Time = field(default_factory=time.time)


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
    # as core.memory.plan.as_dict gives it
    plan: Annotated[dict[str, Any], _as(_Plan)]


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
    fixes: list[Fix] = field(default_factory=list)
    details: str = ""                                 # traceback, for "copy diagnostics"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnded(Event):
    kind = "ended"
    state: str                                        # done | stopped | failed
    result: Annotated[dict[str, Any], _as(_Result)] = field(default_factory=dict)


KINDS: dict[str, type[Event]] = {c.kind: c for c in (
    JobStarted, Phase, Planned, Step, Sample, Checkpoint, Captioned, Note, Faulted, JobEnded)}


def to_line(event: Event) -> str:
    """One line of JSON without its line break. Paths and the like become strings."""
    return json.dumps({"kind": event.kind, **asdict(event)}, ensure_ascii=False, default=str)


def from_line(line: str) -> Event | None:
    """The event of a line. A field whose value has another type than the event's counts as not
    there. None for a torn line, for one that lacks a field, and for a kind that this version
    doesn't know."""
    try:
        data = from_json(line)
        adapter = _adapter(data.pop("kind"))
        try:
            event: Event = adapter.validate_python(data)
        except ValidationError as error:
            damaged = {detail["loc"][0] for detail in error.errors(include_url=False)}
            sound = {key: value for key, value in data.items() if key not in damaged}
            event = adapter.validate_python({"at": 0.0, **sound})
        return event
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError):
        return None


# building one takes milliseconds, and a journal has thousands of lines
@functools.cache
def _adapter(kind: str) -> TypeAdapter[Any]:
    return TypeAdapter(KINDS[kind])
