"""What all readers of other trainers' configs share: taking, checking, leaving a key."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from core import i18n
from core.config import TrainConfig
from core.config import other_names as tables
from core.families.registry import SPECS
from core.families.spec import FamilySpec
from core.importers import lines
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

    def sentence(self, lang: str | None = None) -> str:
        value = " ".join(str(self.value).split())
        return i18n.tr("config_import.left", {
            "file": self.file.name, "line": self.line, "key": self.key,
            "value": value if len(value) <= 60 else f"{value[:57]}...",
            "why": i18n.tr(f"config_import.why_{self.why}", lang=lang)}, lang)


@dataclass(slots=True)
class Imported:
    """The settings of a file in our keys. Each value has passed TrainConfig by itself."""

    file: Path
    kind: str                              # kohya | kohya dataset | kohya_ss | OneTrainer
    values: dict[str, Any] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    assumed: dict[str, Any] = field(default_factory=dict)    # the other trainer's defaults


def plain(value: Any) -> str:
    """A word without case and signs: trainers spell the same choice in many ways."""
    return re.sub(r"[^a-z0-9+]", "", str(value).lower())


def is_off(value: Any) -> bool:
    """Whether an option is off, so that nothing is lost without it."""
    return value in (0, False) or plain(value) in ("0", "none", "never", "off", "no", "false")


def absent(value: Any) -> bool:
    return value is None or value in ("", [], {})


class Reader:
    """Goes through the entries of a file. Each is taken by a method, taken by a table, or left.

    A method `take_network_dim(value, entry)` takes the key `network_dim`; `__` stands for a dot."""

    table: Mapping[str, str] = OURS                             # their key -> ours
    choices: Mapping[str, tuple[str, Mapping[str, str]]] = {}   # -> ours, their words -> ours
    switches: Mapping[str, tuple[str, Any]] = {}                # -> ours, its value if theirs is on
    defaults: Mapping[str, tuple[str, Any]] = {}                # -> ours, its value if left out
    # their switch, its values as a pattern, the keys that act with these alone
    act_with: Sequence[tuple[str, str, tuple[str, ...]]] = ()

    def __init__(self, path: Path, kind: str) -> None:
        self.result = Imported(path, kind)
        self.theirs: dict[str, Any] = {}        # values by the other trainer's keys
        self.spec: FamilySpec | None = None     # of the family that the file names
        self.special: dict[str, Callable[[Any, Entry], None]] = {
            name.removeprefix("take_").replace("__", "."): getattr(self, name)
            for name in dir(self) if name.startswith("take_")}

    def take(self, data: Mapping[str, Any], line_of: Lines) -> Imported:
        entries = [entry for entry in self.entries(data, line_of) if not absent(entry.value)]
        # all of them first: what a key means may depend on a later one
        self.theirs = {self.name(entry): entry.value for entry in entries}
        for entry in entries:
            self.dispatch(self.name(entry), entry)
        self.finish()
        return self.result

    def entries(self, data: Mapping[str, Any], line_of: Lines) -> Iterable[Entry]:
        return lines.entries(data, line_of)

    def name(self, entry: Entry) -> str:
        return entry.name

    def dispatch(self, name: str, entry: Entry) -> None:
        if not self.acts(name) or (name in tables.ZERO_IS_OFF and is_off(entry.value)):
            return
        if method := self.special.get(name):
            method(entry.value, entry)
        elif choice := self.choices.get(name):
            self.choose(*choice, entry)
        elif switch := self.switches.get(name):
            if entry.value:
                self.put(*switch, entry)
        elif name in self.table or self.table is OURS:
            self.put(self.table.get(name, name), entry.value, entry)
        elif name in tables.EPOCHS:
            self.leave(entry, "epochs")
        elif not is_off(entry.value) and tables.NEUTRAL.get(name) != entry.value:
            self.leave(entry, "by_itself" if name.split(".")[0] in tables.BY_ITSELF else "unknown")

    def acts(self, name: str) -> bool:
        """Whether the other trainer reads a key, with its switches as they stand in the file."""
        return all(re.search(values, plain(self.theirs[switch]))
                   for switch, values, names in self.act_with
                   if name in names and switch in self.theirs)

    def put(self, key: str, value: Any, entry: Entry) -> None:
        """Our key, if TrainConfig has it and takes the value; else the entry is left."""
        if key not in TrainConfig.model_fields:
            if value not in (0, False):
                self.leave(entry, "no_key")
            return
        try:
            self.result.values[key] = getattr(TrainConfig.model_validate({key: value}), key)
        except (ValidationError, TypeError) as error:
            # "data\new" in double quotes
            escaped = isinstance(error, ValidationError) and error.errors()[0]["type"] == "path"
            self.leave(entry, "backslashes" if escaped else "value")

    def choose(self, key: str, choices: Mapping[str, str], entry: Entry) -> None:
        """Our key with our word for their value, where `choices` has one."""
        if ours := choices.get(plain(entry.value)):
            self.put(key, ours, entry)
        else:
            self.leave(entry, "value")

    def leave(self, entry: Entry, why: str) -> None:
        self.result.left.append(Left(self.result.file, entry.line, entry.name, entry.value, why))

    def assume(self, name: str) -> None:
        """Sets our key to the other trainer's default where the file lacks its key `name`."""
        key, value = self.defaults[name]
        if name not in self.theirs:
            self.result.values[key] = self.result.assumed[name] = value

    def include(self, inner: Imported) -> None:
        """Adds what another file, or a part of this one, has told."""
        self.result.values |= inner.values
        self.result.left += inner.left

    def prompts(self, shots: Sequence[Mapping[str, Any]], entry: Entry) -> None:
        """Previews by our keys (prompt, sample_size ...). What isn't the same in all is left."""
        self.put("sample_prompts", [shot["prompt"] for shot in shots if shot["prompt"]], entry)
        for key in dict.fromkeys(key for shot in shots for key in shot):
            values = [shot.get(key) for shot in shots]
            if key in TrainConfig.model_fields and values.count(values[0]) == len(values):
                self.put(key, values[0], entry)
            elif key != "prompt":
                self.leave(entry, "prompt_options")
                return

    def family(self, value: Any, entry: Entry) -> None:
        # no key is set: the base itself tells its family
        self.spec = next((spec for spec in SPECS.values() if plain(value) in spec.trainer_names),
                         None)
        if self.spec is None:
            self.leave(entry, "family")

    def warm_up(self, value: Any, entry: Entry) -> None:
        """Steps, or a share of them (below 1), which needs their number."""
        steps = self.result.values.get("max_train_steps", 0)
        if isinstance(value, int | float) and 0 < value < 1:
            if not steps:
                return self.leave(entry, "share")
            value = round(value * steps)
        self.put("lr_warmup_steps", value, entry)

    def finish(self) -> None:
        """Called after the last entry."""

    def read_with_another_key(self, value: Any, entry: Entry) -> None:
        """For keys that the method of another key reads from `theirs`."""


def number(value: Any) -> float:
    """A number, also one that is text; 0 where it is none, or infinite."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return result if math.isfinite(result) else 0.0
