"""A job for the tests of the job system, and a worker that runs it: `trigger_word` says what it
does, `epochs` how many steps of 20 ms it makes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from core.errors import Fix, UserError
from core.jobs import worker
from core.jobs.events import Checkpoint, Note, Phase, Sample, Step

IMPORTED = time.time()
STEP_S = 0.02
if __name__ != "__main__":
    home = Path(os.environ["DARKROOM_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    (home / f"imported-{os.getpid()}").touch()


def train(config, emit, control):
    what, total = config.trigger_word, config.epochs
    emit(Note(key="imported", params={"at": IMPORTED}))
    emit(Phase(name="train", total=total))
    for step in range(1, total + 1):
        time.sleep(STEP_S)
        emit(Step(step=step, total=total, epoch=step / total, loss=1 / step, lr=1e-4,
                  steps_per_s=1 / STEP_S, eta_s=(total - step) * STEP_S))
        if step == 2:
            _misbehave(what, config)
        if control.take("sample"):
            emit(Sample(step=step, path=f"{step}.png", prompt="a cat", seed=1))
        if control.take("save"):
            emit(Checkpoint(step=step, path=f"{step}.ckpt"))
        control.wait_while_paused(0.02)
        if control.stopping and what != "deaf":
            if what == "slow":              # a large checkpoint on a slow disk
                time.sleep(60)
            if what == "saving":            # longer than a look, shorter than the grace
                time.sleep(0.7)
            emit(Checkpoint(step=step, path="last.ckpt"))
            return {"state": "stopped", "cwd": os.getcwd()}
    emit(Checkpoint(step=total, path="final.safetensors", final=True))
    return {"lora": "final.safetensors", "cwd": os.getcwd()}


def _misbehave(what, config):
    match what:
        case "fault":
            raise UserError("config.missing", file=Path("画/no.yaml"), folder=Path("/x"),
                            fixes=[Fix("smaller", {"lora_rank": 4})])
        case "crash":
            raise ValueError("first line\nsecond line")
        case "exit":
            sys.exit("no way")
        case "memory":
            raise MemoryError
        case "disk":
            raise OSError(28, "No space left on device", "/full/disk.bin")
        case "permission":
            raise PermissionError(13, "Permission denied", "/locked/secret")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "quit":
            os._exit(7)
        case "print":
            print("你好 from the job")
            os.system("echo said by a child")
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
            Path(config.output_dir).write_text(str(child.pid))
            time.sleep(99)
        case "linger":
            threading.Thread(target=time.sleep, args=(99,)).start()


if __name__ == "__main__":
    worker.JOBS["train"] = worker.JOBS["train"]._replace(run="fake_job:train")
    sys.exit(worker.main(sys.argv[1:]))
