"""Base models: what was found on this machine, and a download on the user's word, in threads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from core.base_models import hub, search
from core.base_models.search import Found
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Event, Phase

_log = logging.getLogger(__name__)
# Seconds between two times that a search publishes what it has found so far.
PUBLISH_S = 0.5


@dataclass(frozen=True, slots=True)
class Fetch:
    """A download: going on, stopped (`over`), failed (`fault`) or done (`path`)."""

    repo: str
    # In 10^6 bytes; total 0: not known yet.
    done: int = 0
    total: int = 0
    over: bool = False
    path: str = ""
    fault: UserError | None = None


@dataclass(frozen=True, slots=True)
class BasesState:
    """What is known of base models at one moment."""

    found: tuple[Found, ...] = ()
    searching: bool = False
    searched: bool = False
    # The repository whose size and licence are shown.
    asked: str = ""
    fetch: Fetch | None = None


class BaseModels:
    """`now` is an immutable snapshot; `changed` is called after each change, from any thread."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.now = BasesState()
        self._changed = changed
        self._lock = threading.Lock()
        self._control = Control()

    def look(self, folders: tuple[str, ...]) -> None:
        """Starts a search of this machine, unless one is going on; returns at once."""
        with self._lock:
            if self.now.searching:
                return
            self.now = replace(self.now, searching=True)
        self._changed()

        def work() -> None:
            models: list[Found] = []
            published = time.monotonic()
            try:
                for model in search.search(search.usual_places(folders)):
                    models.append(model)
                    if time.monotonic() - published > PUBLISH_S:
                        published = time.monotonic()
                        self._set(found=tuple(models))
            except Exception:
                # A drive that was pulled out: what was found until then is shown.
                _log.exception("the search for models broke off")
            models.sort(key=lambda model: (model.reason != "", model.path.name.casefold()))
            self._set(found=tuple(models), searching=False, searched=True)
        threading.Thread(target=work, name="bases", daemon=True).start()

    def ask(self, repo: str) -> None:
        """Shows size and licence of a model before it is fetched; "" hides them."""
        self._set(asked=repo)

    def download(self, repo: str, mirror: str, then: Callable[[str], None]) -> None:
        """Fetches, or goes on with what was stopped; `then` gets the path. Returns at once."""
        with self._lock:
            if self.now.fetch and not self.now.fetch.over:
                raise UserError("base_model.one_download", repo=self.now.fetch.repo)
            self._control = control = Control()
            self.now = replace(self.now, asked="", fetch=Fetch(repo))
        self._changed()

        def emit(event: Event) -> None:
            if isinstance(event, Phase):
                self._set(fetch=Fetch(repo, event.done, event.total))

        def work() -> None:
            path = fault = None
            try:
                path = hub.fetch(repo, emit, control, mirror)
            except UserError as error:
                fault = error
            except Exception as error:
                _log.exception("download of %s", repo)
                fault = UserError("gui.no_access", reason=error)
            if self.now.fetch:
                self._set(fetch=replace(self.now.fetch, over=True, path=str(path or ""),
                                        fault=fault))
            # None: it was stopped.
            if path is not None:
                then(str(path))
        threading.Thread(target=work, name="bases", daemon=True).start()

    def stop(self) -> None:
        """Stops the download. What has come is kept: the next download goes on from there."""
        self._control.ask("stop")

    def forget(self) -> None:
        """Hides how the last download ended."""
        if self.now.fetch and self.now.fetch.over:
            self._set(fetch=None)

    def _set(self, **changes: Any) -> None:
        with self._lock:
            self.now = replace(self.now, **changes)
        self._changed()
