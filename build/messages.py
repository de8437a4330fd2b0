"""The messages of bootstrap.py and its neighbours, which run before the packages are installed.

Standard library only, and readable by Python 3.8. Texts: core/strings/<language>/bootstrap.yaml,
one `key: "JSON string"` a line.
"""

from __future__ import annotations

import json
import locale
import os
import sys
from pathlib import Path


class Stop(Exception):
    """Ends the program with a sentence for the user and an exit code."""

    def __init__(self, key: str, exit_code: int = 1, **params: object) -> None:
        super().__init__(tr(key, **params))
        self.key, self.exit_code, self.params = key, exit_code, params


def tr(key: str, **params: object) -> str:
    return texts(language())[key].format(**params)


def tell(key: str, **params: object) -> None:
    print(tr(key, **params), file=sys.stderr, flush=True)


def texts(lang: str) -> dict[str, str]:
    """Reads bootstrap.yaml without a YAML library, which comes with the packages."""
    path = Path(__file__).resolve().parent.parent / "core" / "strings" / lang / "bootstrap.yaml"
    lines = (line.split(": ", 1) for line in path.read_text("utf-8").splitlines() if line)
    return {key: json.loads(text) for key, text in lines}


def language() -> str:
    """Like core.i18n.language, which needs a package."""
    name = os.environ.get("DARKROOM_LANG") or locale.getlocale()[0] or ""
    return "zh-CN" if name.lower().startswith(("zh", "chinese")) else "en"
