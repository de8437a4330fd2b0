"""The first start in three steps: language and folders, this machine in words, a first preset.

Shown until it is ended or something was trained; the step is kept, so that a closed window goes on
where it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core import families
from core.memory.plan import Machine
from core.workspace import presets
from core.workspace.project import known_presets
from gui.html import button, esc, field, gigabytes
from gui.state.app_state import Context, Snapshot
from gui.widgets.preset_cards import preset_cards

STEPS = ("folders", "machine", "preset")


def first_start(ctx: Context, snap: Snapshot, known: list[presets.Preset]) -> str:
    if snap.settings.welcomed or (snap.runs and not snap.settings.first_step):
        return ""
    step = max(1, min(snap.settings.first_step, len(STEPS)))
    tr = ctx.tr
    marks = "".join(
        f'<li{" aria-current=step" if number == step else ""}>{number} '
        f'{esc(tr(f"first_start.step_{name}"))}</li>' for number, name in enumerate(STEPS, 1))
    body = (_folders, _machine, _preset)[step - 1](ctx, snap, known)
    back = button(tr("first_start.back"), "step", str(step - 1)) if step > 1 else ""
    on = (button(tr("first_start.next"), "step", str(step + 1), kind="primary")
          if step < len(STEPS) else button(tr("first_start.end"), "welcomed", kind="primary"))
    return (f'<section class="card info first" aria-label="{esc(tr("welcome"))}"><h3>'
            f'{esc(tr("welcome"))}</h3><ol class="phases">{marks}</ol>{body}<p class="acts">'
            f'{back}{on}{button(tr("try_demo"), "demo")}<span class="spring"></span>'
            f'{button(tr("first_start.skip"), "welcomed", kind="link")}</p></section>')


def _folders(ctx: Context, snap: Snapshot, known: list[presets.Preset]) -> str:
    tr = ctx.tr
    languages = " ".join(
        f'<a class="act" href="/language/{code}" target="_self" lang="{code}"'
        f'{" aria-current=true" if code == ctx.language else ""}>{name}</a>'
        for code, name in (("en", "English"), ("zh-CN", "中文")))
    rows = ""
    for act, value in (("pictures", snap.config.train_data_dir),
                       ("output", str(snap.settings.output_folder))):
        choose = button(tr("close.choose_folder"), f"native_{act}") if snap.native else ""
        rows += (f'<tr><th>{esc(tr(f"first_start.{act}"))}</th><td>'
                 f'{field(f"set_{act}", tr("first_start.path"), tr("first_start.take"), value)}'
                 f'{choose}<small>{esc(_there(ctx, act, value))}</small></td></tr>')
    return (f'<p>{esc(tr("first_start.what"))}</p><p class="acts">{languages}</p>'
            f'<table class="facts">{rows}</table>')


def _there(ctx: Context, act: str, folder: str) -> str:
    if not folder:
        return ctx.tr("first_start.later")
    if Path(folder).expanduser().is_dir():
        return ctx.tr("first_start.is_there")
    return ctx.tr("first_start.not_there" if act == "pictures" else "first_start.is_made")


def _machine(ctx: Context, snap: Snapshot, known: list[presets.Preset]) -> str:
    machine, tr = snap.machine, ctx.tr
    if machine is None:
        return f'<p>{esc(tr("first_start.looking"))}</p>'
    key = {"cuda": "has_card", "mps": "has_apple"}.get(machine.kind, "has_none")
    found = tr(f"first_start.{key}", name=machine.name, total=gigabytes(machine.total_mb),
               free=gigabytes(machine.free_mb))
    rows = "".join(f"<li>{_fit(ctx, machine, family)}</li>"
                   for family in ("demo", *families.SPECS) if known_presets(family))
    return f'<p><b>{esc(found)}</b></p><ul class="fits">{rows}</ul>'


def _fit(ctx: Context, machine: Machine, family: str) -> str:
    """The richest preset that fits, else what the smallest would need."""
    here = [one for one in known_presets(family) if one.purpose == presets.PURPOSE]
    told: dict[str, Any] = {"family": ctx.tr("first_start.demo") if family == "demo"
                            else families.SPECS[family].short_title}
    verdicts = [(presets.badge(one, machine), one) for one in here]
    for wanted, sign in (("fits", "✓"), ("tight", "⚠")):
        if good := [one for verdict, one in verdicts if verdict == wanted]:
            best = max(good, key=lambda one: (one.needs.vram_gb, one.needs.ram_gb))
            told["preset"] = best.said("title", ctx.language)
            return f'{sign} {esc(ctx.tr(f"first_start.{wanted}", **told))}'
    least = min((one.needs.vram_gb or one.needs.ram_gb for one in here), default=0)
    return f'✖ {esc(ctx.tr("first_start.too_big", gb=f"{least:g}", **told))}'


def _preset(ctx: Context, snap: Snapshot, known: list[presets.Preset]) -> str:
    return (f'<p>{esc(ctx.tr("first_start.choose"))}</p>'
            + preset_cards(ctx, known, snap.project.preset, snap.project.purpose, snap.machine))
