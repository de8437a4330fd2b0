"""`check(folder, facts)`: what can be said about a folder of pictures before a training.

Each file is decoded once and then known (image_stats.py). Findings of the worst level come first.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core import i18n
from core.dataset import curation, image_folder
from core.dataset.buckets import Size
from core.dataset.checks.captions import check_captions
from core.dataset.checks.findings import Finding, Subject
from core.dataset.checks.image_stats import Looks, focus_points
from core.dataset.checks.images import Pictures, Purpose, check_pictures
from core.dataset.crops import BaseFacts, Planned, plan_crops
from core.jobs.control import Control
from core.jobs.events import Event, Phase

MARKS = {"error": "[ x]", "warning": "[ !]", "note": "[ i]"}
LEVELS = tuple(MARKS)           # the worst first
EVENT_EVERY_S = 0.1             # between two events of progress
MOST_BUCKETS = 12               # named in the text

CropAbout = Literal["center", "subject"]


@dataclass(frozen=True, slots=True)
class Report:
    """What `check` found; `names`, `planned` and `repeats` belong to the same pictures."""

    folder: Path
    facts: BaseFacts
    findings: tuple[Finding, ...]
    names: tuple[str, ...]                  # image_folder.relative_name of all that can train
    planned: tuple[Planned, ...]
    repeats: tuple[int, ...]
    captioned: int
    skipped: int
    left_out: int
    measured: int                           # files looked at now; the others were known
    seconds: float

    @property
    def buckets(self) -> dict[Size, int]:
        """How many pictures, with their repeats, each bucket holds; the fullest first."""
        counts: Counter[Size] = Counter()
        for picture, times in zip(self.planned, self.repeats, strict=True):
            counts[picture.crop.size] += times
        return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))

    def as_dict(self) -> dict[str, Any]:
        """Returns all of it for JSON and the window: codes and parameters with their sentences.

        `crop` is the part of a picture that stays, in px of the original: left, top, right, bottom.
        """
        plan = [{"name": name, "size": picture.size, "bucket": picture.crop.size,
                 "crop": [round(edge, 1) for edge in picture.crop.source(picture.size)],
                 "cut": round(picture.cut, 4), "scale": round(picture.scale, 4),
                 **({"focus": picture.focus} if picture.focus else {})}
                for name, picture in zip(self.names, self.planned, strict=True)]
        return {"folder": str(self.folder), "pictures": len(self.names),
                "captioned": self.captioned, "skipped": self.skipped, "left_out": self.left_out,
                "measured": self.measured, "seconds": round(self.seconds, 2),
                "base": {"area": self.facts.area, "step": self.facts.step,
                         "token_limit": self.facts.token_limit, "name": self.facts.base,
                         "assumed": not self.facts.base},
                "findings": [finding_as_dict(finding) for finding in self.findings],
                "buckets": [{"size": size, "pictures": count}
                            for size, count in self.buckets.items()],
                "plan": plan}


def check(folder: Path, facts: BaseFacts, *, metadata: Path | None = None, trigger: str = "",
          purpose: Purpose = "", crop_about: CropAbout = "center",
          emit: Callable[[Event], None] = lambda event: None,
          control: Control | None = None) -> Report:
    """Looks at every picture and caption; nothing in the folder is changed.

    Raises UserError as image_folder.scan does, and image_stats.Stopped where the user stops: what
    was measured until then is known the next time.
    """
    began = time.perf_counter()
    last_event = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last_event
        if done == total or time.monotonic() - last_event >= EVENT_EVERY_S:
            last_event = time.monotonic()
            emit(Phase(name="scan", done=done, total=total))

    choices = curation.load(folder)
    looks = Looks(control)
    data = image_folder.scan(folder, metadata, progress, left_out=choices.left_out,
                             look_all=looks.look_all)
    emit(Phase(name="check"))
    names, table = data.names, looks.table
    points = focus_points(data, choices, table if crop_about == "subject" else None)
    planned = plan_crops([picture.size for picture in data.pictures], facts, points)
    findings = [*check_scan(data), *check_pictures(Pictures(names, table, planned, purpose)),
                *check_captions(names, data.pictures, facts, trigger, data.encodings,
                                {problem.path for problem in data.problems
                                 if problem.code == "dataset.caption_unreadable"})]
    left_out = sum(int(problem.params["count"]) for problem in data.problems
                   if problem.code == "dataset.left_out")
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    return Report(data.folder, facts, tuple(findings), names, tuple(planned),
                  tuple(picture.repeats for picture in data.pictures), data.captioned,
                  data.skipped, left_out, looks.measured, time.perf_counter() - began)


def check_scan(data: image_folder.Dataset) -> Iterator[Finding]:
    """Makes findings of the problems that the scan met."""
    skipped, others = [], []
    for problem in data.problems:
        subject = Subject(problem.params["file"], problem.params, problem.code)
        if problem.skipped:
            skipped.append(subject)
        elif problem.code == "dataset.left_out":
            yield Finding(subject.code, "note", params=subject.params)
        # Missing captions have a finding of their own, with the pictures' names.
        elif problem.code != "dataset.captions_missing":
            others.append(subject)
    if skipped:
        yield Finding("checks.unreadable", "error", tuple(skipped), actions=("leave_out",))
    if others:
        yield Finding("checks.remarks", "warning", tuple(others))


def finding_as_dict(finding: Finding) -> dict[str, Any]:
    """Returns a finding for JSON, with its sentences."""
    pictures = [{"name": subject.name, "text": finding.line(subject),
                 **{key: value for key, value in subject.params.items()
                    if key not in ("name", "text")}}
                for subject in finding.subjects]
    return {"code": finding.code, "level": finding.level, "text": finding.text,
            "mend": finding.mend, "actions": finding.actions, "params": dict(finding.params),
            "pictures": pictures, **({"groups": finding.groups} if finding.groups else {})}


def lines(report: Report, most: int = 5) -> list[str]:
    """Returns the report as lines of text.

    Each finding has one, then come `most` of its pictures at most, then what to do.
    """
    filled, facts = list(report.buckets.items()), report.facts
    more = len(filled) - MOST_BUCKETS
    shown = " · ".join(f"{wide}x{high} ×{count}" for (wide, high), count in filled[:MOST_BUCKETS])
    others = i18n.tr("checks.more_buckets", {"count": more}) if more > 0 else ""
    text = [i18n.tr("checks.summary", {"folder": report.folder, "pictures": len(report.names),
                                       "captioned": report.captioned, "skipped": report.skipped}),
            i18n.tr("checks.base" if facts.base else "checks.base_assumed", {
                "base": facts.base, "width": facts.area[0], "height": facts.area[1],
                "step": facts.step, "limit": facts.token_limit}),
            i18n.tr("checks.buckets", {"list": shown, "more": others})]
    for finding in report.findings:
        text.append(f"{MARKS[finding.level]} {finding.text}")
        text += [f"       {finding.line(subject)}" for subject in finding.subjects[:most]]
        if len(finding.subjects) > most:
            count = len(finding.subjects) - most
            text.append(f"       {i18n.tr('checks.more', {'count': count})}")
        if finding.mend:
            text.append(f"     -> {finding.mend}")
    if not report.findings:
        text.append(i18n.tr("checks.all_well"))
    return text
