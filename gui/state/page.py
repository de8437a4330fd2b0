"""A page: its handlers, and what it shows. Panels (HTML) travel by an address of our own that the
page asks once a second; Gradio carries only what people type into and what can be pressed.

Gradio spends over half a millisecond on each output of an event, changed or not: a timer over all
components of this window would cost a tenth of a core.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr
from pydantic import ValidationError

from core.errors import UserError
from core.serialization import json_of
from gui.state import form
from gui.state.app_state import Snapshot

if TYPE_CHECKING:
    from gui.state.app_state import Context, Tab, Updates

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_SHOW_MESSAGES = ("watch('value', () => window.darkroom.say("
                  "JSON.parse(props.value || '[]')));")

_log = logging.getLogger(__name__)
Handler = Callable[..., "Updates | None"]
# What a page's components show: their marks by id.
Seen = dict[str, str]
# Of the handler that runs: Page.tell is called deep inside it.
_messages: contextvars.ContextVar[list[dict[str, str]]] = contextvars.ContextVar("messages")


class Page:
    """Collects handlers while the tabs are built; `wire` connects them all at the end."""

    def __init__(self) -> None:
        self.tabs: list[tuple[str, Tab]] = []
        # The gr.Tabs: handlers may select one of them.
        self.frame: Any = None
        self.header: Any = None
        # What the button is called that closes a message.
        self.close = "×"
        # Event, handler, inputs, outputs, fill: see `on`.
        self._handlers: list[tuple[Any, Handler, Sequence[Any], Sequence[Any], bool]] = []

    def on(self, handler: Handler, *events: Any, inputs: Sequence[Any] = (),
           outputs: Sequence[Any] = (), fill: bool = False) -> None:
        """`events`: listeners of components, such as button.click, and panels
        (gui/widgets/panel.py), whose `data-act` buttons give (act, id). The handler gets these and
        the values of `inputs`, and returns updates of `outputs`, or None; with `fill` the inputs of
        all tabs are set from the project afterwards, if it changed."""
        self._handlers += [(event, handler, inputs, outputs, fill) for event in events]

    def select(self, tab: str) -> Updates:
        """For handlers: brings a tab to the front."""
        return {self.frame: gr.update(selected=tab)}

    def tell(self, text: str, title: str = "", kind: str = "info") -> None:
        """For handlers: a message at the edge of the page; `kind`: info | warning."""
        _messages.get([]).append({"kind": kind, "title": title, "text": text, "close": self.close})

    # --- what it shows ---

    def live(self, ctx: Context, version: str, marks: Mapping[str, str]) -> dict[str, Any] | None:
        """What a page that shows `marks` (panel -> mark) lacks; None: nothing."""
        snap = ctx.app_state.snapshot()
        if version == snap.mark:
            return None
        panels, rest = self._painted(snap)
        changed = {name: (mark, html) for name, html in panels.items()
                   if marks.get(name) != (mark := _mark(html))}
        return {"version": snap.mark, "panels": changed, "filled": ctx.app_state.fills,
                "painted": _mark_of_all(rest)}

    def _painted(self, snap: Snapshot) -> tuple[dict[str, str], Updates]:
        """-> panels by name; updates of other components."""
        updates: Updates = dict(self.header.paint(snap))
        panels, faults = {}, ""
        for name, tab in self.tabs:
            try:
                panels[f"tab-{name}-button"] = tab.label(snap)
                updates |= tab.paint(snap)
            except Exception as error:
                # Something of the user's that nobody foresaw must not take the other tabs down.
                _log.exception("tab %s", name)
                faults += self.header.damaged_tab(name, error)
        updates[self.header.panel] += faults
        rest = {}
        for component, value in updates.items():
            if isinstance(component, gr.HTML):
                panels[str(component.elem_id)] = value
            else:
                rest[component] = value
        return panels, rest

    def _filled(self, snap: Snapshot) -> Updates:
        updates: Updates = {}
        for name, tab in self.tabs:
            try:
                updates |= tab.fill(snap)
            except Exception:
                # Its painting, which needs the same, tells it.
                _log.exception("tab %s", name)
        return updates

    def wire(self, ctx: Context, load: Any) -> None:
        """Called once, inside gr.Blocks, when everything is built; `load`: the Blocks' own."""
        # All that is ever painted: a project that can't be shown now is followed by others.
        snaps = (Snapshot(), ctx.app_state.snapshot())
        painted = list({one: 0 for snap in snaps for one in self._painted(snap)[1]})
        filled = list({one: 0 for snap in snaps for one in self._filled(snap)})
        self.close = ctx.tr("close")
        messages = gr.HTML("", visible="hidden", js_on_load=_SHOW_MESSAGES)
        # What a page shows is known by the page alone: an answer may be lost on its way.
        seen, filling = (gr.HTML("", visible="hidden", elem_id=f"{name}-shown")
                         for name in ("repaint", "refill"))
        repaint, refill = (gr.Button(visible="hidden", elem_id=name)
                           for name in ("repaint", "refill"))

        def paint(shown: str) -> Any:
            return _difference(self._painted(ctx.app_state.snapshot())[1], _seen(shown), painted)

        def fill() -> Any:
            # Counted before it is read: a change in between is filled in once more.
            fills, updates = ctx.app_state.fills, self._filled(ctx.app_state.snapshot())
            return [_shown(str(fills)),
                    *(updates.get(component, gr.skip()) for component in filled)]

        load(lambda: ctx.app_state.replan(ctx.language), [], [], **QUIET)
        # The page (gui/assets/live.js) presses these, one at a time: no answer overtakes another.
        repaint.click(paint, [seen], [seen, *painted], trigger_mode="always_last", **QUIET)
        refill.click(fill, [], [filling, *filled], trigger_mode="always_last", **QUIET)
        for event, handler, inputs, outputs, refilled in self._handlers:
            panel, shown = isinstance(event, gr.HTML), [self.frame, *outputs]
            # Every click counts; of what is typed only the last state does.
            (event.click if panel else event)(
                self._handled(ctx, handler, shown, refilled, panel), list(inputs),
                [messages, *shown], trigger_mode="multiple" if panel else "always_last", **QUIET)

    def _handled(self, ctx: Context, handler: Handler, outputs: Sequence[Any], fill: bool,
                 panel: bool) -> Callable[..., Any]:
        """The function that Gradio calls: an error of the handler becomes a message in the page's
        language, and the page is painted all the same."""
        def act(*values: Any) -> Any:
            app_state = ctx.app_state
            messages: list[dict[str, str]] = []
            _messages.set(messages)
            before = (app_state.projects.now, app_state.settings.now)
            updates: Updates = {}
            try:
                updates = handler(*values) or {}
            except (UserError, ValidationError) as error:
                self.tell(form.error_text(ctx, error), ctx.tr("not_done"), "warning")
            except OSError as error:
                self.tell(ctx.tr("no_access", reason=str(error)), ctx.tr("not_done"), "warning")
            except Exception as error:
                _log.exception("handler")
                self.tell(ctx.tr("unforeseen", reason=f"{type(error).__name__}: {error}"),
                          ctx.tr("not_done"), "warning")
            if fill and before != (app_state.projects.now, app_state.settings.now):
                app_state.filled()
            return [_carried(messages) if messages else gr.skip(),
                    *(updates.get(component, gr.skip()) for component in outputs)]

        def act_panel(event: gr.EventData, *values: Any) -> Any:
            data = event._data or {}
            return act(str(data.get("act", "")), str(data.get("id", "")), *values)

        return act_panel if panel else act


def _carried(messages: list[dict[str, str]]) -> str:
    """The messages as JSON. Gradio takes a gr.HTML's value for HTML even where it is hidden, and
    they quote other people's files: nothing of it may be a tag."""
    return re.sub("[<>&]", lambda sign: f"\\u{ord(sign[0]):04x}", json.dumps(messages))


def _mark(text: str) -> str:
    return f"{zlib.crc32(text.encode('utf-8', 'replace')):x}{len(text):x}"


def _mark_of_all(updates: Updates) -> str:
    return _mark(repr([(component._id, value) for component, value in updates.items()]))


def _difference(updates: Updates, seen: Seen, outputs: Sequence[Any]) -> list[Any]:
    """What the page shows then, for its `repaint-shown`; then a value for each of `outputs`, or
    gr.skip() where the page shows it already."""
    fresh, changed = dict(seen), {}
    for component, value in updates.items():
        name, mark = str(component._id), _mark(repr(value))
        if fresh.get(name) != mark:
            fresh[name] = mark
            changed[component] = value
    return [_shown(_mark_of_all(updates), json.dumps(fresh)),
            *(changed.get(component, gr.skip()) for component in outputs)]


def _seen(shown: str | None) -> Seen:
    return json_of((shown or "").partition(">")[2].removesuffix("</i>"), dict)


def _shown(mark: str, seen: str = "") -> str:
    return f'<i data-shown="{mark}">{seen}</i>'
