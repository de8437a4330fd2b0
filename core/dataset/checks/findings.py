"""A finding of a dataset check: what is wrong with which pictures, and what mends it.

It holds keys and parameters only; core.i18n makes sentences of them. `<code>` is the sentence,
`<code>_mend` says what to do, `<code>_one` is the line about a single picture, if it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from core import i18n

Level = Literal["error", "warning", "note"]
# What one click can do. leave_out: these pictures don't train (curation.leave_out).
# keep_one_of_group: leave out all but each group's best. focus: crop about the salient subject.
# convert, remove_borders: `dataset prepare` into a new folder. edit: open the caption.
Action = Literal["leave_out", "keep_one_of_group", "focus", "convert", "remove_borders", "edit"]


@dataclass(frozen=True, slots=True)
class Subject:
    """One picture of a finding."""

    name: str                               # image_folder.relative_name
    params: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""                          # its own sentence's key; "": `<finding>_one`


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of problem, with all pictures that have it."""

    code: str                               # "checks.blurred"
    level: Level
    subjects: tuple[Subject, ...] = ()      # the worst first
    params: Mapping[str, Any] = field(default_factory=dict)
    actions: tuple[Action, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()    # of copies: the one to keep first

    @property
    def text(self) -> str:
        return i18n.tr(self.code, {"count": len(self.subjects), **self.params})

    @property
    def mend(self) -> str:
        """A sentence that says what to do; "" where `text` says it itself."""
        key = f"{self.code}_mend"
        return i18n.tr(key, self.params) if key in i18n.catalogue("en") else ""

    def line(self, subject: Subject) -> str:
        """Returns the sentence about one of its pictures."""
        key = subject.code or f"{self.code}_one"
        if key not in i18n.catalogue("en"):
            return subject.name
        return i18n.tr(key, {"file": subject.name, **subject.params})


def worst_first(subjects: Sequence[tuple[float, Subject]]) -> tuple[Subject, ...]:
    """Sorts pairs of weight and subject by falling weight, then by name."""
    return tuple(subject for _, subject in sorted(
        subjects, key=lambda pair: (-pair[0], pair[1].name)))
