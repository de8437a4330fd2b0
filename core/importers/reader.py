"""What all readers of other trainers' configs share: taking, checking, leaving a key."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from core import i18n
from core.config import TrainConfig
from core.families.registry import SPECS
from core.importers import lines, tables
from core.importers.lines import Entry, Lines

OURS: dict[str, str] = {}                  # the table of our own keys: every key means itself


@dataclass(frozen=True, slots=True)
class Left:
    """One key that could not be carried over."""

    file: Path
    line: int
    key: str
    value: Any
    why: str                               # config_import.why_{why}

    def said(self, lang: str | None = None) -> str:
        return i18n.tr("config_import.left", {
            "file": self.file.name, "line": self.line, "key": self.key,
            "value": _short(self.value),
            "why": i18n.tr(f"config_import.why_{self.why}", lang=lang)}, lang)


@dataclass(slots=True)
class Imported:
    """What a file says in our keys. Values have passed TrainConfig, one by one."""

    file: Path
    kind: str                              # kohya | kohya dataset | kohya_ss | OneTrainer
    values: dict[str, Any] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    assumed: dict[str, Any] = field(default_factory=dict)    # the other trainer's defaults


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain(value: Any) -> str:
    return re.sub(r"[^a-z0-9+]", "", str(value).lower())


def absent(value: Any) -> bool:
    return value is None or value in ("", [], {})


class Reader:
    """Goes through the entries; each is either taken by a method, by the table, or left."""

    table: Mapping[str, str] = OURS

    def __init__(self, path: Path, kind: str) -> None:
        self.result = Imported(path, kind)
        self.found: dict[str, Any] = {}
        self.special: dict[str, Callable[[Any, Entry], None]] = {
            name.removeprefix("take_").replace("__", "."): getattr(self, name)
            for name in dir(self) if name.startswith("take_")}

    def take(self, data: Mapping[str, Any], at: Lines) -> Imported:
        all_ = list(self.entries(data, at))
        self.found = {self.name(entry): entry.value for entry in all_ if not absent(entry.value)}
        for entry in all_:
            if not absent(entry.value):
                self.one(self.name(entry), entry)
        self.finish()
        return self.result

    def entries(self, data: Mapping[str, Any], at: Lines) -> Iterable[Entry]:
        return lines.entries(data, at)

    def name(self, entry: Entry) -> str:
        return entry.name

    def one(self, name: str, entry: Entry) -> None:
        method = self.special.get(name)
        if method is not None:
            method(entry.value, entry)
        elif name in self.table or self.table is OURS:
            self.put(self.table.get(name, name), entry.value, entry)
        elif name in tables.EPOCHS:
            self.leave(entry, "epochs")
        elif entry.value not in (0, False) and entry.value != "0":
            self.leave(entry, "by_itself" if name.split(".")[0] in tables.BY_ITSELF else "unknown")

    def put(self, key: str, value: Any, entry: Entry, why: str = "value") -> None:
        """Our key, if TrainConfig has it and takes the value; else the entry is left."""
        if key not in TrainConfig.model_fields:
            if value not in (0, False):
                self.leave(entry, "no_key")
        elif _fits(key, value):
            self.result.values[key] = getattr(TrainConfig.model_validate({key: value}), key)
        else:
            self.leave(entry, why)

    def choose(self, key: str, among: Mapping[str, str], value: Any, entry: Entry) -> None:
        if ours := among.get(plain(value)):
            self.put(key, ours, entry)
        else:
            self.leave(entry, "value")

    def leave(self, entry: Entry, why: str) -> None:
        self.result.left.append(Left(self.result.file, entry.line, entry.name, entry.value, why))

    def assume(self, name: str, key: str, value: Any) -> None:
        if name not in self.found:
            self.result.values[key] = self.result.assumed[name] = value

    def family(self, value: Any, entry: Entry) -> None:
        if not any(plain(value) in one.trainer_names for one in SPECS.values()):
            self.leave(entry, "family")

    def warm_up(self, value: Any, entry: Entry) -> None:
        """Steps, or a share of them (below 1), which needs their number."""
        steps = self.result.values.get("max_train_steps", 0)
        if isinstance(value, int | float) and 0 < value < 1:
            if not steps:
                return self.leave(entry, "share")
            value = round(value * steps)
        self.put("lr_warmup_steps", value, entry)

    def finish(self) -> None: ...


def _fits(key: str, value: Any) -> bool:
    try:
        TrainConfig.model_validate({key: value})
    except (ValidationError, TypeError):
        return False
    return True


def number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0
