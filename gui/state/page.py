"""A page: its handlers, and what it shows. Panels (HTML) travel by an address of our own that the
page asks once a second; Gradio carries only what people type into and what can be pressed.

Gradio spends over half a millisecond on each output of an event, changed or not: a timer over all
components of this window would cost a tenth of a core.
"""

from __future__ import annotations

import contextvars
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
from pydantic import ValidationError

from core.errors import UserError
from core.serialization import json_of
from gui.state import form

if TYPE_CHECKING:
    from gui.state.app_state import Context, Snapshot, Tab, Updates

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# Gradio adds a page's scripts by itself: an area may be there before gui/assets/live.js is.
READY = ("const ready = act => window.darkroom ? act()"
         " : addEventListener('darkroom', act, {once: true});")
_SAY = f"{READY} watch('value', () => {{ const said = JSON.parse(props.value || '[]'); " \
       "ready(() => window.darkroom.tr(said)); });"

Handler = Callable[..., "Updates | None"]
Seen = dict[str, str]                   # what a page's components show: their marks by id
_messages: contextvars.ContextVar[list[dict[str, str]]] = contextvars.ContextVar("messages")


@dataclass(frozen=True, slots=True)
class _Handler:
    event: Any
    handler: Handler
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    fill: bool
    panel: bool


class Page:
    """Collects handlers while the tabs are built; `wire` connects them all at the end."""

    def __init__(self) -> None:
        self.tabs: list[tuple[str, Tab]] = []       # by name, and what paints it
        self.frame: Any = None                      # gr.Tabs: handlers may select one
        self.header: Any = None
        self.close = "×"                            # what the button of a message is called
        self._wishes: list[_Handler] = []

    def on(self, event: Any, handler: Handler, inputs: Sequence[Any] = (), fill: bool = False,
           outputs: Sequence[Any] = ()) -> None:
        """`event`: a component's listener, such as button.click. The handler gets the inputs'
        values and returns updates of `outputs`, or None; with `fill` the inputs of all tabs are
        set from the project afterwards, if it changed."""
        self._wishes.append(_Handler(event, handler, list(inputs), list(outputs), fill, False))

    def on_panel(self, panel: gr.HTML, handler: Handler, inputs: Sequence[Any] = (),
                 fill: bool = False, outputs: Sequence[Any] = ()) -> None:
        """Clicks on `data-act` buttons inside a panel (gui/widgets/panel.py): the handler gets
        (act, id, *inputs)."""
        self._wishes.append(_Handler(panel.click, handler, list(inputs), list(outputs), fill, True))

    def select(self, tab: str) -> Updates:
        """For handlers: brings a tab to the front."""
        return {self.frame: gr.update(selected=tab)}

    def tell(self, text: str, title: str = "", kind: str = "info") -> None:
        """For handlers: a message at the edge of the page; `kind`: info | warning."""
        told = {"kind": kind, "title": title, "text": text, "close": self.close}
        _messages.get([]).append(told)

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
        panels = {}
        for name, tab in self.tabs:
            panels[f"tab-{name}-button"] = tab.label(snap)
            updates |= tab.paint(snap)
        rest = {one: value for one, value in updates.items() if not _is_panel(one)}
        panels |= {str(one.elem_id): value for one, value in updates.items() if _is_panel(one)}
        return panels, rest

    def _filled(self, snap: Snapshot) -> Updates:
        return {one: value for _, tab in self.tabs for one, value in tab.fill(snap).items()}

    def wire(self, ctx: Context, load: Any) -> None:
        """Called once, inside gr.Blocks, when everything is built; `load`: the Blocks' own."""
        snap = ctx.app_state.snapshot()
        painted, filled = list(self._painted(snap)[1]), list(self._filled(snap))
        self.close = ctx.tr("close")
        tr = gr.HTML("", visible="hidden", js_on_load=_SAY)
        # What a page shows is known by the page alone: an answer may be lost on its way.
        seen, filling = (gr.HTML("", visible="hidden", elem_id=f"{name}-shown")
                         for name in ("repaint", "refill"))
        repaint, refill = (gr.Button(visible="hidden", elem_id=name)
                           for name in ("repaint", "refill"))

        def paint(shown: str) -> Any:
            return _difference(self._painted(ctx.app_state.snapshot())[1], _seen(shown), painted)

        def fill() -> Any:
            fills, found = ctx.app_state.fills, self._filled(ctx.app_state.snapshot())
            return [_shown(str(fills)), *(found.get(one, gr.skip()) for one in filled)]

        load(lambda: ctx.app_state.replan(ctx.language), [], [], **QUIET)
        # The page (gui/assets/live.js) presses these, one at a time: no answer overtakes another.
        repaint.click(paint, [seen], [seen, *painted], trigger_mode="always_last", **QUIET)
        refill.click(fill, [], [filling, *filled], trigger_mode="always_last", **QUIET)
        for wish in self._wishes:
            wish.event(self._handled(ctx, wish), wish.inputs, [tr, self.frame, *wish.outputs],
                       trigger_mode="multiple" if wish.panel else "always_last", **QUIET)

    def _handled(self, ctx: Context, wish: _Handler) -> Callable[..., Any]:
        known = [self.frame, *wish.outputs]

        def act(*values: Any) -> Any:
            messages: list[dict[str, str]] = []
            _messages.set(messages)
            before = (ctx.app_state.projects.now, ctx.app_state.settings.now)
            extra = _guarded(ctx, wish.handler, values) or {}
            if wish.fill and before != (ctx.app_state.projects.now, ctx.app_state.settings.now):
                ctx.app_state.filled()
            said = json.dumps(messages) if messages else gr.skip()
            return [said, *(extra.get(one, gr.skip()) for one in known)]

        def act_panel(event: gr.EventData, *values: Any) -> Any:
            data = event._data or {}
            return act(str(data.get("act", "")), str(data.get("id", "")), *values)

        return act_panel if wish.panel else act


def _is_panel(component: Any) -> bool:
    return isinstance(component, gr.HTML)


def _mark(text: str) -> str:
    return f"{zlib.crc32(text.encode('utf-8', 'replace')):x}{len(text):x}"


def _mark_of_all(found: Updates) -> str:
    return _mark(repr([(one._id, value) for one, value in found.items()]))


def _difference(found: Updates, seen: Seen, known: Sequence[Any]) -> list[Any]:
    """What the page shows then, for its `repaint-shown`; outputs in the order of `known`, without
    what it shows already."""
    fresh, changed = dict(seen), {}
    for component, value in found.items():
        name, mark = str(component._id), _mark(repr(value))
        if fresh.get(name) != mark:
            fresh[name] = mark
            changed[component] = value
    return [_shown(_mark_of_all(found), json.dumps(fresh)),
            *(changed.get(one, gr.skip()) for one in known)]


def _seen(shown: str | None) -> Seen:
    return json_of((shown or "").partition(">")[2].removesuffix("</i>"), dict)


def _shown(mark: str, seen: str = "") -> str:
    return f'<i data-shown="{mark}">{seen}</i>'


def _guarded(ctx: Context, handler: Handler, values: Sequence[Any]) -> Updates | None:
    """A fault becomes a message in the page's language; the page is painted all the same."""
    try:
        return handler(*values)
    except UserError as fault:
        said = ctx.told(fault)
    except ValidationError as error:
        said = form.said(ctx, error)
    except OSError as error:
        said = ctx.tr("no_access", reason=str(error))
    ctx.page.tell(said, ctx.tr("not_done"), "warning")
    return None
