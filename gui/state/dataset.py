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
    """What is to be looked at, and by which measure."""

    folder: str = ""
    metadata: str = ""
    base: str = ""
    rule: tuple[tuple[str, Any], ...] = ()  # keys of TrainConfig that decide sizes and lengths
    purpose: str = ""
    trigger: str = ""
    crop_about: str = "center"


@dataclass(frozen=True, slots=True)
class State:
    """Everything that is known of the folder."""

    folder: Path | None = None
    looked: str = ""                        # differs with each look at the files
    names: tuple[str, ...] = ()             # all pictures, left-out ones too; relative_name
    captions: Mapping[str, str] = field(default_factory=dict)
    locked: Mapping[str, str] = field(default_factory=dict)     # captions that can't be written
    chosen: Choices = field(default_factory=Choices)
    report: dataset_report.Report | None = None
    doing: str = ""                         # names | captions | check | copy | "": nothing
    done: int = 0
    total: int = 0
    fault: UserError | None = None
    undo: str = ""                          # what can be undone: a key of captions.yaml
    redo: str = ""

    @property
    def training(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name not in self.chosen.left_out)

    @property
    def captioned(self) -> int:
        return sum(bool(self.captions.get(name)) for name in self.training)

    @property
    def troubled(self) -> frozenset[str]:
        """Pictures that an error or a warning is about."""
        found = self.report.findings if self.report else ()
        return frozenset(one.name for finding in found if finding.level != "note"
                         for one in finding.subjects) & frozenset(self.names)

    def planned(self, name: str) -> Planned | None:
        """How a picture is cut, its point as chosen now; None until the check has seen it."""
        if self.report is None or name not in self.report.names:
            return None
        one = self.report.planned[self.report.names.index(name)]
        point = self.chosen.focus.get(name) or one.focus
        return Planned(crop_to(one.size, one.crop.size, point), one.size, point)


@dataclass(frozen=True, slots=True)
class Shown:
    """Where in the folder the pages stand."""

    filter: str = "all"         # all | problems | uncaptioned | left_out | finding:<code>
    page: int = 0
    open: str = ""              # the picture that is shown large
    search: str = ""            # of the captions: see captioner/captions/search.py
    only: tuple[str, ...] = ()  # pictures whose captions are looked at; empty: all
    rows: int = 0               # page of the captions
