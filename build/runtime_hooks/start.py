"""The frozen app's first lines, before any import of ours."""

import os
import sys

# The loader has read its path by now; the system's programs (a browser, a file manager) must not
# get our libraries, and a process of our own starts as if it were the first.
if sys.platform.startswith("linux"):
    before = os.environ.pop("LD_LIBRARY_PATH_ORIG", None)
    os.environ.pop("LD_LIBRARY_PATH", None)
    if before is not None:
        os.environ["LD_LIBRARY_PATH"] = before
os.environ["PYINSTALLER_RESET_ENVIRONMENT"] = "1"

if sys.stdout is None or sys.stderr is None:        # a program without a console
    from core.system.logs import to_file
    to_file()
