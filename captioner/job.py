"""The job `caption`: describes the pictures of a folder and writes their captions.

A description is kept in a progress file before its caption is written, and each write is
journaled before it happens (undo.py). So a killed job goes on where it was when the same job is
started again: nothing is described twice, and what was written is known by its content.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from pydantic import ValidationError

import captioner as captioners
from captioner.base import Captioner, CaptionerSpec, Description
from captioner.captions.edits import check_writable
from captioner.captions.rule_parser import parse
from captioner.captions.rules import (
    About,
    MaxTokens,
    Rule,
    Sort,
    Underscores,
    apply,
    with_trigger_rule,
)
from captioner.captions.store import Entry, Store
from captioner.captions.text import join, merge, tag_key
from captioner.captions.tokens import counter
from captioner.captions.undo import Action, History
from captioner.config import CaptionConfig
from captioner.models.interrogate import combine
from captioner.pipeline import describe_all
from captioner.progress import Progress
from core import i18n
from core.config.flat_yaml import read_flat_yaml, refuse_unknown, validation_fault
from core.dataset.captions import one_line
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Captioned, Event, Note, Phase
from core.serialization import decode_text

FLUSH_S = 1.0                               # captions wait so long to be written together;
FLUSH_SHARE = 0.1                           # longer where a large table takes long to write
Emit = Callable[[Event], None]


# --- config -----------------------------------------------------------------------------------

def load(path: Path) -> CaptionConfig:
    """A run's config.yaml. Raises UserError with the file, the line and the key."""
    try:
        text = decode_text(path.read_bytes())
    except FileNotFoundError:
        raise UserError("config.missing", file=path, folder=Path.cwd()) from None
    except (OSError, ValueError) as error:
        raise UserError("config.unreadable", file=path, reason=error) from None
    data, lines = read_flat_yaml(text, str(path))
    return checked(data, str(path), lines)


def checked(data: dict[str, Any], source: str, lines: dict[str, int]) -> CaptionConfig:
    refuse_unknown(data, CaptionConfig.model_fields, lines, source)
    try:
        return CaptionConfig.model_validate(data)
    except ValidationError as error:
        raise validation_fault(error, data, source, lines, "--set") from None


def rules_of(config: CaptionConfig) -> tuple[Rule, ...]:
    """The config's rules with its trigger word and escapes. Raises UserError for what can't be
    applied to one caption alone."""
    given = [*config.rules, {"rule": "escape"}] if config.escape_brackets else config.rules
    rules = with_trigger_rule(parse(given), config.trigger_word)
    for number, rule in enumerate(rules, 1):
        if isinstance(rule, Sort) and rule.by == "frequency":
            raise UserError("rules.needs_all", number=number, rule="sort")
    return rules


def tokens_of(rules: Iterable[Rule]) -> Callable[[str], int] | None:
    """The tokenizer that the rules ask for; None: none does."""
    limits = [rule for rule in rules if isinstance(rule, MaxTokens)]
    return counter(limits[0].base) if limits else None


# --- captioners -------------------------------------------------------------------------------

_DEMO = ("clip", "blip")                # whose default model is the demo world's own


class Together:
    """Several captioners as one: a picture is decoded once, and all describe it."""

    spec: ClassVar[CaptionerSpec] = CaptionerSpec("together", "Together", "both", "")

    def __init__(self, members: Sequence[Captioner]) -> None:
        self.members = members

    @property
    def notes(self) -> list[Note]:
        return [note for member in self.members for note in notes_of(member)]

    @property
    def of_one_picture(self) -> frozenset[str]:
        return frozenset().union(*(getattr(m, "of_one_picture", ()) for m in self.members))

    def load(self) -> None:
        for member in self.members:
            member.load()

    def prepare(self, image: Image.Image) -> tuple[Any, ...]:
        return tuple(member.prepare(image) for member in self.members)

    def describe(self, batch: Sequence[tuple[Any, ...]]) -> list[Description]:
        told = [member.describe([picture[i] for picture in batch])
                for i, member in enumerate(self.members)]
        return [combine(one) for one in zip(*told, strict=True)]

    def identity(self) -> str:
        return "+".join(member.identity() for member in self.members)


def notes_of(captioner: Captioner) -> list[Note]:
    """What the user should know of a captioner once it is loaded: pictures that leave this
    machine, a model that knows little."""
    return list(getattr(captioner, "notes", ()))


def open_captioner(config: CaptionConfig) -> Captioner:
    """The config's captioner, several joined by "+". Raises UserError for an unknown one."""
    names = [name.strip() for name in config.captioner.split("+")]
    members = [captioners.get(name)(config) for name in names]
    return members[0] if len(members) == 1 else Together(members)


# --- the job ----------------------------------------------------------------------------------

def caption(config: CaptionConfig, emit: Emit, control: Control) -> dict[str, Any]:
    """Captions a folder. -> counts, what was left and why, the action's number for undo, and
    with dry_run the changes that it would make. Raises UserError."""
    return _Job(config, emit, control).run()


@dataclass(slots=True)
class Told:
    """A job's result."""

    captioned: int = 0                      # written now; with dry_run: would be
    kept: int = 0                           # had a caption, and it stays
    copied: int = 0                         # had one elsewhere; it is now where the others are
    resumed: int = 0                        # written before the job was interrupted
    flattened: int = 0                      # had several lines, and one now
    skipped: list[str] = field(default_factory=list)        # pictures that can't be read
    left: list[str] = field(default_factory=list)           # not written; a note says why
    changes: list[dict[str, str]] = field(default_factory=list)     # with dry_run


class _Job:
    def __init__(self, config: CaptionConfig, emit: Emit, control: Control) -> None:
        self.config, self.emit, self.control = config, emit, control
        self.rules = rules_of(config)
        emit(Phase(name="scan"))
        metadata = Path(config.metadata_path) if config.metadata_path else None
        self.store = Store(Path(config.folder), metadata, config.write_to)
        self.captioner = open_captioner(config)         # after the scan, as torch may come in
        self.count_tokens = tokens_of(self.rules)
        self.action = Action("caption", {"captioner": config.captioner})
        self.history: History | None = None
        self.progress: Progress | None = None
        self.waiting: dict[str, str] = {}               # captions to be written, by name
        self.copying: set[str] = set()
        self.flush_at = time.monotonic() + FLUSH_S
        self.done, self.total = 0, 0
        self.told = Told()

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        names = self._chosen()
        wanted = [name for name in names if self._is_wanted(self.store.entries[name])]
        if not self.config.dry_run:
            check_writable({_existing(self.store.entries[name].place.file.parent)
                            for name in names})
            self.history = History(self.store.folder)
        if wanted and not self.control.stopping:
            self._describe(wanted)
        self._copy_kept(names)
        self.flush()
        if self.progress and not self.control.stopping:
            self.progress.forget()
        return {**asdict(self.told), "total": len(names), "action": self.action.id,
                "folder": str(self.store.folder), "dry_run": self.config.dry_run,
                "seconds": round(time.monotonic() - began, 3),
                **({"state": "stopped"} if self.control.stopping else {})}

    def _chosen(self) -> list[str]:
        """The pictures' names; `only` may list some of them."""
        known = self.store.entries
        wanted = [Path(name).as_posix().removeprefix("./") for name in self.config.only]
        for name in wanted:
            if name not in known:
                raise UserError("runner.no_such_picture", name=name, folder=self.store.folder,
                                nearest=", ".join(i18n.nearest(name, known)) or "-")
        return list(dict.fromkeys(wanted)) or list(known)

    def _is_wanted(self, entry: Entry) -> bool:
        if entry.locked:
            self.told.left.append(entry.name)
            self._note(f"captions.{entry.locked}", file=self._file(entry), picture=entry.name)
            return False
        if entry.caption and self.config.existing == "keep":
            self.told.kept += 1
            return False
        return True

    def _file(self, entry: Entry) -> str:
        file = entry.place.file
        inside = file.is_relative_to(self.store.folder)
        return str(file.relative_to(self.store.folder) if inside else file)

    def _describe(self, wanted: list[str]) -> None:
        self.emit(Phase(name="load"))
        self.captioner.load()
        for note in self._notes():
            self.emit(note)
        self.progress = Progress(self.store.folder, self._key(), self.config.dry_run)
        if self.history and (old := self.history.newest(self.progress.action)):
            self.action = old
        self.total = len(wanted)
        rest = self._go_on(wanted)
        self.emit(Phase(name="caption", done=self.done, total=self.total))
        names = {self.store.entries[name].path: name for name in rest}
        describe_all(self.captioner, list(names), self.config.batch_size,
                     lambda path, said: self._on_result(names[path], said), self.control,
                     on_fault=lambda path, fault: self._on_fault(names[path], fault),
                     on_halved=lambda size: self._note("runner.batch_halved", size=size),
                     about=lambda path: self._about(names[path]))
        self.flush()

    def _notes(self) -> list[Note]:
        names = self.config.captioner.split("+")
        demo = [n for n in names if n in _DEMO and self.config.models.get(n, "demo") == "demo"]
        return [*([Note(key="captioner.demo_only")] if demo else []), *notes_of(self.captioner)]

    def _about(self, name: str) -> dict[str, str]:
        """What is known of a picture, for captioners whose prompt may name it."""
        caption = self.store.entries[name].caption
        return {"caption": caption, "tags": caption if "," in caption else ""}

    def _key(self) -> str:
        """The same job again: same captioner, same way of writing."""
        own = self.config.model_dump(include={
            "existing", "rules", "trigger_word", "write_to", "metadata_path", "underscores",
            "escape_brackets", "exclude"})
        text = json.dumps([self.captioner.identity(), own], sort_keys=True, default=str)
        return sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]

    # --- what an interrupted job has done ---

    def _go_on(self, wanted: list[str]) -> list[str]:
        """Finishes what was described before, and returns what is left to describe."""
        assert self.progress is not None
        written = {} if self.history is None else {
            swap.picture: swap for swap in self.history.changes(self.progress.action)}
        rest = []
        for name in wanted:
            entry, swap = self.store.entries[name], written.get(name)
            said = self.progress.recall(name, entry.path)
            if said is None:
                rest.append(name)
            elif swap is None or swap.place != entry.place or entry.content == swap.before:
                self._on_result(name, said, known=True)
            elif entry.content == swap.after:
                self.told.resumed += 1
                self.done += 1
            else:                           # somebody edited it since
                self._leave(name)
                self.done += 1
        if len(rest) < len(wanted):
            self._note("runner.resumed", count=len(wanted) - len(rest), total=len(wanted))
        return rest

    # --- results ---

    def _on_result(self, name: str, said: Description, known: bool = False) -> None:
        entry = self.store.entries[name]
        if self.progress and not known:
            self.progress.remember(name, entry.path, said)
        if text := self._ruled(entry, said):
            self.waiting[name] = text
        else:
            self.told.left.append(name)
            self._note("runner.nothing_said", picture=name)
        self._count()
        if time.monotonic() >= self.flush_at:
            self.flush()

    def _ruled(self, entry: Entry, said: Description) -> str:
        if not (text := self.text_of(said)):
            return ""
        scores = {tag_key(tag.name): tag.score for tag in said.tags}
        return apply(merge(entry.caption, text, self.config.existing), self.rules,
                     About(entry.name, scores, count_tokens=self.count_tokens))

    def text_of(self, said: Description) -> str:
        """A sentence, then the tags, as the config wants them written."""
        excluded = {tag_key(tag) for tag in self.config.exclude}
        tags = [tag.name for tag in said.tags if tag_key(tag.name) not in excluded]
        if self.config.underscores:
            about = About(scores={tag_key(tag): 1.0 for tag in tags})
            tags = [Underscores("underscores").change(tag, about) for tag in tags]
        return one_line(join([said.sentence.strip(), *tags]))

    def _on_fault(self, name: str, fault: UserError) -> None:
        self.told.skipped.append(name)
        self._note(fault.code, **{**fault.params, "file": name})
        self._count()

    def _count(self) -> None:
        self.done += 1
        self.emit(Phase(name="caption", done=self.done, total=self.total))

    def _copy_kept(self, names: Iterable[str]) -> None:
        """Where captions go to another place than they are in, the kept ones go along."""
        if self.config.existing == "keep" and (self.config.write_to != "auto"
                                               or self.config.metadata_path):
            for name in names:
                entry = self.store.entries[name]
                if entry.caption and entry.strays and not entry.locked:
                    self.waiting[name] = entry.caption
                    self.copying.add(name)

    # --- writing ---

    def flush(self) -> None:
        """Writes what waits, together: metadata.csv is one file for all."""
        began = time.monotonic()
        waiting, self.waiting = self.waiting, {}
        left = self._write(waiting) if self.history else set()
        for name in left:
            self._leave(name)
        for name, text in waiting.items():
            if name not in left:
                self._tell(self.store.entries[name], text)
        now = time.monotonic()
        self.flush_at = now + max(FLUSH_S, (now - began) / FLUSH_SHARE)

    def _write(self, captions: dict[str, str]) -> set[str]:
        """-> the pictures whose captions somebody else has changed meanwhile."""
        swaps = self.store.swaps(captions)
        if not swaps or self.history is None:
            return set()
        if not self.action.id:
            self.history.begin(self.action)
        if self.progress:                   # first, so that a resumed job finds the action
            self.progress.belongs_to(self.action.id)
        outcome = self.history.carry_out(self.action, swaps)
        return {swap.picture for swap in outcome.left if swap.picture}

    def _tell(self, entry: Entry, text: str) -> None:
        changed = text != entry.caption
        if changed and self.config.dry_run:
            self.told.changes.append({"path": entry.name, "before": entry.caption, "after": text})
        self.told.flattened += changed and entry.several_lines
        if entry.name in self.copying:
            self.told.kept -= 1
            self.told.copied += 1
        else:
            self.told.captioned += 1
        self.emit(Captioned(path=str(entry.path), caption=text))

    def _leave(self, name: str) -> None:
        self.told.left.append(name)
        self._note("runner.edited", picture=name)

    def _note(self, key: str, **params: Any) -> None:
        self.emit(Note(key=key, params={k: v if isinstance(v, int | float) else str(v)
                                        for k, v in params.items()}))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(one for one in (folder, *folder.parents) if one.is_dir())
