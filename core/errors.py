"""Faults: what can go wrong, as a code with parameters; core/i18n.py makes the sentence of it.

`UserError` is the one exception that users meet. A code is `<subject>.<what>` and has its sentence
in core/strings/<language>/<subject>.yaml; `fixes` are changes a caller can apply ("retry with").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from core import i18n


@dataclass(frozen=True, slots=True)
class Fix:
    """One change that mends a fault: config keys and their new values."""

    key: str                        # its label: a key of strings/<language>/fixes.yaml
    changes: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)            # of the label


class UserError(Exception):
    """An expected failure, said in one sentence: what is wrong, where, what to do."""

    def __init__(self, code: str, /, *, fixes: Iterable[Fix] = (), **params: Any) -> None:
        super().__init__(code, params)
        self.code = code
        self.params = params
        self.fixes = tuple(fixes)

    def __str__(self) -> str:
        return i18n.tr(self.code, self.params)
