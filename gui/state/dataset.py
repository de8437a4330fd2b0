"""What is asked of the project's folder, what is known of it, and where the pages stand in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.dataset.buckets import crop_to
from core.dataset.checks import report as dataset_report
from core.dataset.crops import Planned
from core.dataset.curation import Choices
from core.errors import UserError


@dataclass(frozen=True, slots=True)
class Question:
    """Which folder is checked, for which base, and with which settings."""

    folder: str = ""
    metadata: str = ""
    base: str = ""
    # Keys of TrainConfig that decide sizes and lengths, with their values.
    rule: tuple[tuple[str, Any], ...] = ()
    purpose: str = ""
    trigger: str = ""
    crop_about: str = "center"


@dataclass(frozen=True, slots=True)
class State:
    """Everything that is known of the folder."""

    folder: Path | None = None
    # Differs with each look at the files.
    looked: str = ""
    # All pictures, left-out ones too, by their path below the folder.
    names: tuple[str, ...] = ()
    captions: Mapping[str, str] = field(default_factory=dict)
    # Captions that can't be written, with the reason: a key of captions.yaml.
    locked: Mapping[str, str] = field(default_factory=dict)
    chosen: Choices = field(default_factory=Choices)
    report: dataset_report.Report | None = None
    # names | captions | check | copy | "": nothing
    doing: str = ""
    done: int = 0
    total: int = 0
    fault: UserError | None = None
    # What can be undone and done again: keys of captions.yaml.
    undo: str = ""
    redo: str = ""

    @property
    def training(self) -> tuple[str, ...]:
        """The pictures that are trained."""
        return tuple(name for name in self.names if name not in self.chosen.left_out)

    @property
    def captioned(self) -> int:
        """How many of them have a caption."""
        return sum(bool(self.captions.get(name)) for name in self.training)

    @property
    def troubled(self) -> frozenset[str]:
        """The pictures that an error or a warning is about."""
        findings = self.report.findings if self.report else ()
        return frozenset(subject.name for finding in findings if finding.level != "note"
                         for subject in finding.subjects) & frozenset(self.names)

    def planned(self, name: str) -> Planned | None:
        """How a picture is cut, its point as chosen now; None until the check has seen it."""
        if self.report is None or name not in self.report.names:
            return None
        planned = self.report.planned[self.report.names.index(name)]
        point = self.chosen.focus.get(name) or planned.focus
        return Planned(crop_to(planned.size, planned.crop.size, point), planned.size, point)


@dataclass(frozen=True, slots=True)
class Shown:
    """Which part of the folder the pages show."""

    # all | problems | uncaptioned | left_out | finding:<code>
    filter: str = "all"
    page: int = 0
    # The picture that is shown large.
    open: str = ""
    # Of the captions: see captioner/captions/search.py.
    search: str = ""
    # Pictures whose captions are looked at; empty: all.
    only: tuple[str, ...] = ()
    # The page of the captions.
    rows: int = 0
