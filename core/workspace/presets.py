"""Presets: YAML files that set a config's fields for a family, a purpose and a size of card.

    title: {en: "8GB laptop", zh-CN: ...}    about: {en: ..., zh-CN: ...}
    family: sd15    purpose: style    needs: {vram_gb: 8, ram_gb: 8}    set: {lora_rank: 8, ...}

Later ones win: family default (TrainConfig) -> preset -> advisor -> the user's edits.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core import families, i18n, paths, plugins, serialization
from core.config import COMPANIONS, TrainConfig, parse_train_config, resolve
from core.config.flat_yaml import first_message, read_flat_yaml
from core.errors import UserError
from core.families import detection
from core.importers import FOREIGN, load_train_config
from core.memory import advisor
from core.memory.plan import Machine, Verdict

PURPOSE = "style"               # where none is named
NOMINAL = 0.95                  # share of its nominal size that a card really has


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

    def localized(self, field: str, lang: str | None = None) -> str:
        """The `title` or `about` in a language (None: the user's), else in English."""
        texts: dict[str, str] = getattr(self, field)
        return texts.get(lang or i18n.language()) or texts.get("en") or next(iter(texts.values()))


# --- the files ---

def list_presets(lang: str | None = None, family: str | None = None) -> list[Preset]:
    """All presets, the app's and the user's (<data>/presets/<family>/*.yaml), by family, memory
    needed and title. A file of the user's that can't be used is left out (`unusable`). Raises
    UserError for one of the app's own."""
    presets, faults = _read_all()
    for fault in faults:
        if fault.params["file"].is_relative_to(paths.PRESETS):
            raise fault
    return sorted((preset for preset in presets if family in (None, preset.family)),
                  key=lambda preset: (preset.family, preset.needs.vram_gb,
                                      preset.localized("title", lang), preset.purpose))


def unusable() -> list[UserError]:
    """The fault of each file of presets that can't be used."""
    return _read_all()[1]


def _read_all() -> tuple[list[Preset], list[UserError]]:
    """-> presets, and a fault for each file that can't be used."""
    # the user's first, so that they win where titles are the same
    found = [_read(path, paths.stamp(path)) for folder in (user_folder(), paths.PRESETS)
             for path in sorted(folder.glob("*/*.yaml"))]
    return ([preset for preset in found if isinstance(preset, Preset)],
            [fault for fault in found if isinstance(fault, UserError)])


def find(name: str, family: str, purpose: str = PURPOSE) -> Preset:
    """The preset of a title in either language, or of a file name; spaces and case don't matter.

    Raises UserError with the nearest name where there is none.
    """
    of_family = list_presets(family=family)
    if not of_family:
        raise no_family(family)
    named = [preset for preset in of_family if _plain(name) in map(_plain, preset.names())]
    for preset in named:
        # a file name is of one preset alone, whatever its purpose
        if preset.purpose == purpose or _plain(name) == _plain(preset.slug):
            return preset
    if named:
        raise UserError("presets.no_purpose", name=name, purpose=purpose,
                        known=", ".join(sorted({preset.purpose for preset in named})))
    titles = list(dict.fromkeys(title for preset in of_family for title in preset.title.values()))
    close = i18n.nearest(name, titles, 1)
    raise UserError("presets.unknown", name=name, family=family,
                    nearest=close[0] if close else titles[0],
                    known=", ".join(dict.fromkeys(
                        preset.localized("title") for preset in of_family)))


def no_family(family: str | None) -> UserError:
    """The fault that there is no preset for this family."""
    known = sorted({preset.family for preset in list_presets()})
    return UserError("presets.no_family", family=family, known=", ".join(known))


def family_of(base_model: str, beside: Path | None = None, family: str = "auto") -> str:
    """The family whose presets fit a config's `base_model` and `family`. Raises UserError where
    there is no such base."""
    if not base_model:
        return next(iter(families.SPECS))
    if base_model == "demo" or base_model in families.SPECS:
        return base_model
    path = resolve(base_model, beside)
    if os.path.exists(path) and path.samefile(paths.DEMO / "base"):
        return "demo"
    if family in families.SPECS:
        detection.expect(path, family)
        return family
    try:
        return families.detect(path)
    except UserError:
        # a family that the user wrote may read any file
        if plugins.is_named(family) and os.path.exists(path):
            return family
        raise


# Pages ask at each painting: a fault is kept as well.
@functools.lru_cache(maxsize=1024)
def _read(path: Path, stamp: tuple[int, int, int]) -> Preset | UserError | None:
    """A preset or why it is none, read again where its file has changed. None: the file is a plain
    config, such as the demo's."""
    try:
        data = serialization.from_yaml(serialization.decode_text(path.read_bytes()))
        if not isinstance(data, dict) or "set" not in data:
            return None
        preset = Preset.model_validate({"path": path, **data})
        TrainConfig.model_validate(preset.set)
        return preset
    except (ValidationError, TypeError) as error:
        reason = first_message(error) if isinstance(error, ValidationError) else _first_line(error)
        return UserError("presets.bad", file=path, reason=reason)
    except (OSError, ValueError) as error:
        return UserError("presets.unreadable", file=path, reason=_first_line(error))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


# --- the user's own ---

# Keys that say which pictures, which base and which folder: a preset says how to train.
NOT_KEPT = frozenset({"train_data_dir", "base_model", "output_dir", "output_name", "trigger_word",
                      "metadata_path", *COMPANIONS, "resume", "device", "sample_prompts", "family"})


def user_folder() -> Path:
    return paths.data_dir() / "presets"


def is_user_preset(preset: Preset) -> bool:
    return preset.path.is_relative_to(user_folder())


def save_user_preset(title: str, family: str, purpose: str, config: TrainConfig,
                     needs: Needs) -> Preset:
    """Saves the config's settings as a preset; one of that title and purpose is replaced. Raises
    UserError for a title that is no name."""
    title = _checked_title(title)
    same = next((preset for preset in list_presets(family=family) if is_user_preset(preset)
                 and preset.purpose == purpose and title in preset.names()), None)
    plain = re.sub(r"[^\w-]+", "-", title.casefold()).strip("-") or "preset"
    path = same.path if same else user_folder() / family / f"own-{plain}.yaml"
    values = config.model_dump(mode="json", exclude_defaults=True, exclude=set(NOT_KEPT))
    about = {lang: i18n.tr("presets.own_about", {"fields": len(values)}, lang)
             for lang in i18n.LANGUAGES}
    preset = Preset(path=path, title=dict.fromkeys(i18n.LANGUAGES, title), about=about,
                    family=family, purpose=purpose, needs=needs, set=values)
    if same:
        paths.write_atomic(path, _yaml(preset))
        return preset
    created = paths.create(path, lambda fresh: fresh.write_text(_yaml(preset), "utf-8"))
    return preset.model_copy(update={"path": created})


def needs_of(mb: float, card: bool) -> Needs:
    """The smallest card that is sold and has this much free, or this much RAM."""
    if not card:
        return Needs(vram_gb=0, ram_gb=round(mb / 1024, 1))
    fitting = (gb for gb in advisor.CARDS_GB if advisor.card_of(gb).free_mb >= mb)
    return Needs(vram_gb=next(fitting, advisor.CARDS_GB[-1]), ram_gb=0)


def rename_user_preset(preset: Preset, title: str) -> None:
    """Raises UserError for a title that is no name."""
    titles = dict.fromkeys(i18n.LANGUAGES, _checked_title(title))
    paths.write_atomic(preset.path, _yaml(preset.model_copy(update={"title": titles})))


def _checked_title(title: str) -> str:
    title = " ".join(title.split())
    if not title or len(title) > 60:
        raise UserError("presets.bad_title", title=title)
    return title


def remove_user_preset(preset: Preset) -> None:
    """The file stays beside the others as .removed, for `restore_user_preset`."""
    if is_user_preset(preset):
        preset.path.replace(preset.path.with_suffix(".removed"))


def restore_user_preset(family: str, slug: str) -> None:
    removed = user_folder() / family / f"{Path(slug).name}.removed"
    if removed.is_file():
        removed.replace(removed.with_suffix(".yaml"))


def _yaml(preset: Preset) -> str:
    return serialization.to_yaml(preset.model_dump(mode="json", exclude={"path"}))


# --- a preset below a config ---

# Keys that mean nothing without each other: an edit of the first drops the preset's second.
_TOGETHER = (({"epochs", "max_train_steps"}, {"epochs", "max_train_steps", "lr_warmup_steps",
                                              "save_steps"}),
             ({"lora_rank"}, {"lora_alpha"}))


def apply(preset: Preset, config_data: Mapping[str, Any],
          advised: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The config's data with the preset below it: family default -> preset -> `advised`
    (Suggestion.values) -> the user's edits, which are `config_data`.

    `sets` gives the fields that the preset still decides.
    """
    lower = {**_below(preset.set, advised), **advised}
    return {**_below(lower, config_data), **config_data}


def sets(preset: Preset, config_data: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, ...]:
    """The fields that the preset decides, without those that the user edited (`config_data`)."""
    return tuple(_below(preset.set, config_data))


def _below(values: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `values` that edits leave in force."""
    hidden = set(edits)
    for edited, dropped in _TOGETHER:
        if edited & edits.keys():
            hidden |= dropped
    left = {key: value for key, value in values.items() if key not in hidden}
    # With another batch size, as many pictures go into an update as before.
    batch = edits.get("batch_size")
    if isinstance(batch, int) and batch > 0 and "gradient_accumulation_steps" in left:
        whole = values.get("batch_size", 1) * left["gradient_accumulation_steps"]
        left["gradient_accumulation_steps"] = max(1, round(whole / batch))
    return left


def train_config(name: str, path: Path | None, overrides: Mapping[str, str] | None = None,
                 purpose: str = PURPOSE) -> tuple[TrainConfig, Preset, tuple[str, ...]]:
    """`train --preset NAME [--config FILE] [--set ...]`: the config, the preset, and the fields
    that the preset set. Raises UserError as load_train_config does, with the file's own lines."""
    overrides = overrides or {}
    config = load_train_config(path, overrides) if path else parse_train_config(
        "", "--set", overrides)
    # the keys that the user wrote, in the file and on the command line
    written: Mapping[str, Any] = {}
    if path is not None and path.suffix.lower() not in (".safetensors", *FOREIGN):
        written, _ = read_flat_yaml(serialization.decode_text(path.read_bytes()), str(path))
    elif path is not None:
        written = config.model_dump(exclude_unset=True)
    edits = {key: getattr(config, key) for key in (*written, *overrides)}

    preset = find(name, family_of(config.base_model, path.parent if path else None,
                                  config.family), purpose)
    fields = _below(preset.set, edits)
    # as if the preset's fields stood on the command line; JSON is YAML
    text = {key: json.dumps(value) for key, value in fields.items()} | dict(overrides)
    config = (load_train_config(path, text) if path
              else parse_train_config("", f"--preset {name}", text))
    return config, preset, tuple(fields)


# --- against a machine ---

def badge(preset: Preset, machine: Machine) -> Verdict:
    """Whether a machine can train it, by the preset's own needs, which is quick: fits | tight
    (other programs hold too much) | too_big."""
    # a preset for a CPU is small
    if machine.kind == "cuda" and not preset.needs.vram_gb:
        return "fits"
    if machine.kind != "cuda" and preset.needs.vram_gb:
        return "too_big"
    needs = 1024 * (preset.needs.vram_gb or preset.needs.ram_gb)
    if machine.total_mb < needs * NOMINAL:
        return "too_big"
    beside_desktop = (advisor.card_of(preset.needs.vram_gb).free_mb if preset.needs.vram_gb
                      else needs / 2)
    return "fits" if machine.free_mb >= beside_desktop * NOMINAL else "tight"
