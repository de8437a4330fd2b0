"""The header of every tab: project, card, what is going on, language, theme."""

from __future__ import annotations

from core.units import gigabytes
from gui.html import bar, button, card, duration, esc
from gui.state.app_state import Context, Gauge, Snapshot, Updates
from gui.widgets.close_dialog import close_dialog
from gui.widgets.panel import panel

NEXT_THEME = {"auto": "dark", "dark": "light", "light": "auto"}
THEME_SIGN = {"auto": "◐", "dark": "☾", "light": "☀"}


class Header:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.panel, self.dialog = panel("header"), panel("close-dialog")
        ctx.page.on(self.act, self.panel, self.dialog, fill=True)

    def paint(self, snap: Snapshot) -> Updates:
        return {self.panel: header(self.ctx, snap), self.dialog: close_dialog(self.ctx, snap)}

    def damaged_tab(self, name: str, error: Exception) -> str:
        """The message that a tab can't be shown."""
        tr = self.ctx.tr
        return card("fault", tr("tab_broken", tab=tr(f"tab_{name}")),
                    tr("tab_broken_why", reason=f"{type(error).__name__}: {error}"))

    def act(self, act: str, id: str) -> Updates | None:
        """Buttons of the header and of the dialog."""
        app_state = self.ctx.app_state
        projects, desktop = app_state.projects, app_state.desktop
        match act:
            case "job":
                run = app_state.snapshot().run(id)
                if run and run.job == "train":
                    projects.change(run=id)
                tabs = {"train": "parameters", "caption": "captioning"}
                return self.ctx.page.select(tabs.get(run.job if run else "", "inference"))
            case "open" | "new":
                base = projects.now.edits.get("base_model", "demo")
                # A new project starts on the same base.
                if not projects.open(id).edits:
                    projects.edit(base_model=base)
                projects.change(run="")
                app_state.settings.change(project=projects.now.name)
                app_state.replan(self.ctx.language)
            case "dismiss":
                app_state.dismiss()
            case "quit" | "keep_run":
                if act == "keep_run" or desktop.may_close():
                    desktop.end()
            case "stop_run":
                desktop.stop_first(app_state.stop_all)
            case "stay":
                app_state.jobs.hold(False)
                desktop.stay()
        return None


def header(ctx: Context, snap: Snapshot) -> str:
    """Project, memory, the run, languages, theme, quit; below it, files of ours that broke."""
    tr = ctx.tr
    languages = " | ".join(
        f'<a href="/language/{code}" target="_self" lang="{code}" hreflang="{code}"'
        f'{" aria-current=true" if code == ctx.language else ""}>{name}</a>'
        for code, name in (("en", "EN"), ("zh-CN", "中文")))
    theme, theme_name = snap.settings.theme, esc(tr(f"theme_{snap.settings.theme}"))
    # Damaged files are put aside: the app goes on without them.
    dismiss = button(tr("close.dismiss"), "dismiss")
    broken = "".join(f'<section class="card warning" role="alert"><p>{esc(ctx.error_text(error))} '
                     f'{dismiss}</p></section>' for error in ctx.app_state.broken)
    # The project's name opens a menu of the others.
    names = [name for name in ctx.app_state.projects.names() if name != snap.project.name]
    others = "".join(button(name, "open", name, kind="link") for name in names[:30])
    label = esc(tr("new_project"))
    project = (f'<details class="menu"><summary><b aria-hidden="true">◆</b> {esc(tr("project"))}: '
               f'<b>{esc(snap.project.name)}</b></summary><div>{others}<form data-act="new">'
               f'<input required maxlength="60" placeholder="{label}" aria-label="{label}">'
               f'<button class="act">+</button></form></div></details>')
    return (f'<div class="header">{project}{_memory(ctx, snap.gauge)}{_run(ctx, snap)}'
            f'<span class="spring"></span><span class="language">{languages}</span>'
            f'<a class="theme" href="/theme/{NEXT_THEME[theme]}" target="_self" '
            f'title="{theme_name}" aria-label="{theme_name}">{THEME_SIGN[theme]}</a>'
            f'{button(tr("close.quit"), "quit", kind="link")}</div>{broken}')


def _memory(ctx: Context, gauge: Gauge) -> str:
    if not gauge.total_mb:
        return ""
    card = gauge.kind == "cuda"
    text = ctx.tr("memory_of_card" if card else "memory_of_computer", name=gauge.name)
    name = gauge.name if card else ctx.tr(f"device_{gauge.kind}")
    degrees = "" if gauge.temperature_c is None else f" · {gauge.temperature_c} °C"
    return (f'<span class="gauge" title="{esc(text)}"><span>{esc(name)}</span>'
            f'{bar(gauge.used_mb, gauge.total_mb, text)}<span>{gauge.used_mb / 1024:.1f} / '
            f'{gigabytes(gauge.total_mb)}{degrees}</span></span>')


def _run(ctx: Context, snap: Snapshot) -> str:
    """What is going on, in one button that leads there."""
    view, waiting = snap.active, len(snap.queued)
    if view is None:
        text = ctx.tr("queue_waits", count=waiting) if waiting else ctx.tr("idle")
        return f'<span class="pill idle">○ {esc(text)}</span>'
    running = view.state == "running"
    text = ctx.tr(f"doing_{view.job}" if running else f"state_{view.state}")
    # Before the first update there is only the progress of the phase.
    done, total = (view.step, view.total) if view.total else (view.phase_done, view.phase_total)
    if total:
        text += f" {100 * done // total} %"
    if view.eta_s and running:
        text += f" · {duration(ctx, view.eta_s)}"
    if waiting:
        text += f" +{waiting}"
    return button(f"● {text}", "job", view.id, kind=f"pill {view.state}", hint=ctx.tr("go_to_run"))
