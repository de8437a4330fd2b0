"""The LoRAs that are drawn with: weights, trigger words, what can be added, the base model."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from core import paths
from core.families.lora_signs import NOT_LORA
from gui.html import acts, button, clock, esc, fact_table, option, small
from gui.state import inference_request as request
from gui.state.app_state import Context, Snapshot
from gui.state.inference_files import InferenceFiles
from gui.state.inference_request import Added, Choice


def lora_list(ctx: Context, snap: Snapshot, files: InferenceFiles) -> str:
    """The whole box: base, added LoRAs with their weights, trigger words, what can be added."""
    tr, choices = ctx.tr, request.lora_choices(snap, files)
    loras, base = request.added(snap, choices), request.base_of(snap, choices)
    bases = "".join(option(path, base_name(ctx, path), path == base)
                    for path in request.bases(snap, choices))
    rows = "".join(_row(ctx, number, lora, choices, files) for number, lora in enumerate(loras))
    triggers = "".join(
        f'<button type="button" class="act" data-word="{esc(word)}" '
        f'title="{esc(tr("tab_inference.insert", word=word))}">+ {esc(word)}</button>'
        for word in request.triggers(loras, choices, files))
    if triggers:
        triggers = (f'<p class="words"><span class="small">{esc(tr("tab_inference.triggers"))}'
                    f'</span> {triggers}</p>')
    return (f'<section class="box loras"><div class="tools"><h3>LoRA</h3>'
            f'<span class="spring"></span><label>{esc(tr("base_model"))} '
            f'<select data-pick="base" data-value="{esc(base)}">{bases}</select></label></div>'
            f'<ul class="added">{rows}</ul>{"" if loras else small(tr("no_lora_yet"))}{triggers}'
            f'{_adder(ctx, loras, choices)}{_dropped(ctx, files)}</section>')


def lora_names(snap: Snapshot, files: InferenceFiles) -> str:
    """For completion in the prompt: what the names mean is decided by the same list."""
    names = list(request.names(request.lora_choices(snap, files)))
    return f'<span hidden data-names="{esc(json.dumps(names, ensure_ascii=False))}"></span>'


def title_of(ctx: Context, choice: Choice) -> str:
    """mia-v1 · step 1500 · best"""
    if choice.run is None:
        return choice.name
    kind = f" · {ctx.tr(choice.kind)}" if choice.kind else ""
    return f'{choice.run.name} · {ctx.tr("step_n", step=choice.step)}{kind}'


def _row(ctx: Context, number: int, lora: Added, choices: list[Choice], files: InferenceFiles
         ) -> str:
    choice = next((choice for choice in choices if choice.file == lora.file), None)
    name = title_of(ctx, choice) if choice else lora.name
    info, facts, gone = files.info(Path(lora.file)), "", ""
    if info is None:
        text = ctx.tr("tab_inference.lora_gone", file=lora.file)
        gone = f'<small class="bad">{esc(text)}</small>'
    elif info.format not in NOT_LORA:
        # The smallest and the largest rank, once where they are the same.
        ranks = "-".join(map(str, dict.fromkeys((*info.ranks[:1], *info.ranks[-1:]))))
        facts = " · ".join(filter(None, (info.family.upper(), f"rank {ranks}" if ranks else "",
                                         f"{info.size / 1e6:.1f} MB")))
    # The slider and the box beside it hold one weight: lora_list.js keeps them equal.
    common = (f'min="{request.LEAST}" max="{request.MOST}" step="0.05" '
              f'value="{lora.weight:g}" data-value="{lora.weight:g}" data-weight="{number}" '
              f'aria-label="{esc(ctx.tr("tab_inference.weight_of", name=name))}"')
    return (f'<li data-key="{esc(lora.file)}"><span class="name" title="{esc(lora.file)}">'
            f'<b>{esc(name)}</b> <small>{esc(facts)}</small></span>'
            f'<input type="range" {common}><input type="number" {common}>'
            f'{button("×", "remove", str(number), hint=ctx.tr("tab_inference.remove", name=name))}'
            f'{gone}</li>')


def base_name(ctx: Context, base: str) -> str:
    demo = base in ("demo", str(paths.DEMO / "base"))
    return ctx.tr("tab_inference.demo") if demo else Path(base).name


def _adder(ctx: Context, loras: list[Added], choices: list[Choice]) -> str:
    """A list of the LoRAs that can be added, by run, and a box for a path."""
    tr = ctx.tr
    added, groups = {lora.file for lora in loras}, defaultdict[str, str](str)
    for choice in choices:
        if choice.file not in added:
            group = (f"{choice.run.name} · {clock(choice.run.created)}" if choice.run
                     else tr("tab_inference.files"))
            groups[group] += option(choice.file, title_of(ctx, choice))
    options = "".join(f'<optgroup label="{esc(group)}">{entries}</optgroup>'
                      for group, entries in groups.items())
    add, path = tr("tab_inference.add"), esc(tr("tab_inference.path"))
    return (f'<div class="add"><select data-pick="add" aria-label="{esc(add)}">{option("", add)}'
            f'{options}</select><form data-act="add"><input type="text" placeholder="{path}" '
            f'aria-label="{path}" autocomplete="off" spellcheck="false"><button class="act">'
            f'{esc(tr("tab_inference.add_path"))}</button></form></div>')


def _dropped(ctx: Context, files: InferenceFiles) -> str:
    """What the LoRA that was dropped last tells of itself."""
    info = files.dropped
    if info is None:
        return ""
    tr, facts = ctx.tr, info.facts
    family = info.family.upper() if info.family != "unknown" else ""
    # 1500 steps · 24 pictures · 512 × 512 px · LR 0.0001 · kohya
    training = " · ".join(filter(None, (
        tr("tab_inference.steps_n", count=facts.steps) if facts.steps else "",
        tr("pictures_n", count=facts.pictures) if facts.pictures else "",
        facts.resolution.replace("x", " × ") + " px" if facts.resolution else "",
        f"LR {facts.learning_rate:g}" if facts.learning_rate else "", facts.made_by)))
    lines = {"trigger": ", ".join(facts.trigger_words),
             "best_base": " · ".join(filter(None, (facts.base_model, family))),
             "trained": training, "common_tags": ", ".join(tag for tag, _ in facts.tags[:8])}
    table = fact_table((tr(f"tab_inference.{key}"), text) for key, text in lines.items() if text)
    take = button(tr("tab_inference.use_training"), "take_config") if facts.has_config else ""
    return (f'<section class="card info" data-key="dropped"><h3>'
            f'{esc(facts.title or info.path.stem)}</h3>{table}'
            f'{acts(take, button(tr("tab_dataset.close"), "close_dropped"))}</section>')
