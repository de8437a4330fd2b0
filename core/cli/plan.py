"""`darkroom suggest`, `darkroom plan`, `darkroom presets`: what fits this machine, before a run."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import i18n, paths, plugins
from core.cli.console import FAILED, FINE, add_command, answer, argument_adder
from core.errors import UserError
from core.families.registry import STANDARD
from core.units import gigabytes

if TYPE_CHECKING:
    from core.memory.advisor import Suggestion
    from core.memory.plan import Machine, Plan

PATIENCE_S = 2.0                # until it is said that planning takes a while

tr = i18n.translator("plan")
add_argument = argument_adder(tr)


def add_commands(commands: Any) -> None:
    suggest = add_command(commands, "suggest", suggest_command, answers=True,
                          line="suggest --vram-gb 8 --purpose character")
    add_argument(suggest, "--base", default=STANDARD.id, metavar="MODEL")
    add_argument(suggest, "--data", type=Path, metavar="DIR")
    add_argument(suggest, "--purpose", default="style", metavar="style|character|object|concept")
    add_argument(suggest, "--yaml", action="store_true")
    plan = add_command(commands, "plan", plan_command, answers=True,
                       line="plan --config my_style.yaml --vram-gb 8")
    add_argument(plan, "--config", type=Path, required=True, metavar="FILE")
    add_argument(plan, "--set", action="append", default=[], metavar="KEY=VALUE")
    for parser in (suggest, plan):
        add_argument(parser, "--vram-gb", type=float, metavar="GB")
    presets = add_command(commands, "presets", presets_command, answers=True,
                          line="presets --family sd15")
    add_argument(presets, "--family")


# --- suggest ---

def suggest_command(options: argparse.Namespace) -> int:
    from core.cli.progress import table
    from core.config import TrainConfig
    from core.memory import advisor, plan_inputs
    base, machine = plan_inputs.base_of(options.base), _machine(options.vram_gb)
    pictures = plan_inputs.pictures_in(options.data) if options.data else None
    with _patience():
        planner = plan_inputs.BatchPlanner(base, machine, pictures)
        suggestion = advisor.suggest(machine, base, planner.data(TrainConfig()), options.purpose,
                                     planner)
    head = [_headline(suggestion.plan), *(note.text() for note in suggestion.notes)]
    if options.yaml and not options.json:
        lines = [*(f"# {line}" for line in head), *_yaml_lines(suggestion, options)]
    else:
        lines = [*head, "", *table([(f"{key}: {_yaml_value(value)}", suggestion.reasons[key].text())
                                    for key, value in suggestion.values.items()])]
    answer(options, {"ok": suggestion.fits, "base": options.base, **advisor.as_dict(suggestion)},
           lines)
    return FINE if suggestion.fits else FAILED


def _yaml_lines(suggestion: Suggestion, options: argparse.Namespace) -> list[str]:
    """A config for `train --config`; each reason is a comment above its line."""
    from core import families
    # `--base sdxl` names a family, no file: the user fills in a base of it
    base = "" if options.base in families.SPECS else options.base
    if base not in ("", "demo"):
        base = str(paths.expanded(base).absolute())
    folder = str(paths.expanded(options.data).absolute()) if options.data else ""
    lines = []
    for key, value, hint in (("base_model", base, "yaml_base"),
                             ("train_data_dir", folder, "yaml_data"),
                             ("output_dir", f"./output/my_{options.purpose}", "")):
        lines += [f"# {tr(hint)}"] if hint and not value else []
        lines.append(f"{key}: {_yaml_value(value)}")
    for key, value in suggestion.values.items():
        lines += ["", f"# {suggestion.reasons[key].text()}", f"{key}: {_yaml_value(value)}"]
    return lines


def _yaml_value(value: Any) -> str:
    import yaml
    # PyYAML ends a bare scalar with a document end mark
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


# --- plan ---

def plan_command(options: argparse.Namespace) -> int:
    from core.cli.commands import overrides
    from core.importers import load_train_config, located
    from core.memory import advisor, course, plan, plan_inputs
    config = located(load_train_config(options.config, overrides(options.set)),
                     options.config.parent)
    if not config.base_model:
        raise UserError("engine.key_missing", key="base_model")
    config, code = plan_inputs.without_code(config)
    with _patience(), plugins.asleep():
        base = plan_inputs.base_of(config.base_model, config.family)
        machine = _machine(options.vram_gb, config.device)
        pictures = plan_inputs.pictures_of(config) if config.train_data_dir else None
        planner = plan_inputs.BatchPlanner(base, machine, pictures)
        planned = planner(config)
        verdict = planned.verdict()
        nearest = None if verdict == "fits" else advisor.nearest_fit(
            config, base, machine, planner)
    remarks = [reason.text() for reason in course.remarks(
        config, pictures.repeats, pictures.captions)] if pictures else []
    answer(options, {"ok": verdict != "too_big", **plan.as_dict(planned), "verdict": verdict,
                     "remarks": remarks, "not_counted": code, "lacking": advisor.lacking(planned),
                     "nearest": nearest and {"changes": nearest[0],
                                             "needs_mb": round(nearest[1].needs_mb, 1)}},
           [*_report(planned, verdict, nearest), *remarks,
            *(i18n.tr("plan.not_counted", {"key": key, "name": name})
              for key, name in code.items())])
    return FAILED if verdict == "too_big" else FINE


def _report(planned: Plan, verdict: str, nearest: tuple[dict[str, Any], Plan] | None) -> list[str]:
    """The plan as text: a table of parts down and phases across, RAM, disk, and what would fit."""
    from core.cli.progress import label
    from core.memory.advisor import lacking
    phases = planned.phases
    rows = [["", *(label("plan.phase", phase.name) for phase in phases)]]
    rows += [[label("plan.part", part), *(_cell(phase.parts.get(part)) for phase in phases)]
             for part in dict.fromkeys(part for phase in phases for part in phase.parts)]
    rows.append([tr("sum"), *(_cell(phase.mb) for phase in phases)])
    lines = [_headline(planned), "", *aligned(rows), ""]
    lines += [tr("outside", part=label("plan.part", name), mb=round(mb))
              for name, mb in planned.outside.items()]
    lines += ["", tr(verdict, needs=gigabytes(planned.needs_mb), free=gigabytes(
        planned.machine.free_mb), phase=label("plan.phase", planned.peak.name))]
    short = lacking(planned)
    for name, parts, free in (("ram", planned.ram, planned.machine.ram_mb),
                              ("disk", planned.disk, planned.machine.disk_mb)):
        lines.append(tr(f"{name}_needs", needs=gigabytes(sum(parts.values())),
                        free=gigabytes(free) if free else tr("unknown")))
        lines += [i18n.tr(f"advisor.{name}_short", short[name])] if name in short else []
    if nearest:
        texts = {key: _yaml_value(value) for key, value in nearest[0].items()}
        # quoted where a shell would take a value apart
        changes = [f'--set {key}="{text}"' if " " in text or text[:1] in "['"
                   else f"--set {key}={text}" for key, text in texts.items()]
        lines.append(tr("nearest", needs=gigabytes(nearest[1].needs_mb),
                        changes="  ".join(changes)))
    elif verdict != "fits":
        lines.append(tr("nothing_fits"))
    return lines


def _cell(mb: float | None) -> str:
    return "" if mb is None else f"{mb:.0f} MB" if mb >= 10 else f"{mb:.1f} MB"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right; by width on screen."""
    from core.cli.progress import width
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]

    def padded(column: int, cell: str) -> str:
        pad = " " * (widths[column] - width(cell))
        return pad + cell if column else cell + pad
    return ["  ".join(padded(*item) for item in enumerate(row)).rstrip() for row in rows]


# --- presets ---

def presets_command(options: argparse.Namespace) -> int:
    from core.cli.progress import table
    from core.memory import plan_inputs
    from core.workspace import presets
    machine = plan_inputs.machine_here()
    listed = presets.list_presets(family=options.family)
    for fault in presets.unusable():
        print(fault, file=sys.stderr)
    if not listed:
        raise presets.no_family(options.family)
    facts, rows = [], []
    for preset in listed:
        badge = presets.badge(preset, machine)
        facts.append({**preset.model_dump(mode="json"), "slug": preset.slug, "badge": badge})
        purpose = i18n.tr(f"presets.purpose_{preset.purpose}")
        rows.append((f"{preset.family}  {preset.localized('title')}  {purpose}",
                     f"{tr(f'badge_{badge}')}  {preset.localized('about')}"))
    head = tr("presets_for", name=machine.name, total=gigabytes(machine.total_mb))
    return answer(options, {"ok": True, "machine": machine.name, "presets": facts},
                  [head, *table(rows)])


# --- shared ---

def _machine(vram_gb: float | None, device: str = "auto") -> Machine:
    """This machine, or an imagined one with such a card."""
    from core.memory import advisor, plan_inputs
    if vram_gb is None:
        return plan_inputs.machine_here(device)
    if not 0.5 <= vram_gb <= 2048:
        raise UserError("plan.bad_vram", given=f"{vram_gb:g}")
    return advisor.card_of(vram_gb)


def _headline(planned: Plan) -> str:
    machine = planned.machine
    return tr(f"machine_{machine.kind}", name=machine.name, total=gigabytes(machine.total_mb),
              free=gigabytes(machine.free_mb), width=planned.bucket[0], height=planned.bucket[1],
              needs=gigabytes(planned.needs_mb))


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """The first plan of a base takes seconds: after two of them, a line says so."""
    timer = threading.Timer(PATIENCE_S, lambda: print(tr("patience"), file=sys.stderr))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
