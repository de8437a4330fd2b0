"""The job `caption`: describes the pictures of a folder and writes their captions.

A description goes into a progress file before its caption is written, and the undo journal
records each write before it happens. So a killed job continues when the same job is started again:
nothing is described twice, and a caption that was written is recognised by its content.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

import captioner as captioners
from captioner.base import Captioner, Description
from captioner.captions.edits import check_writable
from captioner.captions.rule_parser import parse
from captioner.captions.rules import About, Rule, Sort, Underscores, apply, with_trigger_rule
from captioner.captions.store import Entry, Store
from captioner.captions.text import join, merge, tag_key
from captioner.captions.tokens import tokens_of
from captioner.captions.undo import Action, History
from captioner.config import CaptionConfig
from captioner.models.interrogate import combine
from captioner.models.sentences import without_signs
from captioner.pipeline import KINDS, describe_all, each_of, in_order
from captioner.progress import Progress
from core import i18n
from core.config.flat_yaml import read_flat_yaml, refuse_unknown, validated
from core.dataset.captions import one_line
from core.errors import UserError
from core.importers.lines import text_of
from core.jobs.control import Control
from core.jobs.events import Captioned, Event, Note, Phase

FLUSH_S = 1.0                               # captions of this time are written together
FLUSH_SHARE = 0.1                           # of the time at most for writing large tables
Emit = Callable[[Event], None]


# --- config -----------------------------------------------------------------------------------

def load(path: Path) -> CaptionConfig:
    """A run's config.yaml. Raises UserError with the file, the line and the key."""
    data, lines = read_flat_yaml(text_of(path), str(path))
    return checked(data, str(path), lines)


def checked(data: dict[str, Any], source: str, lines: dict[str, int]) -> CaptionConfig:
    refuse_unknown(data, CaptionConfig.model_fields, lines, source)
    return validated(CaptionConfig, data, lines, source)


def rules_of(config: CaptionConfig) -> tuple[Rule, ...]:
    """The config's rules with its trigger word and escapes.

    Raises UserError for a rule that needs all captions and not just one.
    """
    escape = [{"rule": "escape"}] if config.escape_brackets else []
    rules = with_trigger_rule(parse([*config.rules, *escape]), config.trigger_word)
    for number, rule in enumerate(rules, 1):
        # It would need the captions of pictures that are not described yet.
        if isinstance(rule, Sort) and rule.by == "frequency":
            raise UserError("rules.needs_all", number=number, rule="sort")
    return rules


# --- captioners -------------------------------------------------------------------------------

_DEMO = ("clip", "blip")                # captioners whose default model knows only the demo world


class Together:
    """Several captioners as one: a picture is decoded once, and each describes it."""

    title: ClassVar[str] = "Together"

    def __init__(self, members: Sequence[Captioner]) -> None:
        self.members = members

    @property
    def notes(self) -> list[Note]:
        return [note for member in self.members for note in notes_of(member)]

    @property
    def of_one_picture(self) -> frozenset[str]:
        return frozenset().union(*(getattr(m, "of_one_picture", ()) for m in self.members))

    @property
    def may_pass(self) -> frozenset[str]:
        return frozenset().union(*(getattr(m, "may_pass", ()) for m in self.members))

    def listen(self, tell: Callable[[Note], None], control: Control) -> None:
        for member in self.members:
            if hasattr(member, "listen"):
                member.listen(tell, control)

    def load(self) -> None:
        for member in self.members:
            member.load()

    def prepare(self, image: Image.Image) -> tuple[Any, ...]:
        return tuple(member.prepare(image) for member in self.members)

    def describe(self, batch: Sequence[tuple[Any, ...]]) -> list[Description]:
        return in_order(self.each(batch))

    def each(self, batch: Sequence[tuple[Any, ...]]
             ) -> Iterator[tuple[int, Description | UserError]]:
        """A picture is complete when the last captioner that answers by picture has described it,
        so those come last."""
        order = sorted(range(len(self.members)), key=lambda i: hasattr(self.members[i], "each"))
        told: list[dict[int, Description | UserError]] = [{} for _ in batch]
        for i in order:
            for place, outcome in each_of(self.members[i], [picture[i] for picture in batch]):
                told[place][i] = outcome
                if i != order[-1]:
                    continue
                faults = [one for one in told[place].values() if isinstance(one, UserError)]
                yield place, faults[0] if faults else combine(
                    [one for _, one in sorted(told[place].items())
                     if isinstance(one, Description)])

    def identity(self) -> str:
        return "+".join(member.identity() for member in self.members)


def notes_of(captioner: Captioner) -> list[Note]:
    """What the user should know of a loaded captioner, such as pictures leaving this machine."""
    return list(getattr(captioner, "notes", ()))


def open_captioner(config: CaptionConfig) -> Captioner:
    """The config's captioner: one, or several joined by "+". Raises UserError if unknown."""
    names = [name.strip() for name in config.captioner.split("+")]
    members = [captioners.get(name)(config) for name in names]
    return members[0] if len(members) == 1 else Together(members)


# --- the job ----------------------------------------------------------------------------------

def caption(config: CaptionConfig, emit: Emit, control: Control) -> dict[str, Any]:
    """Captions a folder.

    Returns counts, the pictures that were left out, the action's number for undo, and with dry_run
    the changes that it would make. Raises UserError.
    """
    return _Job(config, emit, control).run()


@dataclass(slots=True)
class Result:
    captioned: int = 0                      # written now; with dry_run: would be
    kept: int = 0                           # had a caption, and it stays
    copied: int = 0                         # had one elsewhere; it is now where the others are
    resumed: int = 0                        # written before the job was interrupted
    flattened: int = 0                      # had several lines, and one now
    skipped: list[str] = field(default_factory=list)        # pictures that can't be read
    left: list[str] = field(default_factory=list)           # not written; a note says why
    # pictures that the captioner failed at or whose answer is doubtful: picture, code, params
    failed: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, str]] = field(default_factory=list)     # with dry_run


class _Job:
    def __init__(self, config: CaptionConfig, emit: Emit, control: Control) -> None:
        self.config, self.emit, self.control = config, emit, control
        self.rules = rules_of(config)
        emit(Phase(name="scan"))
        metadata = Path(config.metadata_path) if config.metadata_path else None
        self.store = Store(Path(config.folder), metadata, config.write_to)
        for problem in self.store.problems:
            self._note(problem.code, **problem.params)
        # After the scan: a captioner may import torch, and a wrong folder is reported at once.
        self.captioner = open_captioner(config)
        self.count_tokens = tokens_of(self.rules)
        self.action = Action("caption", {"captioner": config.captioner})
        self.history: History | None = None             # None: dry_run
        self.progress: Progress | None = None
        self.unwritten: dict[str, str] = {}             # captions by picture name
        self.copying: set[str] = set()
        members = getattr(self.captioner, "members", [self.captioner])
        self.by_picture = any(hasattr(member, "each") for member in members)
        self.flush_at = time.monotonic() + (0.0 if self.by_picture else FLUSH_S)
        self.done, self.total = 0, 0
        self.result = Result()

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        known = self.store.entries
        selected = [Path(name).as_posix().removeprefix("./") for name in self.config.only]
        for name in selected:
            if name not in known:
                raise UserError("runner.no_such_picture", name=name, folder=self.store.folder,
                                nearest=", ".join(i18n.nearest(name, known)) or "-")
        names = list(dict.fromkeys(selected)) or list(known)
        to_describe = [name for name in names if self._needs_caption(known[name])]
        if not self.config.dry_run:
            places = [known[name].place.file.parent for name in names]
            # A table may be wanted in a folder that doesn't exist yet.
            check_writable({next(folder for folder in (place, *place.parents) if folder.is_dir())
                            for place in places})
            self.history = History(self.store.folder)
        if to_describe and not self.control.stopping:
            self._describe(to_describe)
        # Where captions are written to another place than they are in, the kept ones go along.
        if self.config.existing == "keep" and (self.config.write_to != "auto"
                                               or self.config.metadata_path):
            for entry in (known[name] for name in names):
                if entry.caption and entry.strays and not entry.locked:
                    self.unwritten[entry.name] = entry.caption
                    self.copying.add(entry.name)
        self.flush()
        # The same job again asks only for what failed.
        if self.progress and not self.control.stopping and not self.result.failed:
            self.progress.forget()
        return {**asdict(self.result), "total": len(names), "action": self.action.id,
                "folder": str(self.store.folder), "dry_run": self.config.dry_run,
                "seconds": round(time.monotonic() - began, 3),
                **({"state": "stopped"} if self.control.stopping else {})}

    def _needs_caption(self, entry: Entry) -> bool:
        if entry.locked:
            file, folder = entry.place.file, self.store.folder
            self.result.left.append(entry.name)
            self._note(f"captions.{entry.locked}", picture=entry.name,
                       file=file.relative_to(folder) if file.is_relative_to(folder) else file)
            return False
        if entry.caption and self.config.existing == "keep":
            self.result.kept += 1
            return False
        return True

    def _describe(self, names: list[str]) -> None:
        self.emit(Phase(name="load"))
        self.captioner.load()
        if any(name in _DEMO and self.config.models.get(name, "demo") == "demo"
               for name in self.config.captioner.split("+")):
            self._note("captioner.demo_only")
        for note in notes_of(self.captioner):
            self.emit(note)
        if hasattr(self.captioner, "listen"):
            self.captioner.listen(self.emit, self.control)
        # The same job again is one with the same captioner and the same way of writing.
        options = self.config.model_dump(include={
            "existing", "rules", "trigger_word", "write_to", "metadata_path", "underscores",
            "escape_brackets", "exclude"})
        text = json.dumps([self.captioner.identity(), options], sort_keys=True, default=str)
        key = sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]
        self.progress = Progress(self.store.folder, key, self.config.dry_run)
        if self.history and (old := self.history.newest(self.progress.action)):
            self.action = old
        self.total = len(names)
        rest = self._resume(names, self.progress)
        self.emit(Phase(name="caption", done=self.done, total=self.total))
        names_by_path = {self.store.entries[name].path: name for name in rest}

        def about(path: Path) -> dict[str, str]:
            caption = self.store.entries[names_by_path[path]].caption
            return {"caption": caption, "tags": caption if "," in caption else ""}

        def on_fault(path: Path, fault: UserError) -> None:
            name = names_by_path[path]
            if any(fault.code in getattr(self.captioner, kind, ()) for kind in KINDS):
                params = {key: value if isinstance(value, int | float) else str(value)
                          for key, value in fault.params.items()}
                self.result.failed.append({"picture": name, "code": fault.code, "params": params})
                self.emit(Note(key="runner.failed", params={
                    "picture": name, "reason": {"say": fault.code, **params}}))
            else:
                self.result.skipped.append(name)
                self._note(fault.code, **{**fault.params, "file": name})
            self._count()

        try:
            describe_all(
                self.captioner, list(names_by_path), self.config.batch_size,
                lambda path, description: self._on_result(names_by_path[path], description),
                self.control, on_fault=on_fault, about=about,
                on_halved=lambda size: self._note("runner.batch_halved", size=size))
        except UserError:
            # What had come before a fault that ends the job.
            self.flush()
            raise
        self.flush()

    def _resume(self, names: list[str], progress: Progress) -> list[str]:
        """Writes what an interrupted job has described, and returns the names still to describe."""
        written = {} if self.history is None else {
            swap.picture: swap for swap in self.history.changes(progress.action)}
        rest = []
        for name in names:
            entry, swap = self.store.entries[name], written.get(name)
            description = progress.recall(name, entry.path)
            if description is None:
                rest.append(name)
            elif swap is None or swap.place != entry.place or entry.content == swap.before:
                self._on_result(name, description, remembered=True)
            elif entry.content == swap.after:
                self.result.resumed += 1
                self.done += 1
            else:
                # Somebody has edited the caption since.
                self._leave(name)
                self.done += 1
        if len(rest) < len(names):
            self._note("runner.resumed", count=len(names) - len(rest), total=len(names))
        return rest

    # --- results ---

    def _on_result(self, name: str, description: Description, remembered: bool = False) -> None:
        entry = self.store.entries[name]
        # Before the caption is written: describing takes longest.
        if self.progress and not remembered:
            self.progress.remember(name, entry.path, description)
        caption = self.text_of(description)
        if caption:
            scores = {tag_key(tag.name): tag.score for tag in description.tags}
            caption = apply(merge(entry.caption, caption, self.config.existing), self.rules,
                            About(entry.name, scores, count_tokens=self.count_tokens))
        if caption:
            self.unwritten[name] = caption
        else:
            self.result.left.append(name)
            self._note("runner.nothing_said", picture=name)
        self._count()
        if time.monotonic() >= self.flush_at:
            self.flush()

    def text_of(self, description: Description) -> str:
        """A sentence, then the tags, as the config wants them written."""
        excluded = {tag_key(tag) for tag in self.config.exclude}
        tags = [tag.name for tag in description.tags if tag_key(tag.name) not in excluded]
        if self.config.underscores:
            about = About(scores={tag_key(tag): 1.0 for tag in tags})
            tags = [Underscores("underscores").change(tag, about) for tag in tags]
        return one_line(without_signs(join([description.sentence.strip(), *tags])))

    def _count(self) -> None:
        self.done += 1
        self.emit(Phase(name="caption", done=self.done, total=self.total))

    # --- writing ---

    def flush(self) -> None:
        """Writes all waiting captions together, as metadata.csv is one file for all."""
        began = time.monotonic()
        captions, self.unwritten = self.unwritten, {}
        # pictures whose captions somebody else has changed meanwhile
        edited: set[str] = set()
        if self.history and (swaps := self.store.swaps(captions)):
            if not self.action.id:
                self.history.begin(self.action)
            # Before the write: a job that is killed in between still finds its action.
            if self.progress:
                self.progress.belongs_to(self.action.id)
            outcome = self.history.carry_out(self.action, swaps)
            edited = {swap.picture for swap in outcome.left if swap.picture}
        for name in edited:
            self._leave(name)
        for name, caption in captions.items():
            if name in edited:
                continue
            entry = self.store.entries[name]
            changed = caption != entry.caption
            if changed and self.config.dry_run:
                self.result.changes.append(
                    {"path": name, "before": entry.caption, "after": caption})
            self.result.flattened += changed and entry.several_lines
            if name in self.copying:
                # It was counted as kept when the pictures were selected.
                self.result.kept -= 1
                self.result.copied += 1
            else:
                self.result.captioned += 1
            self.emit(Captioned(path=str(entry.path), caption=caption))
        now = time.monotonic()
        # Who answers by picture may take minutes for the next; what has come is written at once,
        # unless that takes long.
        at_once = self.by_picture and now - began < FLUSH_S
        self.flush_at = now if at_once else now + max(FLUSH_S, (now - began) / FLUSH_SHARE)

    def _leave(self, name: str) -> None:
        self.result.left.append(name)
        self._note("runner.edited", picture=name)

    def _note(self, key: str, **params: Any) -> None:
        self.emit(Note(key=key, params={k: v if isinstance(v, int | float) else str(v)
                                        for k, v in params.items()}))
