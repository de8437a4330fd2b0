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
PUBLISH_S = 0.5                         # between two looks at a search that goes on


@dataclass(frozen=True, slots=True)
class Fetch:
    """A download: going on, stopped (`over`), failed (`fault`) or done (`path`)."""

    repo: str
    done: int = 0                       # 10^6 bytes
    total: int = 0                      # 0: not known yet
    over: bool = False
    path: str = ""
    fault: UserError | None = None


@dataclass(frozen=True, slots=True)
class Known:
    found: tuple[Found, ...] = ()
    searching: bool = False
    searched: bool = False
    asked: str = ""                     # the repository whose size and licence are on show
    fetch: Fetch | None = None


class BaseModels:
    """`now` is an immutable snapshot; `changed` is called after each change, from any thread."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.now = Known()
        self._changed = changed
        self._lock = threading.Lock()
        self._control = Control()

    def look(self, folders: tuple[str, ...]) -> None:
        """Searches anew, unless that is going on; returns at once."""
        with self._lock:
            if self.now.searching:
                return
            self.now = replace(self.now, searching=True)
        self._changed()
        _thread(lambda: self._search(folders))

    def ask(self, repo: str) -> None:
        """Shows size and licence of a model; "" puts them away."""
        self._set(asked=repo)

    def download(self, repo: str, mirror: str, then: Callable[[str], None]) -> None:
        """Fetches, or goes on with what was stopped; `then` gets the path. Returns at once."""
        with self._lock:
            if self.now.fetch and not self.now.fetch.over:
                raise UserError("base_model.one_download", repo=self.now.fetch.repo)
            self._control = control = Control()
            self.now = replace(self.now, asked="", fetch=Fetch(repo))
        self._changed()
        _thread(lambda: self._fetch(repo, mirror, control, then))

    def stop(self) -> None:
        """What has come stays; the next download goes on from there."""
        self._control.ask("stop")

    def forget(self) -> None:
        """Puts the last download's end away."""
        if self.now.fetch and self.now.fetch.over:
            self._set(fetch=None)

    def _set(self, **changes: Any) -> None:
        with self._lock:
            self.now = replace(self.now, **changes)
        self._changed()

    def _search(self, folders: tuple[str, ...]) -> None:
        found: list[Found] = []
        told = time.monotonic()
        try:
            for one in search.search(search.usual_places(folders)):
                found.append(one)
                if time.monotonic() - told > PUBLISH_S:
                    told = time.monotonic()
                    self._set(found=tuple(found))
        except Exception:               # a drive that was pulled out
            _log.exception("the search for models broke off")
        found.sort(key=lambda one: (one.reason != "", one.path.name.casefold()))
        self._set(found=tuple(found), searching=False, searched=True)

    def _fetch(self, repo: str, mirror: str, control: Control, then: Callable[[str], None]
               ) -> None:
        def emit(event: Event) -> None:
            if isinstance(event, Phase):
                self._set(fetch=Fetch(repo, event.done, event.total))
        try:
            path = hub.fetch(repo, emit, control, mirror)
        except UserError as fault:
            self._ended(fault=fault)
        except Exception as error:
            _log.exception("download of %s", repo)
            self._ended(fault=UserError("gui.no_access", reason=error))
        else:
            self._ended(path=str(path or ""))
            if path is not None:
                then(str(path))

    def _ended(self, **changes: Any) -> None:
        if self.now.fetch:
            self._set(fetch=replace(self.now.fetch, over=True, **changes))


def _thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="bases", daemon=True).start()
