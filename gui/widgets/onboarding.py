"""The first start in three steps: language and folders, this machine in words, a first preset.

Shown until it is ended or something was trained; the step is kept, so that a closed window goes on
where it was.
"""

from __future__ import annotations

import os

from core import families, paths
from core.memory.plan import Machine
from core.units import gigabytes
from core.workspace import presets
from gui.html import acts, button, esc, field
from gui.state.app_state import Context, Snapshot
from gui.widgets.preset_cards import preset_cards

STEPS = ("folders", "machine", "preset")


def first_start(ctx: Context, snap: Snapshot, known: list[presets.Preset]) -> str:
    """`known`: the presets of the project's base."""
    if snap.settings.welcomed or (snap.runs and not snap.settings.first_step):
        return ""
    tr = ctx.tr
    step = max(1, min(snap.settings.first_step, len(STEPS)))
    marks = "".join(
        f'<li{" aria-current=step" if number == step else ""}>{number} '
        f'{esc(tr(f"first_start.step_{name}"))}</li>' for number, name in enumerate(STEPS, 1))
    back = button(tr("first_start.back"), "step", str(step - 1)) if step > 1 else ""
    following = button(tr("first_start.next"), "step", str(step + 1), kind="primary")
    match STEPS[step - 1]:
        case "folders":
            body = _folders(ctx, snap)
        case "machine":
            body = _machine(ctx, snap.machine)
        case _:
            body = f'<p>{esc(tr("first_start.choose"))}</p>' + preset_cards(
                ctx, known, snap.project.preset, snap.project.purpose, snap.machine)
            following = button(tr("first_start.end"), "welcomed", kind="primary")
    row = acts(back, following, button(tr("try_demo"), "demo"), '<span class="spring"></span>',
               button(tr("first_start.skip"), "welcomed", kind="link"))
    title = esc(tr("welcome"))
    return (f'<section class="card info first" aria-label="{title}"><h3>{title}</h3>'
            f'<ol class="phases">{marks}</ol>{body}{row}</section>')


def _folders(ctx: Context, snap: Snapshot) -> str:
    tr = ctx.tr
    languages = " ".join(
        f'<a class="act" href="/language/{code}" target="_self" lang="{code}"'
        f'{" aria-current=true" if code == ctx.language else ""}>{name}</a>'
        for code, name in (("en", "English"), ("zh-CN", "中文")))
    rows = ""
    for kind, folder in (("pictures", snap.config.train_data_dir),
                         ("output", str(snap.settings.output_folder))):
        # An output folder is made by the first run, pictures are not.
        absent = "not_there" if kind == "pictures" else "is_made"
        there = os.path.isdir(paths.expanded(folder))
        state = "later" if not folder else "is_there" if there else absent
        choose = button(tr("close.choose_folder"), f"native_{kind}") if snap.native else ""
        rows += (f'<tr><th>{esc(tr(f"first_start.{kind}"))}</th><td>'
                 f'{field(f"set_{kind}", tr("first_start.path"), tr("first_start.take"), folder)}'
                 f'{choose}<small>{esc(tr(f"first_start.{state}"))}</small></td></tr>')
    return (f'<p>{esc(tr("first_start.what"))}</p>{acts(languages)}'
            f'<table class="facts">{rows}</table>')


def _machine(ctx: Context, machine: Machine | None) -> str:
    tr = ctx.tr
    if machine is None:
        return f'<p>{esc(tr("first_start.looking"))}</p>'
    key = {"cuda": "has_card", "mps": "has_apple"}.get(machine.kind, "has_none")
    text = tr(f"first_start.{key}", name=machine.name, total=gigabytes(machine.total_mb),
              free=gigabytes(machine.free_mb))
    items = "".join(f"<li>{esc(_what_fits(ctx, machine, family))}</li>"
                    for family in ("demo", *families.SPECS) if presets.list_presets(family=family))
    return f'<p><b>{esc(text)}</b></p><ul class="fits">{items}</ul>'


def _what_fits(ctx: Context, machine: Machine, family: str) -> str:
    """The richest preset of a family that fits, else what the smallest would need."""
    title = ctx.tr("first_start.demo") if family == "demo" else families.SPECS[family].short_title
    # The richest first.
    candidates = sorted(
        (preset for preset in presets.list_presets(family=family)
         if preset.purpose == presets.PURPOSE),
        key=lambda preset: (preset.needs.vram_gb, preset.needs.ram_gb), reverse=True)
    for verdict, sign in (("fits", "✓"), ("tight", "⚠")):
        for preset in candidates:
            if presets.badge(preset, machine) == verdict:
                name = preset.localized("title", ctx.language)
                return f'{sign} {ctx.tr(f"first_start.{verdict}", family=title, preset=name)}'
    least = min((preset.needs.vram_gb or preset.needs.ram_gb for preset in candidates), default=0)
    return f'✖ {ctx.tr("first_start.too_big", family=title, gb=f"{least:g}")}'
