"""What bootstrap.py and its neighbours say, before the packages are there.

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
    """A sentence for the user, and the exit code."""

    def __init__(self, key: str, exit_code: int = 1, **params: object) -> None:
        super().__init__(tr(key, **params))
        self.key, self.exit_code, self.params = key, exit_code, params


def tr(key: str, **params: object) -> str:
    return texts(language())[key].format(**params)


def tell(key: str, **params: object) -> None:
    print(tr(key, **params), file=sys.stderr, flush=True)


def texts(lang: str) -> dict[str, str]:
    """bootstrap.yaml without a YAML library: that comes with the packages."""
    path = Path(__file__).resolve().parent.parent / "core" / "strings" / lang / "bootstrap.yaml"
    lines = (line.split(": ", 1) for line in path.read_text("utf-8").splitlines() if line)
    return {key: json.loads(text) for key, text in lines}


def language() -> str:
    """As core.i18n.language, which needs a package."""
    wanted = os.environ.get("DARKROOM_LANG") or locale.getlocale()[0] or ""
    return "zh-CN" if wanted.lower().startswith(("zh", "chinese")) else "en"
