"""The project's folder as the tabs Dataset and Captioning see it; one for all pages.

Looking at it happens in a thread: first the names (a page can be painted), then captions, then
the check, whose measures are kept on disk. `now` is replaced as a whole and never changed.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from captioner.captions.store import Store
from captioner.captions.tokens import counter
from captioner.captions.undo import Action, History, Outcome
from core import paths
from core.config import TrainConfig
from core.dataset import crops, curation, image_folder, import_files
from core.dataset.buckets import Point
from core.dataset.checks import image_stats
from core.dataset.checks import report as dataset_report
from core.dataset.crops import BaseFacts
from core.dataset.curation import Choices
from core.errors import UserError
from core.failures import one_line
from core.jobs.control import Control
from core.jobs.events import Event, Phase
from core.jobs.runs import JobView
from core.memory.service import sizes_beside
from gui.state.app_state import Snapshot
from gui.state.dataset import Question, Shown, State

# Seconds after an edit, so that several edits cost one check.
RECHECK_S = 2.0
# Seconds between looks at captions that a job is writing.
REREAD_S = 2.0
# Keys of TrainConfig that decide sizes and lengths.
RULE = ("max_resolution", "bucket_no_upscale", "min_bucket_side", "max_bucket_side", "max_tokens",
        "family")
# A project's purpose -> that of the check, which knows no "concept".
PURPOSES: dict[str, Any] = {"character": "person", "style": "style", "object": "object"}
# A look at the folder, in this order; each is a method of DatasetView.
STEPS = ("names", "captions", "check")


class DatasetView:
    """Every method may be called from any thread; none but `write` and `step` waits for disks."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        self.now = State()
        self.shown = Shown()
        self.version = 0
        # CLIP's tokenizer, once the thread has loaded it.
        self.count_tokens: Callable[[str], int] | None = None
        self._changed = changed
        self._lock = threading.RLock()
        self._question = Question()
        self._store: Store | None = None
        self._todo: set[str] = set()
        self._control = Control()
        self._superseded = threading.Event()
        self._keys: dict[str, str] = {}
        # The captioning job as it was read last: id, pictures that have a caption, ended.
        self._job: tuple[str, int, bool] = ("", 0, False)
        self._reread_at = 0.0

    # --- following the project ---

    def follow(self, snap: Snapshot) -> None:
        """Follows the project. Called with each snapshot; cheap where nothing has changed."""
        with self._lock:
            question = _question(snap)
            if question is not None and question != self._question:
                self._ask(question)
            job = caption_job(snap)
            if job is None or str(job.config.get("folder", "")) != self._question.folder:
                return
            # Captions that a job writes come in while it runs, and for certain at its end.
            mark = (job.id, job.captioned, job.over)
            if mark != self._job and (job.over or time.monotonic() >= self._reread_at):
                # A job that was over before it was seen has nothing new to tell.
                fresh = self._job[0] == job.id or not job.over
                self._job, self._reread_at = mark, time.monotonic() + REREAD_S
                if fresh:
                    self._begin(("captions", "check") if job.over else ("captions",))

    def look_again(self) -> None:
        """Reads the folder anew; returns at once."""
        self._begin(STEPS)

    def _ask(self, question: Question) -> None:
        old, self._question = self._question, question
        # Another folder: nothing of what was known holds. Another base or purpose of the same
        # folder only changes what the check says.
        if (old.folder, old.metadata) != (question.folder, question.metadata):
            self.now, self.shown, self._store, self._keys = State(), Shown(), None, {}
            self._begin(STEPS if question.folder else ())
        elif question.folder:
            self._begin(("check",))

    # --- what pages show ---

    def show(self, **changes: Any) -> None:
        """Changes fields of `shown`; another filter or search begins on its first page."""
        with self._lock:
            # Page 7 of all pictures may be no page of the filtered ones.
            if "filter" in changes:
                changes.setdefault("page", 0)
            if {"search", "only"} & changes.keys():
                changes.setdefault("rows", 0)
            self.shown = replace(self.shown, **changes)
            self._mark()

    def key(self, name: str) -> str:
        """A picture's name in addresses: tells nothing of the disk, and can't be guessed into."""
        key = sha256(f"{self.now.folder}\0{name}".encode("utf-8", "replace")).hexdigest()[:20]
        self._keys[key] = name
        return key

    def named(self, key: str) -> str:
        """The picture of a key. Raises UserError where the folder no longer has it."""
        name = self._keys.get(key, "")
        if not name or name not in self.now.names:
            raise UserError("tab_dataset.gone")
        return name

    def path(self, name: str) -> Path:
        return (self.now.folder or Path()) / name

    # --- choices ---

    def leave_out(self, names: Iterable[str]) -> None:
        """Pictures that the training is to skip; their files stay."""
        self._choose(lambda folder: curation.leave_out(folder, names))

    def take_in(self, names: Iterable[str]) -> None:
        self._choose(lambda folder: curation.take_in(folder, names))

    def set_focus(self, name: str, point: Point | None) -> None:
        """The point that a crop keeps, as shares of width and height; None: the user chose none."""
        self._choose(lambda folder: curation.set_focus(folder, {name: point}))

    def _choose(self, change: Callable[[Path], Choices]) -> None:
        with self._lock:
            if self.now.folder is not None:
                self._put(chosen=change(self.now.folder))
                self._begin(("check",), RECHECK_S)

    # --- captions ---

    def write(self, captions: Mapping[str, str], what: str = "edit", **params: Any) -> Outcome:
        """Writes captions as one action that can be undone. Raises UserError."""
        with self._lock:
            if self._store is None:
                raise UserError("tab_captioning.not_read")
            return self._written(History(self._store.folder).carry_out(
                Action(what, params), self._store.swaps(captions)))

    def step(self, which: str) -> Outcome:
        """`which`: undo | redo. Raises UserError where there is nothing to undo or redo."""
        with self._lock:
            if self._store is None:
                raise UserError("tab_captioning.not_read")
            history = History(self._store.folder)
            outcome = history.undo() if which == "undo" else history.redo()
            if outcome is None:
                raise UserError(f"captions.nothing_to_{which}", folder=self._store.folder)
            return self._written(outcome)

    def _written(self, outcome: Outcome) -> Outcome:
        assert self._store is not None
        self._store.accept(outcome.done)
        if outcome.left:
            # Another program has changed these files meanwhile: what they hold is read again.
            self._begin(("captions", "check"))
        elif outcome.done:
            self._begin(("check",), RECHECK_S)
        self._put(captions=self._store.captions, **_steps(History(self._store.folder)))
        return outcome

    # --- files that were dropped ---

    def receive(self, files: Sequence[Path], folder: Path,
                then: Callable[[import_files.Taken], None]) -> None:
        """Copies into a folder of ours, in a thread; `then` is called with what came of it."""
        def work() -> None:
            try:
                taken = import_files.copy_all(files, folder, lambda done, total: self._put(
                    doing="copy", done=done, total=total))
            except UserError as fault:
                self._put(doing="", fault=fault)
            else:
                self._put(doing="")
                then(taken)
                self._begin(STEPS)
        threading.Thread(target=work, name="intake", daemon=True).start()

    # --- the thread ---

    def _begin(self, steps: Iterable[str], after_s: float = 0.0) -> None:
        """Starts the thread anew. Steps that the last one hasn't done are done by this one."""
        with self._lock:
            self._control.ask("stop")
            self._superseded.set()
            self._control, self._superseded = Control(), threading.Event()
            self._todo |= set(steps)
            if not self._question.folder:
                self._todo.clear()
                self._mark()
                return
            task = (self._question, self._control, self._superseded, after_s)
            threading.Thread(target=self._work, args=task, name="dataset", daemon=True).start()

    def wait(self, seconds: float = 60.0) -> State:
        """Blocks until nothing is left to do; for tests and scripts."""
        end = time.monotonic() + seconds
        while (self._todo or self.now.doing) and time.monotonic() < end:
            time.sleep(0.02)
        return self.now

    def _work(self, question: Question, control: Control, superseded: threading.Event,
              after_s: float) -> None:
        if superseded.wait(after_s):
            return
        folder = paths.expanded(question.folder).absolute()
        for step in STEPS:
            if step not in self._todo or control.stopping:
                continue
            self._tell(control, doing=step, done=0, total=0)
            error = None
            try:
                getattr(self, f"_{step}")(question, folder, control)
            except UserError as raised:
                error = raised
            except image_stats.Stopped:
                return
            with self._lock:
                if superseded.is_set():
                    return
                # Of a folder that can't be listed nothing else can be read either.
                self._todo -= set(STEPS) if error and step == "names" else {step}
                self._put(doing="", fault=error)

    def _names(self, question: Question, folder: Path, control: Control) -> None:
        try:
            tree = image_folder.walk(folder)
        except UserError:
            self._tell(control, folder=folder, names=(), report=None, captions={})
            raise
        names = tuple(image_folder.relative_name(path, folder) for path in tree.pictures)
        self._tell(control, folder=folder, names=names, chosen=curation.load(folder),
                   looked=f"{time.time_ns():x}")

    def _captions(self, question: Question, folder: Path, control: Control) -> None:
        store = Store(folder, paths.expanded(question.metadata) if question.metadata else None)
        locked = {name: entry.locked for name, entry in store.entries.items() if entry.locked}
        with self._lock:
            if not control.stopping:
                self._store = store
                self._put(captions=store.captions, locked=locked, **_steps(History(folder)))
        if self.count_tokens is None:
            # Without a tokenizer words are counted, and the page says so.
            with contextlib.suppress(Exception):
                count = counter("")
                count("a")
                self.count_tokens = count

    def _check(self, question: Question, folder: Path, control: Control) -> None:
        def emit(event: Event) -> None:
            if isinstance(event, Phase) and event.total:
                self._tell(control, done=event.done, total=event.total)
        report = dataset_report.check(
            folder, facts_of(question), trigger=question.trigger, emit=emit, control=control,
            metadata=paths.expanded(question.metadata) if question.metadata else None,
            purpose=PURPOSES.get(question.purpose, ""),
            crop_about="subject" if question.crop_about == "subject" else "center")
        self._tell(control, report=report)

    def _tell(self, control: Control, **changes: Any) -> None:
        with self._lock:
            if not control.stopping:
                self._put(**changes)

    def _put(self, **changes: Any) -> None:
        with self._lock:
            self.now = replace(self.now, **changes)
            self._mark()

    def _mark(self) -> None:
        self.version += 1
        self._changed()


# --- pure ---

def facts_of(question: Question) -> BaseFacts:
    """Of the base; where none is chosen or it can't be told, of Stable Diffusion 1.5: a folder can
    be looked at before a choice."""
    config = TrainConfig.model_validate(dict(question.rule))
    if not question.base:
        return crops.assumed_facts(config)
    source = paths.DEMO / "base" if question.base == "demo" else paths.expanded(
        question.base)
    try:
        return crops.base_facts(source, sizes_beside, config)
    except UserError as error:
        return crops.assumed_facts(config, error)
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        return crops.assumed_facts(config, UserError(
            "checks.base_not_read", base=question.base, reason=one_line(error)))


def caption_job(snap: Snapshot) -> JobView | None:
    """The newest captioning of the project's folder; one that waits or runs before all others."""
    folder = str(snap.config.train_data_dir)
    jobs = [view for view in snap.runs if view.job == "caption"
            and folder and str(view.config.get("folder", "")) == absolute(folder)]
    return next((view for view in jobs if not view.over), jobs[0] if jobs else None)


def absolute(folder: str) -> str:
    return str(paths.expanded(folder).absolute()) if folder else ""


def _question(snap: Snapshot) -> Question | None:
    # Of a config that can't be read nothing is known: the pages go on showing the last folder.
    if snap.problem:
        return None
    config = snap.config
    rule = tuple((key, getattr(config, key)) for key in RULE)
    return Question(absolute(config.train_data_dir), config.metadata_path, config.base_model, rule,
                    snap.project.purpose, config.trigger_word, config.crop_about)


def _steps(history: History) -> dict[str, str]:
    actions = history.actions()
    return {"undo": next((action.what for action in reversed(actions) if not action.undone), ""),
            "redo": next((action.what for action in actions if action.undone), "")}
