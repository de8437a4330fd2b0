"""`darkroom lora convert | merge | resize | extract`: LoRA files made from other files.

A file that is there is never replaced: the new one gets the next free name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import i18n, paths
from core.cli.console import Run, answer, argument_adder, model_path
from core.errors import UserError
from core.safetensors_header import PICKLES, read_header

if TYPE_CHECKING:
    from core.lora_files.layers import Lora

FORMATS = ("kohya", "peft", "diffusers", "comfyui")
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}     # names in torch

tr = i18n.translator("lora_convert")
add_argument = argument_adder(tr)


def add_actions(add: Callable[[str, Run, str], argparse.ArgumentParser]) -> None:
    """The actions that `darkroom lora` has besides info and verify."""
    convert = add("convert", convert_command, "lora convert style.safetensors --to comfyui")
    add_argument(convert, "file", "in", type=Path, metavar="IN")
    add_argument(convert, "--to", choices=FORMATS)
    add_argument(convert, "--family", default="", metavar="NAME")
    merge = add("merge", merge_command, "lora merge a.safetensors:0.8 b.safetensors:0.5 --out ab")
    add_argument(merge, "files", nargs="+", metavar="FILE[:WEIGHT]")
    add_argument(merge, "--rank", "merge_rank", type=rank, default=0, metavar="N")
    resize = add("resize", resize_command, "lora resize style.safetensors --rank 8")
    add_argument(resize, "file", "in", type=Path, metavar="IN")
    add_argument(resize, "--rank", type=rank, default=0, metavar="N")
    add_argument(resize, "--energy", type=share, default=1.0, metavar="SHARE")
    extract = add("extract", extract_command,
                  "lora extract tuned.safetensors base.safetensors --rank 32 --out style")
    add_argument(extract, "tuned", type=model_path, metavar="TUNED")
    add_argument(extract, "base", type=model_path, metavar="BASE")
    add_argument(extract, "--rank", type=rank, required=True, metavar="N")
    add_argument(extract, "--conv-rank", type=int, metavar="N")
    for parser in (convert, merge, resize, extract):
        add_argument(parser, "--out", type=Path, metavar="FILE")
        add_argument(parser, "--precision", choices=tuple(PRECISIONS))
        add_argument(parser, "--metadata", choices=("public", "full"), default="public")


# argparse makes its sentence of a ValueError: "invalid rank value: '0'" names the function.
def rank(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def share(text: str) -> float:
    if not 0 < (number := float(text)) <= 1:
        raise ValueError
    return number


# --- actions ---

def convert_command(options: argparse.Namespace) -> int:
    from core.lora_files import formats, pickles
    source = options.file
    if source.suffix.lower() in PICKLES:
        written = pickles.convert(source, options.out or source.with_suffix(".safetensors"))
        if not options.to:
            return _report(options, "unpickled", written)
        source = written
    if not options.to:
        raise UserError("lora_convert.no_target", formats=", ".join(FORMATS))
    lora = formats.read(source, options.family)
    path = _save(lora, options, options.to, source, options.to)
    return _report(options, "converted", path, to=options.to, layers=len(lora.layers),
                   left_out=lora.unknown)


def merge_command(options: argparse.Namespace) -> int:
    from core.lora_files import formats
    from core.lora_files import merge as lora_algebra
    from core.lora_files.files import describe
    from core.lora_files.library import Tag, parse_lora, refuse_weights
    files, weights = [], []
    for text in options.files:
        name, weight = parse_lora(text)
        refuse_weights([Tag(name, weight)])
        files.append(paths.expanded(name))
        # without a weight: 1, as a sum is meant, not the library's weight for drawing
        weights.append(1.0 if name == text else weight)
    loras = [formats.read(path) for path in files]
    families = {describe(path).family for path in files if path.is_file()} - {"unknown"}
    if len(families) > 1 or len({lora.naming for lora in loras}) > 1:
        raise UserError("lora_convert.other_families", families=", ".join(sorted(families)))
    weighted, kept_energy = list(zip(loras, weights, strict=True)), 1.0
    if options.rank:
        resized = lora_algebra.merge_to(weighted, lora_algebra.Cut(options.rank))
        merged, kept_energy = resized.lora, resized.kept
    else:
        merged = lora_algebra.merge(weighted)
    options.precision = options.precision or "fp32"
    merged.metadata = _merged_metadata([lora.metadata for lora in loras], files, merged)
    path = _save(merged, options, "kohya", files[0], "merged")
    return _report(options, "merged", path, layers=len(merged.layers), kept=kept_energy,
                   left_out=merged.unknown)


def resize_command(options: argparse.Namespace) -> int:
    from core.lora_files import formats
    from core.lora_files import merge as lora_algebra
    if not options.rank and options.energy == 1:
        raise UserError("lora_convert.no_size")
    lora = formats.read(options.file)
    resized = lora_algebra.resize(lora, lora_algebra.Cut(options.rank, options.energy))
    low, high = resized.ranks
    # arguments of the network hold other ranks, and kinds that became plain
    resized.lora.metadata = {key: value for key, value in lora.metadata.items()
                             if key != "ss_network_args"} | _size_metadata(resized.lora)
    path = _save(resized.lora, options, _format_of(options.file), options.file, f"r{high}")
    return _report(options, "resized", path, low=low, high=high, kept=resized.kept,
                   left_out=lora.unknown)


def extract_command(options: argparse.Namespace) -> int:
    from core.cli.progress import Terminal
    from core.lora_files.extract import extract
    with Terminal() as terminal:
        extracted = extract(options.tuned, options.base, options.rank, options.conv_rank, terminal)
    lora = extracted.lora
    options.precision = options.precision or "fp16"
    lora.metadata = _size_metadata(lora) | {"ss_output_name": options.tuned.stem}
    path = _save(lora, options, "kohya", options.tuned, "lora")
    return _report(options, "extracted", path, layers=len(lora.layers), kept=extracted.kept,
                   compared=extracted.compared, rest=extracted.rest)


# --- what they share ---

def _format_of(source: Path) -> str:
    """The format in which a changed LoRA is written again: its own."""
    from core.lora_files.files import describe
    if source.is_dir():
        return "peft"
    format_ = describe(source).format
    if format_ == "comfyui":
        return format_
    # one file in diffusers' words, whichever of its versions wrote it
    names = read_header(source).tensors
    return "diffusers" if format_ in ("peft", "diffusers-old") or any(
        ".lora_A." in name for name in names) else "kohya"


def _save(lora: Lora, options: argparse.Namespace, to: str, source: Path, mark: str) -> Path:
    """Writes to --out, else beside the source as `<source>-<mark>`. Raises UserError where PEFT's
    folder is to have the name of a file."""
    import torch

    from core.lora_files import formats
    from core.lora_files.metadata import shared
    out = paths.expanded(options.out) if options.out else source.with_name(f"{source.stem}-{mark}")
    suffix = out.suffix.lower() == ".safetensors"
    # peft's format is a folder, the others are files
    if to == "peft" and suffix:
        # asked for by name, or the source's own
        if getattr(options, "to", "") == "peft":
            raise UserError("lora_convert.peft_folder", out=out, folder=out.with_suffix(""))
        to = "diffusers"
    if to != "peft" and out.is_dir():
        out /= f"{source.stem}-{mark}.safetensors"
    elif to != "peft" and not suffix:
        out = out.with_name(f"{out.name}.safetensors")
    dtype = getattr(torch, PRECISIONS[options.precision]) if options.precision else None
    if options.metadata == "public":
        lora.metadata = shared(lora.metadata)
    path = formats.save(lora, to, out, dtype)
    if to == "kohya" and (unread := formats.beyond_kohya(lora)):
        print(tr("kohya_unread", count=len(unread), layers=", ".join(unread[:3])), file=sys.stderr)
    return path


def _size_metadata(lora: Lora) -> dict[str, str]:
    """Rank and alpha in kohya's metadata; "Dynamic" where layers differ."""
    from core.lora_files.layers import alpha_of, rank_of
    ranks = {rank_of(layer) for layer in lora.layers.values()} - {0}
    alphas = {alpha_of(layer) for layer in lora.layers.values()} - {0.0}
    return {"ss_network_module": "networks.lora",
            "ss_network_dim": str(*ranks) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": str(*alphas) if len(alphas) == 1 else "Dynamic"}


def _merged_metadata(sources: list[dict[str, str]], files: list[Path], merged: Lora
                     ) -> dict[str, str]:
    """Metadata that is true of the sum: what all sources agree on, what it was made from, and the
    LoRAs that any of them was trained upon."""
    from core.adapters import base_loras
    from core.lora_files.metadata import facts_of
    shared = {key: value for key, value in sources[0].items()
              if key.startswith(("ss_", "modelspec."))
              and all(source.get(key) == value for source in sources)}
    triggers = dict.fromkeys(source["modelspec.trigger_phrase"] for source in sources
                             if "modelspec.trigger_phrase" in source)
    phrase = {"modelspec.trigger_phrase": ", ".join(triggers)} if triggers else {}
    trained_upon = dict.fromkeys(name for source in sources for name in facts_of(source).base_loras)
    return shared | phrase | base_loras.metadata(list(trained_upon)) | _size_metadata(merged) | {
        "modelspec.merged_from": ", ".join(path.name for path in files)}


def _report(options: argparse.Namespace, key: str, path: Path, **facts: Any) -> int:
    left_out = facts.pop("left_out", ())
    if left_out:
        print(tr("left_out", count=len(left_out), keys=", ".join(left_out[:3])), file=sys.stderr)
    params = {**facts, "kept": f"{100 * facts['kept']:.4g}"} if "kept" in facts else facts
    return answer(options, {"ok": True, "file": path, **facts, "left_out": left_out},
                  [tr(key, file=path, **params)])
