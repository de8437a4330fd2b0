#!/bin/sh
# A double click starts LoRA Darkroom; its words stay readable if it fails.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
fits=
for python in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then fits=$python; break; fi
done
if [ -n "$fits" ]; then
    "$fits" "$here/launcher.py" "$@"
    code=$?
else
    printf '%s\n' 'LoRA Darkroom needs Python 3.11 or newer: https://www.python.org/downloads/' 'LoRA Darkroom 需要 Python 3.11 或更新版本：https://www.python.org/downloads/' >&2
    code=2
fi
if [ "$code" -ne 0 ] && [ "$code" -ne 130 ] && [ -t 0 ]; then
    printf '⏎ '
    read -r _
fi
exit "$code"
