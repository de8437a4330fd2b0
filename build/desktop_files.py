"""Writes the files that start LoRA Darkroom from its source by a double click: `.bat` on Windows,
`.command` on macOS, `.desktop` on Linux. They find their checkout by their own place; only the
`.desktop` file must name it.

    python3 build/desktop_files.py [FOLDER] [--all] [--menu]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "LoRA Darkroom"
SUFFIXES = {"win32": ".bat", "darwin": ".command", "linux": ".desktop"}
NO_PYTHON = ("LoRA Darkroom needs Python 3.11 or newer: https://www.python.org/downloads/",
             "LoRA Darkroom 需要 Python 3.11 或更新版本：https://www.python.org/downloads/")
FITS = "import sys; sys.exit(sys.version_info < (3, 11))"
PYTHONS = ("python3", *(f"python3.{minor}" for minor in range(14, 10, -1)), "python")

SHELL = f"""#!/bin/sh
# A double click starts LoRA Darkroom; its words stay readable if it fails.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
fits=
for python in {" ".join(PYTHONS)}; do
    if "$python" -c '{FITS}' 2>/dev/null; then fits=$python; break; fi
done
if [ -n "$fits" ]; then
    "$fits" "$here/launcher.py" "$@"
    code=$?
else
    printf '%s\\n' '{NO_PYTHON[0]}' '{NO_PYTHON[1]}' >&2
    code=2
fi
if [ "$code" -ne 0 ] && [ "$code" -ne 130 ] && [ -t 0 ]; then
    printf '⏎ '
    read -r _
fi
exit "$code"
"""

# cmd reads this file in the code page that chcp sets; labels and blocks would break on it.
BATCH = f"""@echo off
rem A double click starts LoRA Darkroom; its words stay readable if it fails.
chcp 65001 >nul
setlocal DisableDelayedExpansion
set "PYTHON="
python -c "{FITS}" >nul 2>nul && set "PYTHON=python"
py -3 -c "{FITS}" >nul 2>nul && set "PYTHON=py -3"
if not defined PYTHON echo {NO_PYTHON[0]}
if not defined PYTHON echo {NO_PYTHON[1]}
if not defined PYTHON pause
if not defined PYTHON exit /b 2
%PYTHON% "%~dp0launcher.py" %*
if errorlevel 1 pause
""".replace("\n", "\r\n")


def write(folder: Path = ROOT, system: str = sys.platform, checkout: Path = ROOT) -> list[Path]:
    """Writes, or overwrites, the files for a system (sys.platform) in `folder`. The `.desktop` file
    starts the checkout's own script, which is written too."""
    suffix = SUFFIXES.get(system, ".desktop")
    written = [folder / f"{NAME}{suffix}"]
    if suffix == ".desktop":
        written += write(checkout, "darwin")
        content = desktop_entry(checkout)
    else:
        content = {".bat": BATCH, ".command": SHELL}[suffix]
    folder.mkdir(parents=True, exist_ok=True)
    written[0].write_bytes(content.encode("utf-8"))
    # Desktops start only files that may be executed.
    written[0].chmod(0o755)
    return written


def desktop_entry(checkout: Path) -> str:
    """Desktop Entry Specification 1.5. The terminal shows the installation at the first start."""
    script = checkout / f"{NAME}.command"
    return "\n".join((
        "[Desktop Entry]", "Type=Application", "Version=1.5", f"Name={NAME}",
        "Comment=Train LoRAs from a folder of pictures", "Comment[zh_CN]=用一个图片文件夹训练 LoRA",
        f"Exec=/bin/sh {_escaped(_quoted(str(script)))}",
        f"Icon={_escaped(str(checkout / 'gui' / 'assets' / 'icon.svg'))}",
        "Terminal=true", "Categories=Graphics;", "StartupNotify=false", ""))


def _quoted(argument: str) -> str:
    """Quotes an argument of Exec by the specification's rules; a % would start a field code."""
    if any(letter in argument for letter in "\n\r\0"):
        raise SystemExit(f"{argument!r}: no desktop entry can name a path with line breaks")
    for letter in ("\\", '"', "`", "$"):
        argument = argument.replace(letter, "\\" + letter)
    return '"' + argument.replace("%", "%%") + '"'


def _escaped(value: str) -> str:
    """Escapes the value of a key, as its backslashes are read twice."""
    return value.replace("\\", "\\\\")


def menu() -> Path:
    """The folder where menus of programs look on Linux."""
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "applications"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--all", action="store_true", help="for all three systems")
    parser.add_argument("--menu", action="store_true", help="into Linux' menu of programs")
    options = parser.parse_args()
    folder = menu() if options.menu else options.folder
    paths = [path for system in (SUFFIXES if options.all else [sys.platform])
             for path in write(folder, system)]
    # The .command file is written for Linux and for macOS.
    print(*dict.fromkeys(paths), sep="\n")


if __name__ == "__main__":
    main()
