"""`darkroom lora convert | merge | resize | extract`: LoRA files made from other files.

A file that is there is never replaced: the new one gets the next free name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import i18n
from core.cli.console import FINE, add_command, print_json
from core.errors import UserError
from core.safetensors_header import PICKLES

if TYPE_CHECKING:
    import torch

    from core.lora_files.layers import Lora

FORMATS = ("kohya", "peft", "diffusers", "comfyui")
PRECISIONS = ("fp32", "fp16", "bf16")


def add_to(inner: Any) -> None:
    """The actions that `darkroom lora` has besides info and verify."""
    convert = _action(inner, "convert", _convert, "convert style.safetensors --to comfyui")
    convert.add_argument("file", type=Path, metavar="IN", help=_tr("arg_in"))
    convert.add_argument("--to", choices=FORMATS, help=_tr("arg_to"))
    convert.add_argument("--family", default="", metavar="NAME", help=_tr("arg_family"))
    merge = _action(inner, "merge", _merge, "merge a.safetensors:0.8 b.safetensors:0.5 --out ab")
    merge.add_argument("files", nargs="+", metavar="FILE[:WEIGHT]", help=_tr("arg_files"))
    merge.add_argument("--rank", type=_count, default=0, metavar="N", help=_tr("arg_merge_rank"))
    resize = _action(inner, "resize", _resize, "resize style.safetensors --rank 8")
    resize.add_argument("file", type=Path, metavar="IN", help=_tr("arg_in"))
    resize.add_argument("--rank", type=_count, default=0, metavar="N", help=_tr("arg_rank"))
    resize.add_argument("--energy", type=_share, default=1.0, metavar="SHARE",
                        help=_tr("arg_energy"))
    extract = _action(inner, "extract", _extract,
                      "extract tuned.safetensors base.safetensors --rank 32 --out style")
    extract.add_argument("tuned", type=Path, metavar="TUNED", help=_tr("arg_tuned"))
    extract.add_argument("base", type=Path, metavar="BASE", help=_tr("arg_base"))
    extract.add_argument("--rank", type=_count, required=True, metavar="N", help=_tr("arg_rank"))
    extract.add_argument("--conv-rank", type=int, default=None, metavar="N",
                         help=_tr("arg_conv_rank"))


def _action(inner: Any, name: str, run: Any, line: str) -> argparse.ArgumentParser:
    parser = add_command(inner, name, run, key=f"lora_{name}", answers=True, line=f"lora {line}")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help=_tr("arg_out"))
    parser.add_argument("--precision", choices=PRECISIONS, default=None,
                        help=_tr("arg_precision"))
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _share(text: str) -> float:
    if not 0 < (share := float(text)) <= 1:
        raise ValueError
    return share


# --- actions ---

def _convert(options: argparse.Namespace) -> int:
    from core.lora_files import formats, pickles
    source = options.file
    if source.suffix.lower() in PICKLES:
        written = pickles.convert(source, options.out or source.with_suffix(".safetensors"))
        if not options.to:
            return _told(options, "unpickled", written)
        source = written
    if not options.to:
        raise UserError("lora_convert.no_target", formats=", ".join(FORMATS))
    lora = formats.read(source, options.family)
    path = _save(lora, options, options.to, source, options.to)
    return _told(options, "converted", path, to=options.to, layers=len(lora.layers),
                 left_out=lora.unknown)


def _merge(options: argparse.Namespace) -> int:
    from core.lora_files import formats
    from core.lora_files import merge as lora_algebra
    from core.lora_files.library import parse_lora
    given = [_weighed(text, parse_lora(text)) for text in options.files]
    loras = [formats.read(path) for path, _ in given]
    _same_family([path for path, _ in given], loras)
    merged = lora_algebra.merge([(lora, weight) for lora, (_, weight)
                                 in zip(loras, given, strict=True)])
    kept = 1.0
    if options.rank:
        resized = lora_algebra.resize(merged, lora_algebra.Cut(options.rank))
        merged, kept = resized.lora, resized.kept
    options.precision = options.precision or "fp32"
    merged.metadata = _merged_metadata([lora.metadata for lora in loras],
                                       [path for path, _ in given], merged)
    path = _save(merged, options, "kohya", given[0][0], "merged")
    return _told(options, "merged", path, layers=len(merged.layers), kept=kept,
                 left_out=merged.unknown)


def _resize(options: argparse.Namespace) -> int:
    from core.lora_files import files as lora_file
    from core.lora_files import formats
    from core.lora_files import merge as lora_algebra
    if not options.rank and options.energy == 1:
        raise UserError("lora_convert.no_size")
    lora = formats.read(options.file)
    resized = lora_algebra.resize(lora, lora_algebra.Cut(options.rank, options.energy))
    low, high = resized.ranks
    resized.lora.metadata = lora.metadata | _network(resized.lora)
    to = "peft" if options.file.is_dir() else lora_file.describe(options.file).format
    path = _save(resized.lora, options, to if to in FORMATS else "kohya", options.file, f"r{high}")
    return _told(options, "resized", path, low=low, high=high, kept=resized.kept,
                 left_out=lora.unknown)


def _extract(options: argparse.Namespace) -> int:
    from core.cli.progress import Terminal
    from core.lora_files.extract import extract
    with Terminal() as terminal:
        found = extract(options.tuned, options.base, options.rank, options.conv_rank, terminal)
    options.precision = options.precision or "fp16"
    found.lora.metadata = _network(found.lora) | {"ss_output_name": options.tuned.stem}
    path = _save(found.lora, options, "kohya", options.tuned, "lora")
    return _told(options, "extracted", path, layers=len(found.lora.layers), kept=found.kept,
                 compared=found.compared, rest=found.rest)


# --- what they share ---

def _save(lora: Lora, options: argparse.Namespace, to: str, source: Path, mark: str) -> Path:
    from core.lora_files import formats
    out = options.out or source.with_name(f"{source.stem}-{mark}.safetensors")
    out = out.expanduser()
    suffix = out.suffix.lower() == ".safetensors"
    if to == "peft":
        out = out.with_suffix("") if suffix else out
    elif not suffix:
        out = out.with_name(f"{out.name}.safetensors")
    return formats.save(lora, to, out, _dtype(options.precision))


def _dtype(name: str | None) -> torch.dtype | None:
    import torch
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: None}[name]


def _weighed(text: str, parsed: tuple[str, float]) -> tuple[Path, float]:
    """`a.safetensors:0.5`; without a weight 1, as a sum is meant."""
    name, weight = parsed
    return Path(name).expanduser(), 1.0 if name == text else weight


def _same_family(files: list[Path], loras: list[Lora]) -> None:
    from core.lora_files.files import describe
    families = {describe(path).family for path in files if path.is_file()} - {"unknown"}
    if len(families) > 1 or len({lora.naming for lora in loras}) > 1:
        raise UserError("lora_convert.other_families", families=", ".join(sorted(families)))


def _network(lora: Lora) -> dict[str, str]:
    """kohya's own words for the size; one number only where there is one."""
    from core.lora_files.layers import alpha_of, rank_of
    ranks = {rank_of(layer) for layer in lora.layers.values()} - {0}
    alphas = {alpha_of(layer) for layer in lora.layers.values()} - {0.0}
    return {"ss_network_module": "networks.lora",
            "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic"}


def _merged_metadata(all_: list[dict[str, str]], files: list[Path], lora: Lora
                     ) -> dict[str, str]:
    """What is true of the sum: what all of them say alike, what it was made from, and the LoRAs
    that any of them was trained upon."""
    from core.adapters import base_loras
    from core.lora_files.metadata import facts_of
    shared = {key: value for key, value in all_[0].items()
              if key.startswith(("ss_", "modelspec.")) and all(one.get(key) == value
                                                               for one in all_)}
    words_ = [one["modelspec.trigger_phrase"] for one in all_ if "modelspec.trigger_phrase" in one]
    phrase = {"modelspec.trigger_phrase": ", ".join(dict.fromkeys(words_))} if words_ else {}
    upon = dict.fromkeys(one for told in all_ for one in facts_of(told).base_loras)
    return shared | phrase | base_loras.metadata(list(upon)) | _network(lora) | {
        "modelspec.merged_from": ", ".join(path.name for path in files)}


def _told(options: argparse.Namespace, what: str, path: Path, **facts: Any) -> int:
    left_out = facts.pop("left_out", ())
    if left_out:
        print(_tr("left_out", count=len(left_out), keys=", ".join(left_out[:3])),
              file=sys.stderr)
    if options.json:
        print_json({"ok": True, "file": path, **facts, "left_out": left_out})
    else:
        said = {**facts, "kept": f"{100 * facts['kept']:.4g}"} if "kept" in facts else facts
        print(_tr(what, file=path, **said))
    return FINE


def _tr(key: str, **params: Any) -> str:
    return i18n.tr(f"lora_convert.{key}", params)
