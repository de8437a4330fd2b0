"""Presets: YAML files that set a config's fields for a family, a purpose and a size of card.

    title: {en: "8GB laptop", zh-CN: ...}    about: {en: ..., zh-CN: ...}
    family: sd15    purpose: style    needs: {vram_gb: 8, ram_gb: 8}    set: {lora_rank: 8, ...}

Order, the later wins: family default (TrainConfig) -> preset -> advisor -> own edits.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core import families, i18n, paths, plugins, serialization
from core.config import COMPANIONS, TrainConfig, parse_train_config, resolve
from core.config.flat_yaml import read_flat_yaml
from core.errors import UserError
from core.families import detection
from core.importers import FOREIGN, load_train_config
from core.memory import advisor
from core.memory.plan import Machine, Verdict

PURPOSE = "style"               # where none is named
CARDS = (4, 6, 8, 10, 12, 16, 24, 32, 48, 80)   # GB
NOMINAL = 0.95                  # of what is sold as 8 GB, so much is there


class Needs(BaseModel):
    """The smallest machine that the preset is meant for; vram_gb 0: it trains on the CPU."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vram_gb: float = Field(ge=0)
    ram_gb: float = Field(ge=0)


class Preset(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    title: dict[str, str]
    about: dict[str, str]
    family: str
    purpose: str
    needs: Needs
    set: dict[str, Any]

    @property
    def slug(self) -> str:
        return self.path.stem

    def names(self) -> tuple[str, ...]:
        return (*self.title.values(), self.slug)

    def said(self, field: str, lang: str | None = None) -> str:
        """Its `title` or `about` in a language."""
        texts: dict[str, str] = getattr(self, field)
        return texts.get(lang or i18n.language()) or texts.get("en") or next(iter(texts.values()))


# --- the files ---

def list_presets(lang: str | None = None, family: str | None = None) -> list[Preset]:
    """All of them, the app's and the user's own (<data>/presets/<family>/*.yaml), by family,
    memory needed and title. A file of the user's that is no preset raises UserError."""
    found = [one for path in _files() if (one := _read(path)) is not None]
    return sorted((one for one in found if family in (None, one.family)), key=lambda one: (
        one.family, one.needs.vram_gb, one.said("title", lang), one.purpose))


def find(name: str, family: str, purpose: str = PURPOSE) -> Preset:
    """By title in either language, or by file name; spaces and case don't matter.

    Raises UserError with the nearest name where there is none."""
    here = [one for one in list_presets(family=family)]
    if not here:
        raise UserError("presets.no_family", family=family,
                        known=", ".join(sorted({one.family for one in list_presets()})))
    named = [one for one in here if _plain(name) in map(_plain, one.names())]
    fitting = [one for one in named if one.purpose == purpose or _plain(name) == _plain(one.slug)]
    if fitting:
        return fitting[0]
    if named:
        raise UserError("presets.no_purpose", name=name, purpose=purpose,
                        known=", ".join(sorted({one.purpose for one in named})))
    titles = list(dict.fromkeys(title for one in here for title in one.title.values()))
    close = i18n.nearest(name, titles, 1)
    raise UserError("presets.unknown", name=name, family=family,
                    nearest=close[0] if close else titles[0],
                    known=", ".join(dict.fromkeys(one.said("title") for one in here)))


def family_of(base_model: str, beside: Path | None = None, family: str = "auto") -> str:
    """The folder of presets for a config's `base_model`, or of the `family` that it is named to
    be. Raises UserError where nothing is there."""
    if not base_model:
        return next(iter(families.SPECS))
    if base_model == "demo" or base_model in families.SPECS:
        return base_model
    path = resolve(base_model, beside)
    if path.exists() and path.samefile(paths.DEMO / "base"):
        return "demo"
    if family in families.SPECS:
        detection.expect(path, family)
        return family
    try:
        return families.detect(path)
    except UserError:
        if plugins.is_named(family) and path.exists():
            return family                   # one's own may read any file
        raise


def _files() -> Iterator[Path]:
    for folder in (own_folder(), paths.PRESETS):                        # one's own first
        yield from sorted(folder.glob("*/*.yaml"))


def _read(path: Path) -> Preset | None:
    """None: a plain config lies there, such as the demo's."""
    try:
        mark = path.stat()
    except OSError as error:
        raise UserError("presets.unreadable", file=path, reason=_first_line(error)) from None
    return _parsed(path, mark.st_mtime_ns, mark.st_size)


@functools.lru_cache(maxsize=1024)
def _parsed(path: Path, changed: int, size: int) -> Preset | None:
    try:
        data = serialization.from_yaml(serialization.decode_text(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError("presets.unreadable", file=path, reason=_first_line(error)) from None
    if not isinstance(data, dict) or "set" not in data:
        return None
    try:
        preset = Preset.model_validate({"path": path, **data})
        TrainConfig.model_validate(preset.set)
    except (ValidationError, TypeError) as error:
        raise UserError("presets.bad", file=path, reason=_problem(error)) from None
    return preset


def _problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return _first_line(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


# --- one's own ---

# What says which pictures and which base, or where to; a preset is about how.
NOT_KEPT = frozenset({"train_data_dir", "base_model", "output_dir", "output_name", "trigger_word",
                      "metadata_path", *COMPANIONS, "resume", "device", "sample_prompts", "family"})


def own_folder() -> Path:
    return paths.data_dir() / "presets"


def is_own(preset: Preset) -> bool:
    return preset.path.is_relative_to(own_folder())


def save_own(title: str, family: str, purpose: str, config: TrainConfig, needs: Needs) -> Preset:
    """The config's settings as a preset; one of that title and purpose is replaced. Raises
    UserError for a title that is no name."""
    title = " ".join(title.split())
    if not title or len(title) > 60:
        raise UserError("presets.bad_title", title=title)
    same = next((one for one in list_presets(family=family)
                 if is_own(one) and one.purpose == purpose and title in one.names()), None)
    plain = re.sub(r"[^\w-]+", "-", title.casefold()).strip("-") or "preset"
    path = same.path if same else own_folder() / family / f"own-{plain}.yaml"
    values = config.model_dump(mode="json", exclude_defaults=True, exclude=set(NOT_KEPT))
    about = {lang: i18n.tr("presets.own_about", {"fields": len(values)}, lang)
             for lang in i18n.LANGUAGES}
    preset = Preset(path=path, title=dict.fromkeys(i18n.LANGUAGES, title), about=about,
                    family=family, purpose=purpose, needs=needs, set=values)
    if same:
        _write(preset)
        return preset
    made = paths.create(path, lambda fresh: fresh.write_text(_text(preset), "utf-8"))
    return preset.model_copy(update={"path": made})


def needs_of(mb: float, card: bool) -> Needs:
    """The smallest card of those that are sold, or so much RAM."""
    if not card:
        return Needs(vram_gb=0, ram_gb=round(mb / 1024, 1))
    fitting = (gb for gb in CARDS if advisor.card_of(gb).free_mb >= mb)
    return Needs(vram_gb=next(fitting, CARDS[-1]), ram_gb=0)


def rename_own(preset: Preset, title: str) -> None:
    title = " ".join(title.split())
    if not title or len(title) > 60:
        raise UserError("presets.bad_title", title=title)
    _write(preset.model_copy(update={"title": dict.fromkeys(i18n.LANGUAGES, title)}))


def remove_own(preset: Preset) -> None:
    """It stays beside the others as .removed, see `restore_own`."""
    if is_own(preset):
        preset.path.replace(preset.path.with_suffix(".removed"))


def restore_own(family: str, slug: str) -> None:
    removed = own_folder() / family / f"{Path(slug).name}.removed"
    if removed.is_file():
        removed.replace(removed.with_suffix(".yaml"))


def _write(preset: Preset) -> None:
    paths.write_atomic(preset.path, _text(preset))


def _text(preset: Preset) -> str:
    data = preset.model_dump(mode="json", exclude={"path"})
    return yaml.safe_dump(data, allow_unicode=True, sort_keys=False)


# --- laid over a config ---

# Keys that mean nothing without each other: own edits of one side drop the preset's other side.
_TOGETHER = (({"epochs", "max_train_steps"}, {"epochs", "max_train_steps", "lr_warmup_steps",
                                              "save_steps"}),
             ({"lora_rank"}, {"lora_alpha"}))


def apply(preset: Preset, config_data: Mapping[str, Any],
          advised: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config's data with the preset below it: family default -> preset -> `advised`
    (Suggestion.values) -> own edits, which are `config_data`.

    Of the preset's fields, `sets` tells which are left."""
    lower = {**_below(preset.set, advised), **advised} if advised else preset.set
    return {**_below(lower, config_data), **config_data}


def sets(preset: Preset, config_data: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The fields that the preset decides, own edits (`config_data`) taken out."""
    return tuple(_below(preset.set, config_data or {}))


def _below(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of `values` under own edits. One's own batch keeps the pictures an update."""
    hidden = set(own)
    for edited, dropped in _TOGETHER:
        if edited & own.keys():
            hidden |= dropped
    left = {key: value for key, value in values.items() if key not in hidden}
    batch = own.get("batch_size")
    if isinstance(batch, int) and batch > 0 and "gradient_accumulation_steps" in left:
        whole = values.get("batch_size", 1) * left["gradient_accumulation_steps"]
        left["gradient_accumulation_steps"] = max(1, round(whole / batch))
    return left


def train_config(name: str, path: Path | None, overrides: Mapping[str, str] | None = None,
                 purpose: str = PURPOSE) -> tuple[TrainConfig, Preset, tuple[str, ...]]:
    """`train --preset NAME [--config FILE] [--set ...]`: the config, the preset, and the fields
    that the preset set. Raises UserError as load_train_config does, with the file's own lines."""
    own, base, family = _own(path, overrides or {})
    preset = find(name, family_of(base, path.parent if path else None, family), purpose)
    kept = _below(preset.set, own)
    text = {key: json.dumps(value) for key, value in kept.items()} | dict(overrides or {})
    config = (load_train_config(path, text) if path
              else parse_train_config("", f"--preset {name}", text))
    return config, preset, tuple(kept)


def _own(path: Path | None, overrides: Mapping[str, str]) -> tuple[dict[str, Any], str, str]:
    """The keys that a user wrote, with their values, the base model and its family."""
    given = load_train_config(path, overrides) if path else parse_train_config(
        "", "--set", overrides)
    data: Mapping[str, Any] = {}
    if path is not None and path.suffix.lower() not in (".safetensors", *FOREIGN):
        data, _ = read_flat_yaml(serialization.decode_text(path.read_bytes()), str(path))
    elif path is not None:
        data = given.model_dump(exclude_unset=True)
    return ({key: getattr(given, key) for key in (*data, *overrides)}, given.base_model,
            given.family)


# --- against a machine ---

def badge(preset: Preset, machine: Machine) -> Verdict:
    """By the needs it names, at once: fits | tight (other programs hold too much) | too_big."""
    if machine.kind == "cuda" and not preset.needs.vram_gb:
        return "fits"                       # what a CPU trains is small
    if machine.kind != "cuda" and preset.needs.vram_gb:
        return "too_big"
    needs = 1024 * (preset.needs.vram_gb or preset.needs.ram_gb)
    if machine.total_mb < needs * NOMINAL:
        return "too_big"
    beside_desktop = (advisor.card_of(preset.needs.vram_gb).free_mb if preset.needs.vram_gb
                      else needs / 2)
    return "fits" if machine.free_mb >= beside_desktop * NOMINAL else "tight"
