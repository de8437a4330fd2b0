"""Distilled bases: turbo, schnell, lightning and their like, which draw in a few steps without
guidance. Told by what their makers leave in folders and files, at last by the name. No torch.

Steps are the makers' own: 4 for Flux.1 schnell, Flux.2 klein and SD 3.5 turbo, else 8, or what the
name says ("4step").
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.families.detection import identify
from core.families.registry import SPECS
from core.families.spec import DistilledSigns, Found
from core.safetensors_header import read_header
from core.serialization import json_object

STEPS = 25                                  # of a base that isn't one, where the user says nothing
PREVIEW_STEPS = 20
# Words of names: a new word begins at a sign, a capital or behind "xl".
_WORDS = r"""
    (?: (?<![a-z]) | (?<=xl) | (?<=XL) | (?=[A-Z]) )
    (?i: turbo | schnell | lightning | hyper(?![-_ ]?real) | lcm | dmd2? | distill(?:ed)? OWN )
    (?! [a-z] )"""
_UNDONE = re.compile(r"(?i)(?:de|un)[-_ ]?(?:distill|turbo)|openflux|libreflux|klein[-_ ]?base"
                     r"|base[-_ ]?klein|klein[-_ .][49]b[-_ ]?base")
_STEPS = re.compile(r"(?i)(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])")
_TITLES = ("modelspec.title", "modelspec.architecture", "title")


@dataclass(frozen=True, slots=True)
class Distilled:
    """What such a base is drawn with where the user says nothing."""

    sign: str                               # what told: a name, or a key of the makers'
    steps: int = 8
    guided: bool = False                    # still takes the family's guidance, as Flux dev does


def of(source: Path, wanted: str = "auto") -> Distilled | None:
    """`wanted`: the config key `distilled`. None: it is none. Raises UserError as `identify`
    does."""
    return told(source, identify(source), wanted) if wanted != "false" else None


def told(source: Path, found: Found, wanted: str = "auto") -> Distilled | None:
    """The same of a base that is known already."""
    sign = next(_signs(source, found), "distilled: true" if wanted == "true" else "")
    if not sign or wanted == "false":
        return None
    signs = signs_of(found)
    few = signs.steps_of.get(found.what, signs.steps)
    said = next((int(m[1]) for text in _names(source) if (m := _STEPS.search(text))), 0)
    return Distilled(sign, said or few, found.what in signs.guided)


def drawing(cfg: float | None, steps: int | None, own: float, usual: int,
            distilled: Distilled | None) -> tuple[float, int]:
    """-> guidance and steps: the user's, else what a distilled base wants, else the family's."""
    if distilled is not None:
        own, usual = own if distilled.guided else 1.0, distilled.steps
    return own if cfg is None else cfg, usual if steps is None else steps


def _signs(source: Path, found: Found) -> Iterator[str]:
    """The surest first. Whoever undid a distillation says so in the name."""
    names, signs = list(_names(source)), signs_of(found)
    if any(_UNDONE.search(name) for name in names):
        return
    if source.is_dir():
        if json_object(source / "model_index.json").get("is_distilled") is True:
            yield "model_index.json, is_distilled"
        shift = json_object(source / "scheduler" / "scheduler_config.json").get("shift")
        if signs.shift is not None and shift == signs.shift and any(
                (source / "transformer").glob("*.safetensors")):    # else it's nobody's base
            yield f"scheduler_config.json, shift {shift:g}"
    if found.what in signs.named:
        yield signs.named[found.what]
    yield from (name for name in names if _word_pattern(signs.words).search(name))


def signs_of(found: Found) -> DistilledSigns:
    return SPECS[found.family].distilled if found.family in SPECS else DistilledSigns()


@functools.cache
def _word_pattern(own: str) -> re.Pattern[str]:
    return re.compile(_WORDS.replace("OWN", f"| {own}" if own else ""), re.VERBOSE)


def _names(source: Path) -> Iterator[str]:
    """What a base is called: its own name, its title, that of its repository in a hub's cache."""
    yield source.stem if source.is_file() else source.name
    yield from (part for part in source.parts if part.startswith("models--"))
    if source.is_file() and source.suffix == ".safetensors":
        metadata = read_header(source).metadata
        yield from (metadata[key] for key in _TITLES if metadata.get(key))
