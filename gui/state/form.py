"""The config's fields as inputs, built from TrainConfig itself: type, range, level, unit, help."""

from __future__ import annotations

import contextlib
import functools
import json
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

import gradio as gr
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from core.config import OPTIMIZERS, AdapterKind, TrainConfig
from core.errors import UserError
from gui.state.app_state import Context, Snapshot, Updates

LEVELS = ("basic", "advanced", "expert")
ELSEWHERE = frozenset({"base_model", "resume", "task_type"})    # asked for in another place
WIDE = frozenset({"train_data_dir", "output_dir", "sample_prompts", "metadata_path",
                  "target_modules", "trigger_word", "base_loras"})
CHOICES = {"target_modules": ["attention", "attention+ff", "all-linear"],
           "adapter": list(get_args(AdapterKind)), "optimizer": list(OPTIMIZERS)}   # or typed
LIMITS = {"ge": "at_least", "gt": "above", "le": "at_most", "lt": "below"}


class Form:
    """Inputs by config key. What is typed is kept in the project at once; what can't be used is
    kept as well, and named (`problems`)."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.inputs: dict[str, Any] = {}

    def add(self, keys: Iterable[str]) -> None:
        """Builds inputs in the layout that is open."""
        for key in keys:
            made = self.inputs[key] = _input(self.ctx, key)
            self.ctx.page.on(made.input, functools.partial(self.edited, key), [made])

    def edited(self, key: str, raw: Any) -> Updates | None:
        app_state = self.ctx.app_state
        try:
            also = {"max_train_steps": 0} if key == "epochs" else {}    # or it would do nothing
            app_state.projects.edit(**{key: parsed(key, raw)}, **also)
        except (ValidationError, ValueError):
            app_state.projects.refuse(key, str(raw))
        app_state.replan(self.ctx.language)
        return None

    def paint(self, snap: Snapshot) -> Updates:
        """Labels tell who decided a value."""
        sources = snap.project.sources()
        return {made: gr.update(label=self._label(snap, key, sources.get(key, "")))
                for key, made in self.inputs.items()}

    def fill(self, snap: Snapshot) -> Updates:
        sources = snap.project.sources()
        return {made: gr.update(value=self._value(snap, key), label=self._label(
            snap, key, sources.get(key, ""))) for key, made in self.inputs.items()}

    def _value(self, snap: Snapshot, key: str) -> Any:
        """What can't be used stands in its field as it was typed; a number field takes numbers."""
        raw = snap.project.invalid.get(key)
        if raw is not None and isinstance(self.inputs[key], gr.Number):
            with contextlib.suppress(ValueError):
                return float(raw)
        elif raw is not None:
            return raw
        return shown(key, getattr(snap.config, key))

    def _label(self, snap: Snapshot, key: str, source: str) -> str:
        if key == "epochs" and snap.config.max_train_steps:
            source = "unused"
        mark = f" · {self.ctx.tr(f'source_{source}')}" if source else ""
        return label(self.ctx, key) + mark


def keys_of(level: str) -> list[str]:
    return [key for key, about in TrainConfig.model_fields.items()
            if _extra(about)["level"] == level and key not in ELSEWHERE]


def label(ctx: Context, key: str) -> str:
    unit = _extra(TrainConfig.model_fields[key]).get("unit", "")
    said = ctx.tr(f"config_help.{key}")
    return f"{said} ({ctx.tr(f'unit_{unit}')})" if unit else said


def problems(ctx: Context, snap: Snapshot) -> list[str]:
    """A sentence for each field whose text can't be used."""
    return [ctx.tr("bad_value", label=label(ctx, key), value=raw, range=_range(ctx, key))
            for key, raw in snap.project.invalid.items() if key in TrainConfig.model_fields]


def said(ctx: Context, error: Exception) -> str:
    """A config that can't be used, in one sentence of the page's language."""
    if isinstance(error, UserError):
        return ctx.told(error)
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    key, value = str(first["loc"][0]) if first["loc"] else "", first.get("input")
    if key not in TrainConfig.model_fields:
        return ctx.tr("bad_setting", name=key, value=value)
    return ctx.tr("bad_value", label=label(ctx, key), value=value,
                  range=_range(ctx, key) or ctx.tr("range_kind"))


def parsed(key: str, raw: Any) -> Any:
    """What a page sends -> what the config takes; None: back to what is below. Raises ValueError
    for no number."""
    if raw is None or (isinstance(raw, str) and not raw.strip()):
        return None
    kind = _kind(key)
    if kind is bool:
        return bool(raw)
    if kind in (int, float):
        number = float(raw)
        return int(number) if kind is int and number == int(number) else number
    if kind is list:
        return [line.strip() for line in str(raw).splitlines() if line.strip()]
    if key == "target_modules" and "," in str(raw):
        return [part.strip() for part in str(raw).split(",") if part.strip()]
    return str(raw).strip()


def shown(key: str, value: Any) -> Any:
    """What the config holds -> what the input shows."""
    if isinstance(value, dict):                     # the config reads it back
        return "\n".join(f"{name}: {json.dumps(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ("\n" if _kind(key) is list else ", ").join(map(str, value))
    return value


def _input(ctx: Context, key: str) -> Any:
    about = TrainConfig.model_fields[key]
    settings: dict[str, Any] = {"label": label(ctx, key), "info": ctx.tr(
        f"config_help.{key}_help"), "elem_id": f"field-{key}", "interactive": True,
        "min_width": 120}
    kind = _kind(key)
    if kind is bool:
        return gr.Checkbox(**settings)
    if kind is Literal:
        return gr.Dropdown(list(get_args(_choice(key))), allow_custom_value=(
            _choice(key) is not about.annotation), **settings)
    if kind in (int, float):
        return gr.Number(precision=0 if kind is int else None, **settings)
    if key in CHOICES:
        return gr.Dropdown(CHOICES[key], allow_custom_value=True, **settings)
    many = kind in (list, dict)
    return gr.Textbox(lines=2 if many else 1, max_lines=8 if many else 1, **settings)


def _kind(key: str) -> Any:
    """bool | int | float | list | dict | str | Literal"""
    kind = TrainConfig.model_fields[key].annotation
    if _choice(key) is not None:
        return Literal
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(one for one in reversed(get_args(kind)) if one is not type(None))
    return get_origin(kind) or kind


def _choice(key: str) -> Any:
    """The Literal of a key, alone or beside own values; None: it has none."""
    kind = TrainConfig.model_fields[key].annotation
    return next((one for one in (kind, *get_args(kind)) if get_origin(one) is Literal), None)


def _range(ctx: Context, key: str) -> str:
    parts = [ctx.tr(LIMITS[name], value=f"{value:g}")
             for limit in TrainConfig.model_fields[key].metadata for name in LIMITS
             if (value := getattr(limit, name, None)) is not None]
    size = key in ("max_resolution", "sample_size")
    if choices := get_args(TrainConfig.model_fields[key].annotation):
        names = [str(one) for one in choices if isinstance(one, str)]
        parts = [ctx.tr("one_of", names=", ".join(names))] if names else parts
    return ctx.tr("range_size") if size else ctx.tr("comma").join(parts)


def _extra(about: FieldInfo) -> dict[str, Any]:
    return about.json_schema_extra if isinstance(about.json_schema_extra, dict) else {}
