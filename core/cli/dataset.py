"""`darkroom dataset check` and `darkroom dataset prepare` for the launcher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import i18n
from core.cli import console
from core.cli.console import FAILED, FINE, INTERRUPTED, answer, job_terminal
from core.errors import UserError

if TYPE_CHECKING:
    from core.dataset.crops import BaseFacts

tr = i18n.translator("checks")
add_argument = console.argument_adder(tr)


def add_commands(commands: Any) -> None:
    add = console.add_group(commands, "dataset", "dataset check my-pictures")
    check = add("check", check_command, "dataset check my-pictures --trigger m1a")
    prepare = add("prepare", prepare_command, "dataset prepare my-pictures --out mended --dedupe")
    for parser in (check, prepare):
        add_argument(parser, "folder", type=Path, metavar="DIR")
        add_argument(parser, "--base", metavar="MODEL")
        add_argument(parser, "--resolution", default="", metavar="W,H")
        add_argument(parser, "--no-upscale", action="store_true")
        add_argument(parser, "--metadata", type=Path, metavar="FILE")
        add_argument(parser, "--crop-about", choices=("center", "subject"), default="center")
    add_argument(check, "--trigger", default="", metavar="WORD")
    add_argument(check, "--purpose", choices=("person", "object", "style"), default="")
    add_argument(check, "--most", type=int, default=5, metavar="N")
    add_argument(prepare, "--out", type=Path, required=True, metavar="DIR")
    add_argument(prepare, "--convert", choices=("png", "jpg", "webp", "keep"), default="keep")
    add_argument(prepare, "--resize", type=int, default=0, metavar="PX")
    for flag in ("--crop", "--dedupe", "--remove-borders"):
        add_argument(prepare, flag, action="store_true")
    add_argument(prepare, "--background", default="white", metavar="COLOUR")


def check_command(options: argparse.Namespace) -> int:
    from core.dataset.checks import report as dataset_report
    from core.dataset.checks.image_stats import Stopped
    facts = _base_facts(options)
    with job_terminal() as (terminal, control):
        try:
            report = dataset_report.check(
                options.folder, facts, metadata=options.metadata, trigger=options.trigger,
                purpose=options.purpose, crop_about=options.crop_about, emit=terminal,
                control=control)
        except Stopped:
            return _stopped(options, "stopped")
    return answer(options, {"ok": True, **report.as_dict()},
                  dataset_report.lines(report, max(options.most, 0)))


def prepare_command(options: argparse.Namespace) -> int:
    from core.dataset.checks.image_stats import Stopped
    from core.dataset.prepare import prepare
    from core.dataset.render_copy import SMALLEST, Options
    if options.resize and options.resize < SMALLEST:
        raise UserError("checks.bad_resize", given=options.resize, least=SMALLEST)
    changes = Options(options.convert, options.resize, options.crop, options.crop_about,
                      options.dedupe, options.remove_borders, options.background)
    facts = _base_facts(options) if options.crop else None
    with job_terminal() as (terminal, control):
        try:
            done = prepare(options.folder, options.out, changes, facts=facts,
                           metadata=options.metadata, emit=terminal, control=control)
        except Stopped:
            return _stopped(options, "prepare_stopped")
    if done.stopped:
        return _stopped(options, "prepare_stopped")
    lines = [tr("prepared", out=done.folder, written=done.written, dropped=done.dropped,
                failed=done.failed)]
    if done.before:
        lines.append(tr("already", count=done.before))
    answer(options, {"ok": not done.failed, "out": done.folder, "log": done.log,
                     "written": done.written, "dropped": done.dropped, "failed": done.failed,
                     "before": done.before}, [*lines, tr("log", path=done.log)])
    return FAILED if done.failed else FINE


def _stopped(options: argparse.Namespace, key: str) -> int:
    answer(options, {"ok": False, "stopped": True}, [tr(key)])
    return INTERRUPTED


def _base_facts(options: argparse.Namespace) -> BaseFacts:
    """What the base asks of pictures. Without --base: as Stable Diffusion 1.5, and the report
    says so."""
    from core.config import TrainConfig
    from core.dataset import crops
    from core.memory import plan
    try:
        config = TrainConfig(max_resolution=options.resolution,
                             bucket_no_upscale=options.no_upscale)
    except ValueError:
        raise UserError("checks.bad_resolution", given=options.resolution) from None
    if options.base is None:
        return crops.assumed_facts(config)
    return crops.base_facts(console.model_path(options.base), plan.sizes, config)
