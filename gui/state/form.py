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

from core.config import OPTIMIZERS, AdapterKind, TrainConfig
from core.config.flat_yaml import first_problem
from core.errors import UserError
from gui.state.app_state import Context, Snapshot, Updates

# Keys that other parts of the window ask for.
ELSEWHERE = frozenset({"base_model", "resume", "task_type"})
# Offered, but anything else can be typed as well.
CHOICES = {"target_modules": ["attention", "attention+ff", "all-linear"],
           "adapter": list(get_args(AdapterKind)), "optimizer": list(OPTIMIZERS)}
# What pydantic calls a limit -> its sentence.
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
            component = self.inputs[key] = _input(self.ctx, key)
            self.ctx.page.on(functools.partial(self.edited, key), component.input,
                             inputs=[component])

    def edited(self, key: str, raw: Any) -> None:
        """Puts what was typed into the project, or marks it as invalid."""
        app_state = self.ctx.app_state
        try:
            # A number of steps would win over the epochs.
            more = {"max_train_steps": 0} if key == "epochs" else {}
            app_state.projects.edit(**{key: parsed(key, raw)}, **more)
        # A ValidationError among them.
        except ValueError:
            app_state.projects.refuse(key, str(raw))
        app_state.replan(self.ctx.language)

    def paint(self, snap: Snapshot) -> Updates:
        """Labels, which tell who decided a value."""
        labels = self._labels(snap)
        return {component: gr.update(label=labels[key]) for key, component in self.inputs.items()}

    def fill(self, snap: Snapshot) -> Updates:
        """Labels and values; what can't be used stands in its field as it was typed."""
        updates, labels = {}, self._labels(snap)
        for key, component in self.inputs.items():
            value = shown(key, getattr(snap.config, key))
            if (raw := snap.project.invalid.get(key)) is not None:
                # A number field shows numbers only.
                with contextlib.suppress(ValueError):
                    value = float(raw) if isinstance(component, gr.Number) else raw
            updates[component] = gr.update(value=value, label=labels[key])
        return updates

    def _labels(self, snap: Snapshot) -> dict[str, str]:
        sources = snap.project.sources()
        if snap.config.max_train_steps:
            sources = {**sources, "epochs": "unused"}
        return {key: label(self.ctx, key) + (f" · {self.ctx.tr(f'source_{sources[key]}')}"
                                             if sources.get(key) else "") for key in self.inputs}


def keys_of(level: str) -> list[str]:
    """Config keys of a level: basic | advanced | expert."""
    return [key for key in TrainConfig.model_fields
            if _extra(key)["level"] == level and key not in ELSEWHERE]


def label(ctx: Context, key: str) -> str:
    """A setting's name with its unit."""
    unit, name = _extra(key).get("unit", ""), ctx.tr(f"config_help.{key}")
    return f"{name} ({ctx.tr(f'unit_{unit}')})" if unit else name


def problems(ctx: Context, snap: Snapshot) -> list[str]:
    """A sentence for each field whose text can't be used."""
    return [ctx.tr("bad_value", label=label(ctx, key), value=raw, range=_range(ctx, key))
            for key, raw in snap.project.invalid.items() if key in TrainConfig.model_fields]


def error_text(ctx: Context, error: ValidationError | UserError) -> str:
    """A config that can't be used, in one sentence of the page's language."""
    if isinstance(error, UserError):
        return ctx.error_text(error)
    key, value = first_problem(error)[0], error.errors()[0].get("input")
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
    text = str(raw)
    if kind is list or (key == "target_modules" and "," in text):
        parts = text.splitlines() if kind is list else text.split(",")
        return [part.strip() for part in parts if part.strip()]
    return text.strip()


def shown(key: str, value: Any) -> Any:
    """What the config holds -> what the input shows."""
    # "name: value" in lines, which the config reads back.
    if isinstance(value, dict):
        return "\n".join(f"{name}: {json.dumps(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return ("\n" if _kind(key) is list else ", ").join(map(str, value))
    return value


def _input(ctx: Context, key: str) -> Any:
    settings: dict[str, Any] = {
        "label": label(ctx, key), "info": ctx.tr(f"config_help.{key}_help"),
        "elem_id": f"field-{key}", "interactive": True, "min_width": 120}
    kind = _kind(key)
    choice = _choice(key)
    if kind is bool:
        return gr.Checkbox(**settings)
    if choice or key in CHOICES:
        return gr.Dropdown(
            list(get_args(choice)) or CHOICES[key],
            allow_custom_value=choice is not TrainConfig.model_fields[key].annotation, **settings)
    if kind in (int, float):
        return gr.Number(precision=0 if kind is int else None, **settings)
    many = kind in (list, dict)
    return gr.Textbox(lines=2 if many else 1, max_lines=8 if many else 1, **settings)


def _kind(key: str) -> Any:
    """bool | int | float | list | dict | str | Literal"""
    kind = TrainConfig.model_fields[key].annotation
    if _choice(key) is not None:
        return Literal
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(member for member in reversed(get_args(kind)) if member is not type(None))
    return get_origin(kind) or kind


def _choice(key: str) -> Any:
    """The Literal of a key, alone or beside own values; None: it has none."""
    kind = TrainConfig.model_fields[key].annotation
    return next((member for member in (kind, *get_args(kind)) if get_origin(member) is Literal),
                None)


def _range(ctx: Context, key: str) -> str:
    """What a setting takes, in words."""
    if key in ("max_resolution", "sample_size"):
        return ctx.tr("range_size")
    about = TrainConfig.model_fields[key]
    if names := [name for name in get_args(about.annotation) if isinstance(name, str)]:
        return ctx.tr("one_of", names=", ".join(names))
    return ctx.tr("comma").join(
        ctx.tr(LIMITS[name], value=f"{value:g}") for limit in about.metadata for name in LIMITS
        if (value := getattr(limit, name, None)) is not None)


def _extra(key: str) -> dict[str, Any]:
    extra = TrainConfig.model_fields[key].json_schema_extra
    return extra if isinstance(extra, dict) else {}
