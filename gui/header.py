"""The header of every tab: project, card, what is going on, language, theme."""

from __future__ import annotations

from core.jobs.runs import JobView
from gui.html import bar, button, duration, esc, gigabytes
from gui.state.app_state import Context, Snapshot, Updates
from gui.widgets.close_dialog import close_dialog
from gui.widgets.panel import panel

NEXT_THEME = {"auto": "dark", "dark": "light", "light": "auto"}
THEME_SIGN = {"auto": "◐", "dark": "☾", "light": "☀"}


class Header:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.panel, self.dialog = panel("header"), panel("close-dialog")
        for one in (self.panel, self.dialog):
            ctx.page.on_panel(one, self.act, fill=True)

    def paint(self, snap: Snapshot) -> Updates:
        return {self.panel: header(self.ctx, snap), self.dialog: close_dialog(self.ctx, snap)}

    def act(self, act: str, id: str) -> Updates | None:
        app_state = self.ctx.app_state
        if act == "job":
            run = app_state.snapshot().run(id)
            if run and run.job == "train":
                app_state.projects.change(run=id)
            places = {"train": "parameters", "caption": "captioning"}
            return self.ctx.page.select(places.get(run.job if run else "", "inference"))
        if act in ("open", "new"):
            base = app_state.projects.now.edits.get("base_model", "demo")
            if not app_state.projects.open(id).edits:           # a new one starts on the same base
                app_state.projects.edit(base_model=base)
            app_state.projects.change(run="")
            app_state.settings.change(project=app_state.projects.now.name)
            app_state.replan(self.ctx.language)
        desktop = app_state.desktop
        match act:
            case "dismiss":
                app_state.dismiss()
            case "quit":
                if desktop.may_close():
                    desktop.end()
            case "keep_run":
                desktop.end()
            case "stop_run":
                desktop.stop_first(app_state.stop_all)
            case "stay":
                app_state.jobs.hold(False)
                desktop.stay()
        return None


def header(ctx: Context, snap: Snapshot) -> str:
    return (f'<div class="header">{_project(ctx, snap)}{_gauge(ctx, snap)}{_pill(ctx, snap)}'
            f'<span class="spring"></span>{_language(ctx)}{_theme(ctx, snap)}'
            f'{button(ctx.tr("close.quit"), "quit", kind="link")}</div>{_broken(ctx)}')


def _broken(ctx: Context) -> str:
    """Files of ours that were damaged and are put aside."""
    return "".join(
        f'<section class="card warning" role="alert"><p>{esc(ctx.told(fault))} '
        f'{button(ctx.tr("close.dismiss"), "dismiss")}</p></section>'
        for fault in ctx.app_state.broken)


def _project(ctx: Context, snap: Snapshot) -> str:
    names = [name for name in ctx.app_state.projects.names() if name != snap.project.name]
    others = "".join(button(name, "open", name, kind="link") for name in names[:30])
    label = esc(ctx.tr("new_project"))
    return (f'<details class="menu"><summary><b aria-hidden="true">◆</b> '
            f'{esc(ctx.tr("project"))}: <b>{esc(snap.project.name)}</b></summary>'
            f'<div>{others}<form data-act="new"><input required maxlength="60" '
            f'placeholder="{label}" aria-label="{label}"><button class="act">+</button></form>'
            f'</div></details>')


def _gauge(ctx: Context, snap: Snapshot) -> str:
    gauge = snap.gauge
    if not gauge.total_mb:
        return ""
    key = "memory_of_card" if gauge.kind == "cuda" else "memory_of_computer"
    said = ctx.tr(key, name=gauge.name)
    degrees = "" if gauge.temperature_c is None else f" · {gauge.temperature_c} °C"
    name = gauge.name if gauge.kind == "cuda" else ctx.tr(f"device_{gauge.kind}")
    return (f'<span class="gauge" title="{esc(said)}"><span>{esc(name)}</span>'
            f'{bar(gauge.used_mb / gauge.total_mb, said)}<span>{gauge.used_mb / 1024:.1f} / '
            f'{gigabytes(gauge.total_mb)}{degrees}</span></span>')


def _pill(ctx: Context, snap: Snapshot) -> str:
    view = snap.active
    waiting = len(snap.queued)
    more = f" +{waiting}" if view and waiting else ""
    if view is None:
        text = ctx.tr("queue_waits", count=waiting) if waiting else ctx.tr("idle")
        return f'<span class="pill idle">○ {esc(text)}</span>'
    text = " ".join(filter(None, (ctx.tr(f"doing_{view.job}") if view.state == "running"
                                  else ctx.tr(f"state_{view.state}"), _share(view))))
    left = f" · {duration(ctx, view.eta_s)}" if view.eta_s and view.state == "running" else ""
    return button(f"● {text}{left}{more}", "job", view.id, kind=f"pill {view.state}",
                  hint=ctx.tr("go_to_run"))


def _share(view: JobView) -> str:
    done, total = (view.step, view.total) if view.total else (view.phase_done, view.phase_total)
    return f"{100 * done // total} %" if total else ""


def _language(ctx: Context) -> str:
    """Each language by its own name."""
    links = [f'<a href="/language/{code}" target="_self" lang="{code}" hreflang="{code}"'
             f'{" aria-current=true" if code == ctx.language else ""}>{name}</a>'
             for code, name in (("en", "EN"), ("zh-CN", "中文"))]
    return f'<span class="language">{" | ".join(links)}</span>'


def _theme(ctx: Context, snap: Snapshot) -> str:
    theme = snap.settings.theme
    said = esc(ctx.tr(f"theme_{theme}"))
    return (f'<a class="theme" href="/theme/{NEXT_THEME[theme]}" target="_self" title="{said}" '
            f'aria-label="{said}">{THEME_SIGN[theme]}</a>')
