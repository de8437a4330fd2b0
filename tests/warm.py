"""A process that has imported the engine and forks for each order: real processes without the
seconds that imports take.

    with Warm() as warm:
        child = warm.start("print(sys.argv)", "a", "b")    # real Python, real pid
        child.kill(); child.wait()
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent


class Child:
    def __init__(self, warm: Warm, pid: int) -> None:
        self.warm, self.pid = warm, pid

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):       # it was quicker
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """-> exit code; below zero: the signal that ended it."""
        return int(self.warm.hear()["ended"])


class Warm:
    """One child at a time. `apart`: in a mount namespace of its own, where the system allows."""

    def __init__(self, apart: bool = False) -> None:
        ahead = ["unshare", "--mount"] if apart else []
        self._process = subprocess.Popen(
            [*ahead, sys.executable, "-P", __file__], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                 "TOKENIZERS_PARALLELISM": "false"})

    def start(self, code: str, *argv: str) -> Child:
        order = {"code": code, "argv": argv, "home": os.environ["DARKROOM_HOME"]}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Child(self, int(self.hear()["pid"]))

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the warm process is gone"
        found: dict[str, Any] = json.loads(line)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


def serve() -> None:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    import core.training.run  # noqa: F401 - all that a run imports, by way of it or on first use
    gc.collect()
    gc.freeze()                             # children needn't look through all modules each time
    for line in sys.stdin:
        order = json.loads(line)
        if not (pid := os.fork()):
            _obey(order)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(status)}), flush=True)


def _obey(order: dict[str, Any]) -> None:
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # stdout is the server's
        os.environ["DARKROOM_HOME"] = order["home"]
        sys.argv = ["warm", *order["argv"]]
        exec(compile(order["code"], "order", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    serve()
