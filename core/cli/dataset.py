"""`darkroom dataset check` and `darkroom dataset prepare` for the launcher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import i18n
from core.cli.console import FAILED, FINE, INTERRUPTED, add_command, print_json, stop_on_ctrl_c
from core.errors import UserError

if TYPE_CHECKING:
    from core.dataset.crops import BaseFacts


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "dataset", line="dataset check my-pictures")
    inner = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = add_command(inner, "check", _check, key="dataset_check", answers=True,
                        line="dataset check my-pictures --trigger m1a")
    _add_shared(check)
    check.add_argument("--trigger", default="", metavar="WORD", help=tr("arg_trigger"))
    check.add_argument("--purpose", choices=("person", "object", "style"), default="",
                       help=tr("arg_purpose"))
    check.add_argument("--most", type=int, default=5, metavar="N", help=tr("arg_most"))
    _add_prepare(inner)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help=tr("arg_folder"))
    parser.add_argument("--base", default=None, metavar="MODEL", help=tr("arg_base"))
    parser.add_argument("--resolution", default="", metavar="W,H", help=tr("arg_resolution"))
    parser.add_argument("--no-upscale", action="store_true", help=tr("arg_no_upscale"))
    parser.add_argument("--metadata", type=Path, default=None, metavar="FILE",
                        help=tr("arg_metadata"))
    parser.add_argument("--crop-about", choices=("center", "subject"), default="center",
                        help=tr("arg_crop_about"))


def _add_prepare(inner: Any) -> None:
    prepare = add_command(inner, "prepare", _prepare, key="dataset_prepare", answers=True,
                          line="dataset prepare my-pictures --out mended --dedupe")
    _add_shared(prepare)
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR", help=tr("arg_out"))
    prepare.add_argument("--convert", choices=("png", "jpg", "webp", "keep"), default="keep",
                         help=tr("arg_convert"))
    prepare.add_argument("--resize", type=int, default=0, metavar="PX", help=tr("arg_resize"))
    for flag in ("crop", "dedupe", "remove_borders"):
        prepare.add_argument(f"--{flag.replace('_', '-')}", action="store_true",
                             help=tr(f"arg_{flag}"))
    prepare.add_argument("--background", default="white", metavar="COLOUR",
                         help=tr("arg_background"))


def tr(key: str, **params: Any) -> str:
    return i18n.tr(f"checks.{key}", params)


def _check(options: argparse.Namespace) -> int:
    from core.cli.progress import Terminal
    from core.dataset.checks import report as dataset_report
    from core.dataset.checks.image_stats import Stopped
    from core.jobs.control import Control
    control, facts = Control(), _facts(options)
    with Terminal() as terminal, stop_on_ctrl_c(control, terminal.stopping):
        try:
            report = dataset_report.check(
                options.folder, facts, metadata=options.metadata, trigger=options.trigger,
                purpose=options.purpose, crop_about=options.crop_about, emit=terminal,
                control=control)
        except Stopped:
            return _stopped(options, "stopped")
    if options.json:
        print_json({"ok": True, **report.as_dict()})
    else:
        print("\n".join(dataset_report.lines(report, max(options.most, 0))))
    return FINE


def _prepare(options: argparse.Namespace) -> int:
    from core.cli.progress import Terminal
    from core.dataset.checks.image_stats import Stopped
    from core.dataset.prepare import prepare
    from core.dataset.render_copy import SMALLEST, Options
    from core.jobs.control import Control
    if options.resize and options.resize < SMALLEST:
        raise UserError("checks.bad_resize", given=options.resize, least=SMALLEST)
    wanted = Options(options.convert, options.resize, options.crop, options.crop_about,
                     options.dedupe, options.remove_borders, options.background)
    control, facts = Control(), _facts(options) if options.crop else None
    with Terminal() as terminal, stop_on_ctrl_c(control, terminal.stopping):
        try:
            done = prepare(options.folder, options.out, wanted, facts=facts,
                           metadata=options.metadata, emit=terminal, control=control)
        except Stopped:
            return _stopped(options, "prepare_stopped")
    if done.stopped:
        return _stopped(options, "prepare_stopped")
    if options.json:
        print_json({"ok": not done.failed, "out": done.folder, "log": done.log,
                    "written": done.written, "dropped": done.dropped, "failed": done.failed,
                    "before": done.before})
    else:
        print(tr("prepared", out=done.folder, written=done.written, dropped=done.dropped,
                 failed=done.failed))
        if done.before:
            print(tr("already", count=done.before))
        print(tr("log", path=done.log))
    return FAILED if done.failed else FINE


def _stopped(options: argparse.Namespace, key: str) -> int:
    if options.json:
        print_json({"ok": False, "stopped": True})
    else:
        print(tr(key))
    return INTERRUPTED


def _facts(options: argparse.Namespace) -> BaseFacts:
    """Without --base: those of Stable Diffusion 1.5, which the report says."""
    from core import paths
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
    source = (paths.DEMO / "base" if options.base == "demo"
              else Path(options.base).expanduser())
    return crops.base_facts(source, plan.sizes, config)
