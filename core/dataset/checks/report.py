"""`check(folder, facts)`: all that can be said about a folder of pictures before a training.

Each file is decoded once and then known (image_stats.py); findings come worst level first.
"""

from __future__ import annotations

import time
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
from core.dataset.crops import BaseFacts, Planned, count_buckets, plan_crops
from core.dataset.image_folder import Dataset, relative_name
from core.jobs.control import Control
from core.jobs.events import Event, Phase

LEVELS = ("error", "warning", "note")
MARKS = {"error": "[ x]", "warning": "[ !]", "note": "[ i]"}
TOLD_EVERY_S = 0.1              # between two events of progress
MOST_BUCKETS = 12               # named in the text

CropAbout = Literal["center", "subject"]


@dataclass(frozen=True, slots=True)
class Report:
    """What `check` found. `names`, `planned` and `repeats` are of the same pictures."""

    folder: Path
    facts: BaseFacts
    findings: tuple[Finding, ...]
    names: tuple[str, ...]                  # dataset.relative_name of all that can train
    planned: tuple[Planned, ...]
    repeats: tuple[int, ...]
    captioned: int
    skipped: int
    left_out: int
    measured: int                           # files looked at now; the others were known
    seconds: float

    @property
    def buckets(self) -> dict[Size, int]:
        return count_buckets(self.planned, self.repeats)

    def as_dict(self) -> dict[str, Any]:
        """For JSON and the window: codes and parameters with their sentences."""
        return {"folder": str(self.folder), "pictures": len(self.names),
                "captioned": self.captioned, "skipped": self.skipped, "left_out": self.left_out,
                "measured": self.measured, "seconds": round(self.seconds, 2),
                "base": {"area": self.facts.area, "step": self.facts.step,
                         "token_limit": self.facts.token_limit, "name": self.facts.base,
                         "assumed": not self.facts.base},
                "findings": [finding_as_dict(finding) for finding in self.findings],
                "buckets": [{"size": size, "pictures": count}
                            for size, count in self.buckets.items()],
                "plan": [_planned_as_dict(name, one)
                         for name, one in zip(self.names, self.planned, strict=True)]}


def check(folder: Path, facts: BaseFacts, *, metadata: Path | None = None, trigger: str = "",
          purpose: Purpose = "", crop_about: CropAbout = "center",
          emit: Callable[[Event], None] = lambda event: None,
          control: Control | None = None) -> Report:
    """Looks at every picture and caption; nothing in the folder is changed.

    Raises UserError as dataset.scan() does, and looks.Stopped where the user stops: what was
    measured until then is known the next time.
    """
    began = time.perf_counter()
    chosen = curation.load(folder)
    looks = Looks(control)
    data = image_folder.scan(folder, metadata, _progress(emit), left_out=chosen.left_out,
                             look_all=looks.look_all)
    names = tuple(relative_name(one.path, data.folder) for one in data.pictures)
    emit(Phase(name="check"))
    table = looks.table
    points = focus_points(data, chosen, table if crop_about == "subject" else None)
    planned = plan_crops([one.size for one in data.pictures], facts, points)
    findings = [*_problems(data), *check_pictures(Pictures(names, table, planned, purpose)),
                *check_captions(names, data.pictures, facts, trigger)]
    return Report(
        data.folder, facts, tuple(sorted(findings, key=lambda one: LEVELS.index(one.level))),
        names, tuple(planned), tuple(one.repeats for one in data.pictures), data.captioned,
        data.skipped, _left_out(data), looks.measured, time.perf_counter() - began)


def _progress(emit: Callable[[Event], None]) -> Callable[[int, int], None]:
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= TOLD_EVERY_S:
            last = time.monotonic()
            emit(Phase(name="scan", done=done, total=total))
    return progress


def _problems(data: Dataset) -> Iterator[Finding]:
    """What the scan itself found. Missing captions have a finding of their own."""
    told = [(problem.skipped, Subject(problem.params["file"], problem.params, problem.code))
            for problem in data.problems if problem.code != "dataset.captions_missing"]
    skipped = tuple(subject for is_skipped, subject in told if is_skipped)
    others = tuple(subject for is_skipped, subject in told if not is_skipped)
    if skipped:
        yield Finding("checks.unreadable", "error", skipped, actions=("leave_out",))
    notes = tuple(one for one in others if one.code == "dataset.left_out")
    for one in notes:
        yield Finding(one.code, "note", params=one.params)
    remarks = tuple(one for one in others if one not in notes)
    if remarks:
        yield Finding("checks.remarks", "warning", remarks)


def _left_out(data: Dataset) -> int:
    return sum(int(problem.params["count"]) for problem in data.problems
               if problem.code == "dataset.left_out")


# --- for JSON ---------------------------------------------------------------------------------

def finding_as_dict(finding: Finding) -> dict[str, Any]:
    return {"code": finding.code, "level": finding.level, "text": finding.text,
            "mend": finding.mend, "actions": finding.actions, "params": dict(finding.params),
            "pictures": [{"name": one.name, "text": finding.line(one), **_own(one)}
                         for one in finding.subjects],
            **({"groups": finding.groups} if finding.groups else {})}


def _own(subject: Subject) -> dict[str, Any]:
    return {key: value for key, value in subject.params.items() if key not in ("name", "text")}


def _planned_as_dict(name: str, one: Planned) -> dict[str, Any]:
    """`crop`: what is kept, in px of the original: left, top, right, bottom."""
    return {"name": name, "size": one.size, "bucket": one.crop.size,
            "crop": [round(edge, 1) for edge in one.crop.source(one.size)],
            "cut": round(one.cut, 4), "scale": round(one.scale, 4),
            **({"focus": one.focus} if one.focus else {})}


def lines(report: Report, most: int = 5) -> list[str]:
    """The report as text: a line for each finding, then `most` of its pictures, what to do."""
    told = _summary(report)
    for finding in report.findings:
        told.append(f"{MARKS[finding.level]} {finding.text}")
        told += [f"       {finding.line(one)}" for one in finding.subjects[:most]]
        if len(finding.subjects) > most:
            told.append("       " + i18n.tr("checks.more",
                                            {"count": len(finding.subjects) - most}))
        if finding.mend:
            told.append(f"     -> {finding.mend}")
    if not report.findings:
        told.append(i18n.tr("checks.all_well"))
    return told


def _summary(report: Report) -> list[str]:
    found, facts = list(report.buckets.items()), report.facts
    more = len(found) - MOST_BUCKETS
    shown = " · ".join(f"{wide}x{high} ×{count}" for (wide, high), count in found[:MOST_BUCKETS])
    return [
        i18n.tr("checks.summary", {
            "folder": report.folder, "pictures": len(report.names),
            "captioned": report.captioned, "skipped": report.skipped}),
        i18n.tr("checks.base" if facts.base else "checks.base_assumed", {
            "base": facts.base, "width": facts.area[0], "height": facts.area[1], "step": facts.step,
            "limit": facts.token_limit}),
        i18n.tr("checks.buckets", {
            "list": shown,
            "more": i18n.tr("checks.more_buckets", {"count": more}) if more > 0 else ""})]
