"""The LoRAs that are drawn with: weights, trigger words, what can be added, the base model."""

from __future__ import annotations

import json
from pathlib import Path

from core import paths
from core.families.lora_signs import NOT_LORA
from core.lora_files.files import Info
from gui.html import button, clock, esc
from gui.state import inference_request as wanted
from gui.state.app_state import Context, Snapshot
from gui.state.inference_files import InferenceFiles
from gui.state.inference_request import Added, Choice


def lora_list(ctx: Context, snap: Snapshot, desk: InferenceFiles) -> str:
    found = wanted.choices(snap, desk)
    loras = wanted.added(snap, found)
    rows = "".join(_row(ctx, number, one, found, desk) for number, one in enumerate(loras))
    none = "" if loras else f'<p class="small">{esc(ctx.tr("no_lora_yet"))}</p>'
    return (f'<section class="box loras"><div class="tools"><h3>LoRA</h3>'
            f'<span class="spring"></span>{_base(ctx, snap, found)}</div>'
            f'<ul class="added">{rows}</ul>{none}{_words(ctx, snap, loras, found, desk)}'
            f'{_add(ctx, loras, found)}{_dropped(ctx, desk)}</section>')


def lora_names(snap: Snapshot, desk: InferenceFiles) -> str:
    """For completion in the prompt: what the names mean is decided by the same list."""
    known = list(wanted.names(wanted.choices(snap, desk)))
    return f'<span hidden data-names="{esc(json.dumps(known, ensure_ascii=False))}"></span>'


def called(ctx: Context, choice: Choice) -> str:
    """mia-v1 · step 1500 · best"""
    if choice.run is None:
        return choice.name
    kind = ctx.tr(choice.kind) if choice.kind else ""
    return " · ".join(filter(None, (choice.run.name, ctx.tr("step_n", step=choice.step), kind)))


def _row(ctx: Context, number: int, one: Added, found: list[Choice], desk: InferenceFiles) -> str:
    choice = next((c for c in found if c.file == one.file), None)
    name = called(ctx, choice) if choice else one.name
    label = esc(ctx.tr("tab_inference.weight_of", name=name))
    info = desk.info(Path(one.file))
    lost = esc(ctx.tr("tab_inference.lora_gone", file=one.file))
    gone = "" if info else f'<small class="bad">{lost}</small>'
    common = (f'min="{wanted.LEAST}" max="{wanted.MOST}" step="0.05" value="{one.weight:g}" '
              f'data-value="{one.weight:g}" data-weight="{number}" aria-label="{label}"')
    return (f'<li data-key="{esc(one.file)}"><span class="name" title="{esc(one.file)}">'
            f'<b>{esc(name)}</b> <small>{esc(_facts(info))}</small></span>'
            f'<input type="range" {common}><input type="number" {common}>'
            f'{button("×", "remove", str(number), hint=ctx.tr("tab_inference.remove", name=name))}'
            f'{gone}</li>')


def _facts(info: Info | None) -> str:
    """SD15 · rank 8 · 3.2 MB"""
    if info is None or info.format in NOT_LORA:
        return ""
    ranks = "-".join(str(one) for one in dict.fromkeys((*info.ranks[:1], *info.ranks[-1:])))
    return " · ".join(filter(None, (info.family.upper(), f"rank {ranks}" if ranks else "",
                                    f"{info.size / 1e6:.1f} MB")))


def _base(ctx: Context, snap: Snapshot, found: list[Choice]) -> str:
    now = wanted.base_of(snap, found)
    options = "".join(
        f'<option value="{esc(one)}"{" selected" if one == now else ""}>{esc(base_name(ctx, one))}'
        f'</option>' for one in wanted.bases(snap, found))
    return (f'<label>{esc(ctx.tr("base_model"))} <select data-pick="base" data-value="{esc(now)}">'
            f'{options}</select></label>')


def base_name(ctx: Context, base: str) -> str:
    demo = base in ("demo", str(paths.DEMO / "base"))
    return ctx.tr("tab_inference.demo") if demo else Path(base).name


def _words(ctx: Context, snap: Snapshot, loras: list[Added], found: list[Choice],
           desk: InferenceFiles
           ) -> str:
    words = wanted.triggers(snap, loras, found, desk)
    if not words:
        return ""
    chips = "".join(
        f'<button type="button" class="act" data-word="{esc(word)}" '
        f'title="{esc(ctx.tr("tab_inference.insert", word=word))}">+ {esc(word)}</button>'
        for word in words)
    return (f'<p class="words"><span class="small">{esc(ctx.tr("tab_inference.triggers"))}</span>'
            f' {chips}</p>')


def _add(ctx: Context, loras: list[Added], found: list[Choice]) -> str:
    tr = ctx.tr
    taken = {one.file for one in loras}
    groups: dict[str, list[str]] = {}
    for choice in (one for one in found if one.file not in taken):
        group = (f"{choice.run.name} · {clock(choice.run.created)}" if choice.run
                 else tr("tab_inference.files"))
        groups.setdefault(group, []).append(
            f'<option value="{esc(choice.file)}">{esc(called(ctx, choice))}</option>')
    options = "".join(f'<optgroup label="{esc(group)}">{"".join(made)}</optgroup>'
                      for group, made in groups.items())
    add, path = esc(tr("tab_inference.add")), esc(tr("tab_inference.path"))
    return (f'<div class="add"><select data-pick="add" aria-label="{add}">'
            f'<option value="">{add}</option>{options}</select>'
            f'<form data-act="add"><input type="text" placeholder="{path}" aria-label="{path}" '
            f'autocomplete="off" spellcheck="false"><button class="act">'
            f'{esc(tr("tab_inference.add_path"))}</button></form></div>')


def _dropped(ctx: Context, desk: InferenceFiles) -> str:
    """What the LoRA that was dropped last tells of itself."""
    info = desk.dropped
    if info is None:
        return ""
    tr, facts = ctx.tr, info.facts
    lines = [(tr("tab_inference.trigger"), ", ".join(facts.trigger_words)),
             (tr("tab_inference.best_base"), " · ".join(filter(None, (
                 facts.base_model, info.family.upper() if info.family != "unknown" else "")))),
             (tr("tab_inference.trained"), _training(ctx, info)),
             (tr("tab_inference.common_tags"), ", ".join(tag for tag, _ in facts.tags[:8]))]
    rows = "".join(f"<tr><th>{esc(label)}</th><td>{esc(text)}</td></tr>"
                   for label, text in lines if text)
    take = button(tr("tab_inference.use_training"), "take_config", kind="") \
        if facts.has_config else ""
    close = button(tr("tab_dataset.close"), "close_dropped", kind="")
    title = esc(facts.title or info.path.stem)
    return (f'<section class="card info" data-key="dropped"><h3>{title}</h3>'
            f'<table class="facts">{rows}</table><p class="acts">{take}{close}</p></section>')


def _training(ctx: Context, info: Info) -> str:
    facts = info.facts
    rate = f"LR {facts.learning_rate:g}" if facts.learning_rate else ""
    return " · ".join(filter(None, (
        ctx.tr("tab_inference.steps_n", count=facts.steps) if facts.steps else "",
        ctx.tr("pictures_n", count=facts.pictures) if facts.pictures else "",
        facts.resolution.replace("x", " × ") + " px" if facts.resolution else "", rate,
        facts.made_by)))
