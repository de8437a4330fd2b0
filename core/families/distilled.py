"""Distilled bases: turbo, schnell, lightning and their like, which draw in a few steps without
guidance. They are known by what their makers leave in folders and files, or else by their name.
Needs no torch.

The steps are the makers' own: 4 for Flux.1 schnell, Flux.2 klein and SD 3.5 turbo, else 8, or what
the name says ("4step").
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.families.detection import identify
from core.families.registry import SPECS
from core.families.spec import DistilledSigns, Found
from core.safetensors_header import read_header
from core.serialization import json_object

# Steps of other bases, where the user says nothing.
STEPS = 25
PREVIEW_STEPS = 20
# Words in names: a new word begins at a sign, a capital or behind "xl". OWN is the family's own.
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

    sign: str                               # by which it is known: a name, or a key of the makers'
    steps: int = 8
    guided: bool = False                    # still takes the family's guidance, as Flux dev does


def of(source: Path, wanted: str = "auto", found: Found | None = None) -> Distilled | None:
    """How a distilled base draws; None for a base that isn't distilled.

    `wanted` is the config key `distilled`, `found` what `source` is where that is known already.
    Raises UserError as `identify` does.
    """
    if wanted == "false":
        return None
    found = found or identify(source)
    sign = next(_signs_in(source, found), "distilled: true" if wanted == "true" else "")
    if not sign:
        return None
    signs = signs_of(found)
    named_steps = next((int(m[1]) for name in _names(source) if (m := _STEPS.search(name))), 0)
    return Distilled(sign, named_steps or signs.steps_of.get(found.what, signs.steps),
                     found.what in signs.guided)


def drawing(cfg: float | None, steps: int | None, own: float, usual: int,
            distilled: Distilled | None) -> tuple[float, int]:
    """Returns guidance and steps: the user's (`cfg`, `steps`), else a distilled base's, else the
    family's guidance (`own`) and the `usual` steps."""
    if distilled is not None:
        own, usual = own if distilled.guided else 1.0, distilled.steps
    return own if cfg is None else cfg, usual if steps is None else steps


def _signs_in(source: Path, found: Found) -> Iterator[str]:
    """What says that a base is distilled, the surest sign first."""
    names, signs = list(_names(source)), signs_of(found)
    # Whoever undid a distillation says so in the name, and that counts more than all signs.
    if any(_UNDONE.search(name) for name in names):
        return
    if source.is_dir():
        if json_object(source / "model_index.json").get("is_distilled") is True:
            yield "model_index.json, is_distilled"
        shift = json_object(source / "scheduler" / "scheduler_config.json").get("shift")
        # Without weights it is the folder of configs from which the app plans, and no base.
        if signs.shift is not None and shift == signs.shift and any(
                (source / "transformer").glob("*.safetensors")):
            yield f"scheduler_config.json, shift {shift:g}"
    if found.what in signs.named:
        yield signs.named[found.what]
    words = re.compile(_WORDS.replace("OWN", f"| {signs.words}" if signs.words else ""),
                       re.VERBOSE)
    yield from (name for name in names if words.search(name))


def signs_of(found: Found) -> DistilledSigns:
    """The signs of the family that was found; the common ones for a family that isn't built in."""
    return SPECS[found.family].distilled if found.family in SPECS else DistilledSigns()


def _names(source: Path) -> Iterator[str]:
    """The names of a base: its own, that of its repository in a hub's cache, and its title."""
    yield source.stem if source.is_file() else source.name
    yield from (part for part in source.parts if part.startswith("models--"))
    if source.is_file() and source.suffix == ".safetensors":
        metadata = read_header(source).metadata
        yield from (metadata[key] for key in _TITLES if metadata.get(key))
