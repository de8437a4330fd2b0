"""`darkroom suggest`, `darkroom plan`, `darkroom presets`: what fits this machine, before a run."""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import i18n
from core.cli.console import FAILED, FINE, add_command, print_json
from core.errors import UserError
from core.families.registry import STANDARD

if TYPE_CHECKING:
    from core.config import TrainConfig
    from core.memory.advisor import Reason, Suggestion
    from core.memory.plan import Machine, Plan

PATIENCE_S = 2.0                # until it is told that planning takes a while


def add_commands(commands: Any) -> None:
    suggest = add_command(commands, "suggest", _suggest, answers=True,
                          line="suggest --vram-gb 8 --purpose character")
    suggest.add_argument("--base", default=STANDARD.id, metavar="MODEL", help=tr("arg_base"))
    suggest.add_argument("--data", type=Path, default=None, metavar="DIR", help=tr("arg_data"))
    suggest.add_argument("--purpose", default="style", help=tr("arg_purpose"),
                         metavar="style|character|object|concept")
    suggest.add_argument("--yaml", action="store_true", help=tr("arg_yaml"))
    plan = add_command(commands, "plan", _plan, answers=True,
                       line="plan --config my_style.yaml --vram-gb 8")
    plan.add_argument("--config", type=Path, required=True, metavar="FILE",
                      help=tr("arg_config"))
    plan.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                      help=tr("arg_set"))
    for parser in (suggest, plan):
        parser.add_argument("--vram-gb", type=float, default=None, metavar="GB",
                            help=tr("arg_vram_gb"))
    presets = add_command(commands, "presets", _presets, answers=True,
                          line="presets --family sd15")
    presets.add_argument("--family", default=None, help=tr("arg_family"))


def tr(key: str, **params: Any) -> str:
    return i18n.tr(f"plan.{key}", params)


# --- suggest ---

def _suggest(options: argparse.Namespace) -> int:
    from core.config import TrainConfig
    from core.memory import advisor, plan_inputs
    base, machine = plan_inputs.base_of(options.base), _machine(options.vram_gb)
    pictures = plan_inputs.pictures_in(options.data) if options.data else None
    with _patience():
        planner = plan_inputs.BatchPlanner(base, machine, pictures)
        found = advisor.suggest(machine, base, planner.data(TrainConfig()), options.purpose,
                                planner)
    if options.json:
        print_json({"ok": found.fits, "base": options.base, **advisor.as_dict(found)})
    elif options.yaml:
        print("\n".join(_yaml(found, options)))
    else:
        print("\n".join([_headline(found.plan), *_notes(found.notes), "", *_values(found)]))
    return FINE if found.fits else FAILED


def _values(found: Suggestion) -> list[str]:
    from core.cli.progress import table
    return table([(f"{key}: {_value(value)}", found.reasons[key].text())
                  for key, value in found.values.items()])


def _value(value: Any) -> str:
    import yaml
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _yaml(found: Suggestion, options: argparse.Namespace) -> list[str]:
    """A config for `train --config`; each reason is a comment above its line."""
    from core import families
    ours = options.base if options.base not in families.SPECS else ""
    folder = str(options.data.expanduser().absolute()) if options.data else ""
    base = ours if ours in ("", "demo") else str(Path(ours).expanduser().absolute())
    lines = [f"# {line}" for line in (_headline(found.plan), *_notes(found.notes))]
    for key, value, hint in (("base_model", base, "yaml_base"),
                             ("train_data_dir", folder, "yaml_data"),
                             ("output_dir", f"./output/my_{options.purpose}", "")):
        lines += [f"# {tr(hint)}"] if hint and not value else []
        lines.append(f"{key}: {_value(value)}")
    for key, value in found.values.items():
        lines += ["", f"# {found.reasons[key].text()}", f"{key}: {_value(value)}"]
    return lines


def _notes(notes: Sequence[Reason]) -> list[str]:
    return [note.text() for note in notes]


# --- plan ---

def _plan(options: argparse.Namespace) -> int:
    from core.memory import advisor, plan, plan_inputs, relief
    config = _config(options)
    base = plan_inputs.base_of(config.base_model, config.family)
    machine = _machine(options.vram_gb, config.device)
    with _patience():
        pictures = _pictures(config)
        planner = plan_inputs.BatchPlanner(base, machine, pictures)
        found = planner(config)
        verdict = relief.verdict(found)
        nearest = None if verdict == "fits" else advisor.nearest_fit(
            config, base, machine, planner.data(config), planner)
    length = advisor.length(config, pictures.repeats) if pictures else None
    if options.json:
        print_json({"ok": verdict != "too_big", **plan.as_dict(found), "verdict": verdict,
                    "length": length and length.text(),
                    "lacking": advisor.lacking(found), "nearest": nearest and {
                        "changes": nearest[0], "needs_mb": round(nearest[1].needs_mb, 1)}})
    else:
        print("\n".join([*_report(found, verdict, nearest),
                         *([length.text()] if length else [])]))
    return FAILED if verdict == "too_big" else FINE


def _config(options: argparse.Namespace) -> TrainConfig:
    from core.cli.commands import found_beside, overrides
    from core.importers import load_train_config
    config = found_beside(load_train_config(options.config, overrides(options.set)),
                          options.config.parent)
    if not config.base_model:
        raise UserError("engine.key_missing", key="base_model")
    return config


def _pictures(config: TrainConfig) -> Any:
    """None where the config names no folder yet."""
    from core.memory import plan_inputs
    if not config.train_data_dir:
        return None
    return plan_inputs.pictures_of(config)


def _report(found: Plan, verdict: str, nearest: tuple[dict[str, Any], Plan] | None) -> list[str]:
    from core.memory.advisor import gigabytes, lacking
    lines = [_headline(found), "", *_grid(found), ""]
    lines += [tr("outside", part=_label("part", name), mb=round(mb))
              for name, mb in found.outside.items()]
    lines += ["", tr(verdict, needs=gigabytes(found.needs_mb),
                     free=gigabytes(found.machine.free_mb),
                     phase=_label("phase", found.peak.name))]
    short = lacking(found)
    for name, parts, free in (("ram", found.ram, found.machine.ram_mb),
                              ("disk", found.disk, found.machine.disk_mb)):
        lines.append(tr(f"{name}_needs", needs=gigabytes(sum(parts.values())),
                        free=gigabytes(free) if free else tr("unknown")))
        lines += [i18n.tr(f"advisor.{name}_short", short[name])] if name in short else []
    if nearest:
        lines.append(tr("nearest", needs=gigabytes(nearest[1].needs_mb), changes="  ".join(
            f"--set {key}={_set(value)}" for key, value in nearest[0].items())))
    elif verdict != "fits":
        lines.append(tr("nothing_fits"))
    return lines


def _set(value: Any) -> str:
    text = _value(value)
    return f'"{text}"' if " " in text or text[:1] in "['" else text


def _grid(found: Plan) -> list[str]:
    """Parts down, phases across, in MiB."""
    parts = list(dict.fromkeys(part for phase in found.phases for part in phase.parts))
    rows = [["", *(_label("phase", phase.name) for phase in found.phases)]]
    rows += [[_label("part", part), *(_mb(phase.parts.get(part)) for phase in found.phases)]
             for part in parts]
    rows.append([tr("sum"), *(_mb(phase.mb) for phase in found.phases)])
    return aligned(rows)


def _mb(mb: float | None) -> str:
    return "" if mb is None else f"{mb:.0f} MB" if mb >= 10 else f"{mb:.1f} MB"


def _label(kind: str, name: str) -> str:
    text = tr(f"{kind}_{name}")
    return name if text == f"plan.{kind}_{name}" else text


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right; by width on screen."""
    from rich.text import Text
    widths = [max(Text(row[i]).cell_len for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        spaces = [" " * (width - Text(cell).cell_len)
                  for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + spaces[0], *(s + cell for s, cell in zip(spaces[1:], row[1:],
                                                                   strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


# --- presets ---

def _presets(options: argparse.Namespace) -> int:
    from core.memory import plan_inputs
    from core.workspace import presets
    machine = plan_inputs.machine_here()
    found = presets.list_presets(family=options.family)
    if not found:
        raise UserError("presets.no_family", family=options.family,
                        known=", ".join(sorted({one.family for one in presets.list_presets()})))
    badges = {one.path: presets.badge(one, machine) for one in found}
    if options.json:
        print_json({"ok": True, "machine": machine.name, "presets": [
            {**one.model_dump(mode="json"), "slug": one.slug, "badge": badges[one.path]}
            for one in found]})
        return FINE
    print(tr("presets_for", name=machine.name, total=_gb(machine.total_mb)))
    rows = [(f"{one.family}  {one.said('title')}  {i18n.tr(f'presets.purpose_{one.purpose}')}",
             f"{tr(f'badge_{badges[one.path]}')}  {one.said('about')}") for one in found]
    from core.cli.progress import table
    print("\n".join(table(rows)))
    return FINE


# --- shared ---

def _machine(vram_gb: float | None, device: str = "auto") -> Machine:
    from core.memory import advisor, plan_inputs
    if vram_gb is None:
        return plan_inputs.machine_here(device)
    if not 0.5 <= vram_gb <= 2048:
        raise UserError("plan.bad_vram", given=f"{vram_gb:g}")
    return advisor.card_of(vram_gb)


def _headline(found: Plan) -> str:
    machine = found.machine
    return tr(f"machine_{machine.kind}", name=machine.name, total=_gb(machine.total_mb),
              free=_gb(machine.free_mb), width=found.bucket[0], height=found.bucket[1],
              needs=_gb(found.needs_mb))


def _gb(mb: float) -> str:
    from core.memory.advisor import gigabytes
    return gigabytes(mb)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """The first plan of a base takes seconds: after two of them, that is said."""
    timer = threading.Timer(PATIENCE_S, lambda: print(tr("patience"), file=sys.stderr))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
