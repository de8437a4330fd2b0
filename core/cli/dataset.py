"""`darkroom dataset check` and `darkroom dataset prepare` for the launcher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import i18n
from core.cli.console import (
    FAILED,
    FINE,
    INTERRUPTED,
    add_group,
    answer,
    job_terminal,
    model_path,
)
from core.errors import UserError

if TYPE_CHECKING:
    from core.dataset.crops import BaseFacts

tr = i18n.translator("checks")


def add_commands(commands: Any) -> None:
    add = add_group(commands, "dataset", "dataset check my-pictures")
    check = add("check", check_command, "dataset check my-pictures --trigger m1a")
    prepare = add("prepare", prepare_command,
                  "dataset prepare my-pictures --out mended --dedupe")
    for parser in (check, prepare):
        parser.add_argument("folder", type=Path, metavar="DIR", help=tr("arg_folder"))
        parser.add_argument("--base", default=None, metavar="MODEL", help=tr("arg_base"))
        parser.add_argument("--resolution", default="", metavar="W,H", help=tr("arg_resolution"))
        parser.add_argument("--no-upscale", action="store_true", help=tr("arg_no_upscale"))
        parser.add_argument("--metadata", type=Path, default=None, metavar="FILE",
                            help=tr("arg_metadata"))
        parser.add_argument("--crop-about", choices=("center", "subject"), default="center",
                            help=tr("arg_crop_about"))
    check.add_argument("--trigger", default="", metavar="WORD", help=tr("arg_trigger"))
    check.add_argument("--purpose", choices=("person", "object", "style"), default="",
                       help=tr("arg_purpose"))
    check.add_argument("--most", type=int, default=5, metavar="N", help=tr("arg_most"))
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR", help=tr("arg_out"))
    prepare.add_argument("--convert", choices=("png", "jpg", "webp", "keep"), default="keep",
                         help=tr("arg_convert"))
    prepare.add_argument("--resize", type=int, default=0, metavar="PX", help=tr("arg_resize"))
    for flag in ("crop", "dedupe", "remove_borders"):
        prepare.add_argument(f"--{flag.replace('_', '-')}", action="store_true",
                             help=tr(f"arg_{flag}"))
    prepare.add_argument("--background", default="white", metavar="COLOUR",
                         help=tr("arg_background"))


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
    answer(options, {"ok": True, **report.as_dict()},
           dataset_report.lines(report, max(options.most, 0)))
    return FINE


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
    return crops.base_facts(model_path(options.base), plan.sizes, config)
