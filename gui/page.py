"""A page: its handlers and its one painter. What is sent is the difference to what was sent last.

Handlers change the house and return nothing, or updates of their own; faults become messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
from pydantic import ValidationError

from core.faults import Fault

if TYPE_CHECKING:
    from gui.context import Context, Snapshot, Tab, Updates

TICK_S = 1.0
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

Handler = Callable[..., "Updates | None"]
Seen = dict[str, Any]                   # what a page shows, by component; and the version


@dataclass(frozen=True, slots=True)
class _Wish:
    event: Any
    handler: Handler
    inputs: Sequence[Any]
    fill: bool
    panel: bool


class Page:
    """Collects handlers while the tabs are built; `wire` connects them all at the end."""

    def __init__(self) -> None:
        self.tabs: list[tuple[Any, Tab]] = []       # gr.Tab and what paints it
        self.frame: Any = None                      # gr.Tabs: handlers may select one
        self.header: Any = None
        self._wishes: list[_Wish] = []
        self._known: list[Any] = []                 # every component that is ever painted

    def on(self, event: Any, handler: Handler, inputs: Sequence[Any] = (),
           fill: bool = False) -> None:
        """`event`: a component's listener, such as button.click. The handler gets the inputs'
        values; with `fill` the inputs of all tabs are set from the project afterwards."""
        self._wishes.append(_Wish(event, handler, list(inputs), fill, False))

    def on_panel(self, panel: gr.HTML, handler: Handler, inputs: Sequence[Any] = (),
                 fill: bool = False) -> None:
        """Clicks on `data-act` buttons inside a panel (gui/widgets/panel.py): the handler gets
        (act, id, *inputs)."""
        self._wishes.append(_Wish(panel.click, handler, list(inputs), fill, True))

    def select(self, tab: str) -> Updates:
        """For handlers: brings a tab to the front."""
        return {self.frame: gr.update(selected=tab)}

    def updates(self, snap: Snapshot, fill: bool) -> Updates:
        found: Updates = dict(self.header.paint(snap))
        for holder, tab in self.tabs:
            found[holder] = gr.update(label=tab.label(snap))
            found |= tab.paint(snap)
            if fill:
                found |= tab.fill(snap)
        return found

    def wire(self, ctx: Context, load: Any) -> None:
        """Called once, inside gr.Blocks, when everything is built; `load`: the Blocks' own."""
        snap = ctx.house.snapshot()
        painted = list(self.updates(snap, fill=False))
        self._known = list(dict.fromkeys([*self.updates(snap, fill=True), self.frame]))
        seen = gr.State({})
        load(self._painter(ctx, self._known, fill=True), [seen], [seen, *self._known], **QUIET)
        gr.Timer(TICK_S).tick(self._painter(ctx, painted, fill=False), [seen], [seen, *painted],
                              trigger_mode="once", **QUIET)
        for wish in self._wishes:
            wish.event(self._handled(ctx, wish), [seen, *wish.inputs], [seen, *self._known],
                       trigger_mode="multiple" if wish.panel else "always_last", **QUIET)

    def _painter(self, ctx: Context, known: Sequence[Any], fill: bool) -> Callable[..., Any]:
        def paint(seen: Seen) -> Any:
            if fill:
                ctx.house.replan(ctx.language)
            snap = ctx.house.snapshot()
            if not fill and seen.get("version") == snap.version:
                return [gr.skip()] * (1 + len(known))
            return _difference(self.updates(snap, fill), {} if fill else seen, snap, known)
        return paint

    def _handled(self, ctx: Context, wish: _Wish) -> Callable[..., Any]:
        def act(seen: Seen, *values: Any) -> Any:
            extra = _guarded(ctx, wish.handler, values)
            snap = ctx.house.snapshot()
            shown = {"version": seen.get("version")} if wish.fill else seen
            return _difference(self.updates(snap, wish.fill), shown, snap, self._known, extra)

        def act_panel(event: gr.EventData, seen: Seen, *values: Any) -> Any:
            data = event._data or {}
            return act(seen, str(data.get("act", "")), str(data.get("id", "")), *values)

        return act_panel if wish.panel else act


def _difference(found: Updates, seen: Seen, snap: Snapshot, known: Sequence[Any],
                extra: Updates | None = None) -> list[Any]:
    """Outputs in the order of `known`, the new Seen before them; what the page shows already is
    skipped. `extra` is sent in any case and not remembered."""
    fresh: Seen = {**seen, "version": snap.version}
    changed: Updates = {}
    for component, value in found.items():
        name, mark = str(component._id), repr(value)
        if fresh.get(name) != mark:
            fresh[name] = mark
            changed[component] = value
    changed |= extra or {}
    return [fresh, *(changed.get(one, gr.skip()) for one in known)]


def _guarded(ctx: Context, handler: Handler, values: Sequence[Any]) -> Updates | None:
    """A fault becomes a message in the page's language; the page is painted all the same."""
    try:
        return handler(*values)
    except Fault as fault:
        gr.Warning(ctx.told(fault), title=ctx.say("not_done"))
    except ValidationError as error:
        gr.Warning(error.errors()[0]["msg"], title=ctx.say("not_done"))
    except OSError as error:
        gr.Warning(ctx.say("no_access", reason=str(error)), title=ctx.say("not_done"))
    return None
