"""What `<lora:name:0.8>` in a prompt and `--lora name:0.8` mean: names, weights, files. Without
torch."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from core import i18n, paths, prompt_markup
from core.config import TrainConfig
from core.errors import UserError
from core.families import lora_signs
from core.lora_files import files, formats

DEFAULT_WEIGHT = 0.8
# LyCORIS' own tag and what a Chinese keyboard or a slip makes of it are meant, too.
_SIGNS = "<>＜＞《》〈〉:："
TAG = re.compile(rf"[<＜《〈]\s*(?:lora|lyco)\s*[:：]\s*([^{_SIGNS}\s][^{_SIGNS}]*)"
                 rf"((?:[:：][^{_SIGNS}]*)*)[>＞》〉]", re.IGNORECASE)
STATE = "state.safetensors"                 # of a checkpoint's folder: no LoRA
WORDS = "_emb.safetensors"                  # new words beside a LoRA


@dataclass(frozen=True, slots=True)
class Lora:
    path: Path
    weight: float
    text: float | None = None               # weight in the text encoders; None: the same

    @property
    def tag(self) -> str:
        """The tag as A1111 writes it: the text encoders' weight stands before the denoiser's."""
        two = "" if self.text is None else f"{self.text:g}:"
        return f"<lora:{self.path.stem}:{two}{self.weight:g}>"


class Tag(NamedTuple):
    """A `<lora:...>` of a prompt."""

    name: str
    weight: float = DEFAULT_WEIGHT
    text: float | None = None               # weight in the text encoders; None: the same
    unread: str = ""                        # parts that mean nothing here, such as lbw=MIDD
    bad: str | None = None                  # what stands for a weight and is none


def split_prompt(prompt: str) -> tuple[str, list[Tag]]:
    """'a cat <lora:ink:0.5>' -> ('a cat', [Tag('ink', 0.5)]); the weight's default is 0.8."""
    tags = []
    for match in TAG.finditer(prompt):
        numbers: list[float] = []
        named: dict[str, float] = {}
        unread, bad = [], None
        for part in re.split("[:：]", match[2])[1:]:
            key, equals, value = part.strip().rpartition("=")
            # after a weight, other programs take names of blocks
            if (key not in ("te", "unet") if equals else len(numbers) == 2 or (
                    numbers and not prompt_markup.is_meant_as_number(value))):
                unread.append(part.strip())
                continue
            try:
                weight = prompt_markup.number(value)
            except prompt_markup.BadWeight:
                bad = value
            else:
                if equals:
                    named[key] = weight
                else:
                    numbers.append(weight)
        # By A1111's rules: one number is the weight of all; of two, the first is the text
        # encoders'. te= and unet= override both.
        text = named.get("te", numbers[0] if numbers else DEFAULT_WEIGHT)
        weight = named.get("unet", numbers[1] if len(numbers) == 2 else text)
        tags.append(Tag(name_in(match), weight, None if text == weight else text,
                        ", ".join(filter(None, unread)), bad))
    return re.sub(r"\s{2,}", " ", TAG.sub("", prompt)).strip(), tags


def name_in(tag: re.Match[str]) -> str:
    """The name that a match of TAG holds; some programs quote it, others write the file's."""
    return re.sub(r"\.(safetensors|ckpt|pt)$", "", tag[1].strip(" \"'"))


def refuse_weights(tagged: Iterable[Tag]) -> None:
    """Raises UserError for a weight that is no number, or none that can be meant."""
    for tag in tagged:
        weights = (tag.weight, tag.weight if tag.text is None else tag.text)
        if tag.bad is not None or not all(abs(one) <= prompt_markup.MOST_WEIGHT for one in weights):
            raise UserError("generate.bad_weight", part=tag.name,
                            weight=f"{weights[0]:g}" if tag.bad is None else tag.bad)


def refuse_paths(tagged: Iterable[Tag]) -> None:
    """Raises UserError for a tag that holds a path: prompts come from strangers' pictures and may
    name LoRAs, but not reach for files."""
    for tag in tagged:
        if not paths.is_file_name(tag.name):
            raise UserError("generate.lora_path", name=tag.name)


def prompts_of(config: TrainConfig) -> list[str]:
    """The prompts of previews, with the trigger word in its place. Without their tags: previews are
    drawn with the adapter in training alone."""
    return [prompt_markup.placed(split_prompt(prompt_markup.joined(prompt))[0],
                                 config.trigger_word) for prompt in config.sample_prompts]


def parse_lora(text: str, default: float = DEFAULT_WEIGHT) -> tuple[str, float]:
    """'ink.safetensors:0.5' -> (name, weight). A colon of a Windows drive is no weight."""
    name, colon, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if colon and name else (text, default)
    except ValueError:
        # a comma instead of the point is a weight that is refused, not a part of the name
        return (name, math.nan) if re.fullmatch(r"[-+]?\d+,\d+", weight) else (text, default)


def find_lora(name: str, weight: float) -> Lora:
    """A path, or a name looked up in ./output and the finished runs' folders.

    Raises UserError `generate.unknown_lora` with the nearest names, and for a weight that is none.
    """
    refuse_weights([Tag(name, weight)])
    with contextlib.suppress(OSError, ValueError, RuntimeError):        # no path of this system
        direct = paths.expanded(name)
        for path in (direct, direct.with_name(f"{direct.name}.safetensors")):
            if path.is_file() or (path / formats.CONFIG).is_file():
                return Lora(path.absolute(), weight)
    from core.jobs import runs
    folders = [Path(run.output_dir) for run in runs.list_runs() if run.output_dir]
    known = files_by_name([Path("output"), *dict.fromkeys(folders)])
    if name in known:
        return Lora(known[name], weight)
    raise unknown(name, known)


def files_by_name(folders: Iterable[Path]) -> dict[str, Path]:
    """File name without suffix -> path, all folders below included; of the same name the first."""
    known: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("**/*.safetensors")) if folder.is_dir() else ():
            if path.name != STATE and not path.name.endswith(WORDS):
                known.setdefault(path.stem, path.absolute())
    return known


def unknown(name: str, known: Iterable[str]) -> UserError:
    """The error for a name that no file has, with the nearest names."""
    names = list(known)
    close = i18n.nearest(name, names)
    return UserError("generate.unknown_lora", name=" ".join(name.split()),
                     nearest=", ".join(close) or ", ".join(names[:5]) or "-")


def checked(path: Path, family: str) -> files.Info:
    """What a LoRA file is, from its header alone. Raises UserError where it is no LoRA, or one of
    another family than the base. A file whose family can't be told passes."""
    info = files.describe(path)
    if info.format in lora_signs.NOT_LORA:
        raise UserError("lora_file.not_a_lora", file=path, what=info.format)
    if info.family not in ("unknown", family):
        raise UserError("generate.other_family", file=path, family=info.family, base=family)
    return info
