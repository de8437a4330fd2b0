"""The job system, with real worker processes that run tests/fake_job.py."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import i18n
from core.config import TrainConfig
from core.errors import Fix, UserError
from core.jobs import runs, worker
from core.jobs.control import Control
from core.jobs.events import (
    Captioned,
    Checkpoint,
    Faulted,
    JobEnded,
    JobStarted,
    Note,
    Phase,
    Sample,
    Step,
)
from core.jobs.journal import CONFIG, EVENTS, LOG, Journal, read
from core.jobs.manager import JobManager
from core.jobs.runs import JobView, fold, list_runs, load_run

HERE = Path(__file__).parents[1]
ROOT = HERE.parent
COMMAND = [sys.executable, str(HERE / "fake_job.py")]
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home 家"))
    monkeypatch.setenv("DARKROOM_LANG", "en")
    yield tmp_path
    for view in list_runs():                      # a failed test leaves no process behind
        owner = runs.owner_of(view.folder)
        if owner and owner.dedicated and (process := runs.process_of(owner)):
            worker.kill_tree(process)


@pytest.fixture
def make():
    """Managers with short times, closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(JobManager(
            **{"command": COMMAND, "poll_s": 0.05, "grace_s": 0.6, "term_s": 0.3} | options))


@pytest.fixture
def manager(make):
    return make()


@pytest.fixture
def fake(monkeypatch):
    """The fake job in this process."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setitem(worker.JOBS, "train", worker.JOBS["train"]._replace(run="fake_job:train"))


def config(what="", steps=5, **fields):
    return TrainConfig(trigger_word=what, epochs=steps, output_dir=fields.pop("out", "out"),
                       **fields)


def until(condition, timeout=15.0):
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
    return found


def running(manager, run_id, step=1):
    return until(lambda: (v := manager.view(run_id)).step >= step and v)


# --- ends ---

def test_a_run_from_start_to_end(manager):
    run_id = manager.start(config("print", 5), name="水墨 Style")
    assert manager.view(run_id).state in ("queued", "starting")
    view = manager.wait(run_id, 20)
    assert (view.state, view.step, view.total, view.epoch) == ("done", 5, 5, 1.0)
    assert view.name == "水墨 Style"
    assert view.losses == tuple((step, 1 / step) for step in range(1, 6))
    assert view.checkpoints[-1].final
    assert view.result["lora"] == "final.safetensors"
    assert view.config["epochs"] == 5
    assert view.created <= view.started <= view.ended
    assert Path(view.output_dir) == Path.cwd() / "out"
    assert view.pid not in (0, os.getpid())
    assert load_run(run_id).losses == view.losses
    log = runs.log_tail(run_id)
    assert "你好 from the job" in log
    assert "said by a child" in log
    assert (view.folder / CONFIG).exists()
    until(lambda: not psutil.pid_exists(view.pid))


@pytest.mark.parametrize(("what", "code", "text"), [
    ("fault", "config.missing", "There is no config file 画/no.yaml"),
    ("crash", "jobs.crash", "unexpected error: ValueError: first line second line"),
    ("exit", "jobs.crash", "SystemExit: no way"),
    ("memory", "jobs.out_of_memory", "memory ran out"),
    ("disk", "jobs.disk_full", "/full/disk.bin could not be written"),
    ("permission", "jobs.no_permission", "No permission for /locked/secret"),
])
def test_what_a_job_raises_becomes_a_fault(fake, what, code, text):
    folder = runs.create_run("train", "", what, queued=False)
    assert worker.run_job("train", config(what, 9), folder, Control()).state == "failed"
    view = load_run(folder.name)
    assert (view.state, view.step, view.fault.code) == ("failed", 2, code)
    assert text in i18n.tr(view.fault.code, view.fault.params)
    assert "Traceback" in view.fault.details


def test_a_fault_crosses_the_process(manager):
    view = manager.wait(manager.start(config("fault", 9)), 20)
    assert (view.state, view.step, view.fault.code) == ("failed", 2, "config.missing")
    assert view.fault.params == {"file": "画/no.yaml", "folder": "/x"}
    assert view.fault.fixes == [Fix("smaller", {"lora_rank": 4})]
    assert "Traceback" in (view.folder / LOG).read_text("utf-8")


@posix
@pytest.mark.parametrize(("what", "exit_code", "code", "text"), [
    ("kill", -9, "jobs.killed", "SIGKILL"),
    ("segfault", -11, "jobs.died", "SIGSEGV"),
    ("quit", 7, "jobs.died", "exit code 7"),
])
def test_a_worker_that_dies_without_a_word_is_interrupted(manager, what, exit_code, code, text):
    run_id = manager.start(config(what, 9))
    view = manager.wait(run_id, 20)
    assert (view.state, view.step, view.exit_code) == ("interrupted", 2, exit_code)
    assert view.fault.code == code
    assert text in i18n.tr(code, view.fault.params)
    assert read(view.folder)[-1].kind == "step"           # nobody else wrote into its journal
    assert load_run(run_id).exit_code == exit_code
    if what == "segfault":                                # the log tells where
        assert "Segmentation fault" in runs.log_tail(run_id)


def test_the_real_worker_command_runs(make):
    """The real command and the real job list, up to a config that it refuses."""
    folder = runs.create_run("train", "epoch: 3", "x")
    make(command=None)
    view = until(lambda: (v := load_run(folder.name)).over and v)
    assert (view.state, view.fault.code) == ("failed", "config.unknown_key")
    assert "did you mean `epochs`" in runs.log_tail(view.id).lower()


# --- requests ---

def test_stop_saves_and_ends(manager):
    run_id = manager.start(config(steps=2000))
    running(manager, run_id)
    manager.stop(run_id)
    assert manager.view(run_id).state == "stopping"
    view = manager.wait(run_id, 10)
    assert view.state == "stopped"
    assert view.checkpoints[-1].path == "last.ckpt"
    assert "jobs.stopping" in [note.key for note in view.notes]
    manager.stop(run_id)                                  # again: nothing happens
    assert manager.view(run_id) == view


def test_a_stop_leaves_time_to_save(make):
    manager = make(grace_s=30.0, term_s=30.0)
    run_id = manager.start(config("saving", steps=2000))
    running(manager, run_id)
    manager.stop(run_id)
    view = manager.wait(run_id, 20)
    assert (view.state, view.fault) == ("stopped", None)
    assert view.checkpoints[-1].path == "last.ckpt"


@posix
def test_stop_of_a_job_that_ignores_it_kills_its_whole_tree(manager, tmp_path):
    child_file = tmp_path / "child"
    run_id = manager.start(config("deaf", 2000, out=str(child_file)))
    child = psutil.Process(int(until(lambda: child_file.exists() and child_file.read_text())))
    began = time.monotonic()
    manager.stop(run_id)
    view = manager.wait(run_id, 60)
    assert time.monotonic() - began > 0.8                 # grace 0.6 s + 0.3 s
    assert (view.state, view.exit_code, view.fault.code) == ("interrupted", -9, "jobs.forced")
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    # and the queue goes on
    assert manager.wait(manager.start(config()), 20).state == "done"


def test_a_worker_that_hangs_after_its_end_is_helped_out(manager):
    run_id = manager.start(config("linger", 3))
    view = manager.wait(run_id, 20)
    assert view.state == "done"
    after = manager.wait(manager.start(config(steps=2)), 20)
    assert after.state == "done"
    assert not psutil.pid_exists(view.pid)                # its memory was free before the next
    assert manager.view(run_id).state == "done"


@posix
def test_sigterm_is_a_stop(manager):
    run_id = manager.start(config(steps=2000))
    os.kill(running(manager, run_id).pid, signal.SIGTERM)
    assert manager.wait(run_id, 10).state == "stopped"


def test_pause_and_go(manager):
    run_id = manager.start(config(steps=60))
    running(manager, run_id)
    manager.ask(run_id, "pause")
    until(lambda: manager.view(run_id).state == "paused")
    time.sleep(0.5)                                       # the step under way ends
    step = manager.view(run_id).step
    time.sleep(0.4)
    assert manager.view(run_id).step == step
    manager.ask(run_id, "go")
    view = manager.wait(run_id, 10)
    assert (view.state, view.step) == ("done", 60)


def test_a_paused_run_can_be_stopped(manager):
    run_id = manager.start(config(steps=2000))
    running(manager, run_id)
    manager.ask(run_id, "pause")
    until(lambda: manager.view(run_id).state == "paused")
    manager.stop(run_id)
    assert manager.wait(run_id, 10).state == "stopped"


def test_sample_and_save_now(manager):
    run_id = manager.start(config(steps=2000))
    running(manager, run_id)
    manager.ask(run_id, "sample")
    manager.ask(run_id, "save")
    view = until(lambda: (v := manager.view(run_id)).samples and v.checkpoints and v)
    assert (len(view.samples), len(view.checkpoints)) == (1, 1)
    runs.ask(run_id, "stop")                              # as the command line does
    assert manager.wait(run_id, 10).state == "stopped"


def test_requests_to_what_is_not_under_way_are_refused(manager):
    run_id = manager.start(config(steps=1))
    with pytest.raises(UserError, match="not over yet"):
        manager.resume(run_id)
    manager.wait(run_id, 20)
    for request in ("pause", "go", "sample", "save"):
        with pytest.raises(UserError, match="not under way"):
            manager.ask(run_id, request)
    with pytest.raises(UserError, match=run_id):
        manager.view(run_id[:-1] + "x")                   # the nearest id is told
    with pytest.raises(UserError, match="no run zzz"):
        load_run("zzz")
    with pytest.raises(UserError, match="no run"):
        load_run("../runs")


def test_resume_is_a_new_run_that_knows_the_old_one(manager, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = manager.start(config(steps=2000, learning_rate=3e-4), name="mine")
    running(manager, old)
    manager.stop(old)
    manager.wait(old, 10)
    monkeypatch.chdir("/")
    new = manager.resume(old)
    view = until(lambda: (v := manager.view(new)).started and v)
    assert new != old
    assert (view.resumed_from, view.name) == (old, "mine")
    assert view.config == load_run(old).config      # it had saved nothing of its own
    assert view.output_dir == load_run(old).output_dir == str(tmp_path / "out")
    manager.stop(new)
    view = manager.wait(new, 10)
    assert (view.state, view.result["cwd"]) == ("stopped", str(tmp_path))


# --- the queue ---

def test_one_at_a_time_in_order(manager):
    ids = [manager.start(config(steps=steps)) for steps in (50, 5, 5)]
    assert [view.id for view in manager.views()] == ids[::-1]
    assert [view.state for view in manager.views()][:2] == ["queued", "queued"]
    views = [manager.wait(run_id, 20) for run_id in ids]
    assert {view.state for view in views} == {"done"}
    for first, then in itertools.pairwise(views):
        assert first.ended <= then.started
    assert len({view.pid for view in views}) == 3


def test_a_queued_run_can_be_withdrawn(manager):
    first, second = manager.start(config(steps=2000)), manager.start(config())
    manager.stop(second)
    view = manager.view(second)
    assert (view.state, view.started, view.pid) == ("stopped", 0, 0)
    manager.stop(first)
    manager.wait(first, 10)
    time.sleep(0.3)
    assert manager.view(second) == view


def test_the_queue_outlives_its_manager(make):
    first = make()
    ids = [first.start(config(steps=30)) for _ in range(3)]
    running(first, ids[0])
    first.close()                                         # the run goes on
    assert [view.state for view in list_runs()] == ["queued", "queued", "running"]
    second = make()
    views = [second.wait(run_id, 20) for run_id in ids]
    assert [view.state for view in views] == ["done"] * 3
    assert views[0].ended <= views[1].started <= views[1].ended <= views[2].started


def test_two_managers_start_each_run_once(make):
    one, two = make(), make()
    ids = [(one, two)[i % 2].start(config(steps=2)) for i in range(4)]
    views = [until(lambda run_id=run_id: (v := load_run(run_id)).over and v) for run_id in ids]
    assert [view.state for view in views] == ["done"] * 4
    for view in views:
        assert [event.kind for event in read(view.folder)].count("started") == 1
    spans = sorted((view.started, view.ended) for view in views)
    assert all(first[1] <= then[0] for first, then in itertools.pairwise(spans))


def test_a_run_that_another_app_takes_at_the_last_moment_is_left_to_it(make):
    watcher = make(dispatch=False)
    run_id = watcher.start(config(steps=1))

    class Late(JobManager):
        def _queue_lock(self):
            runs.claim(load_run(run_id).folder)
            return super()._queue_lock()

    with Late(command=COMMAND, poll_s=0.05) as manager:
        until(lambda: manager.view(run_id).state == "starting")
        time.sleep(0.3)
        assert runs.owner_of(manager.view(run_id).folder).pid == os.getpid()
        assert not (manager.view(run_id).folder / LOG).exists()


def test_a_watching_manager_starts_nothing(make):
    watcher = make(dispatch=False)
    run_id = watcher.start(config())
    time.sleep(0.5)
    assert watcher.view(run_id).state == "queued"


def test_a_run_moves_up_and_stays_there(make):
    watcher = make(dispatch=False)
    ids = [watcher.start(config()) for _ in range(3)]
    watcher.move_up(ids[2])
    wanted = [ids[0], ids[2], ids[1]]
    assert [view.id for view in watcher.queue()] == wanted
    assert [view.id for view in make(dispatch=False).queue()] == wanted     # another window's too


@posix
def test_a_worker_that_cannot_start_is_a_fault(make):
    manager = make(command=["/no/such/program"])
    view = manager.wait(manager.start(config()), 10)
    assert (view.state, view.fault.code) == ("failed", "jobs.no_worker")


# --- a killed app ---

APP = f"""
import sys, time
from core.config.schema import TrainConfig
from core.jobs.manager import JobManager
if __name__ == "__main__":
    manager = JobManager(command={COMMAND!r}, poll_s=0.05)
    print(manager.start(TrainConfig(epochs=int(sys.argv[1]))), flush=True)
    time.sleep(99)
"""


def start_app(steps):
    app = subprocess.Popen([sys.executable, "-c", APP, str(steps)], stdout=subprocess.PIPE,
                           text=True, cwd=ROOT, start_new_session=True)
    return app, app.stdout.readline().strip()


@posix
def test_the_worker_outlives_a_killed_app_and_is_found_again(make):
    app, run_id = start_app(steps=2000)
    until(lambda: load_run(run_id).step >= 3)
    os.killpg(app.pid, signal.SIGKILL)                    # as when its terminal goes
    app.communicate()
    before = load_run(run_id)
    manager = make()
    view = running(manager, run_id, before.step + 5)      # it goes on and we see it
    assert (view.state, view.pid) == ("running", before.pid)
    manager.ask(run_id, "pause")
    until(lambda: manager.view(run_id).state == "paused")
    manager.stop(run_id)
    assert manager.wait(run_id, 10).state == "stopped"
    assert manager.view(run_id).checkpoints[-1].path == "last.ckpt"


@posix
def test_death_after_reattaching_is_seen(make):
    app, run_id = start_app(steps=2000)
    until(lambda: load_run(run_id).step >= 1)
    app.kill()
    app.communicate()
    manager = make()
    os.kill(running(manager, run_id).pid, signal.SIGKILL)
    view = manager.wait(run_id, 10)
    assert (view.state, view.fault.code) == ("interrupted", "jobs.lost")


def test_a_reused_pid_does_not_pass_for_the_worker():
    folder = runs.create_run("train", "", "x", queued=False)
    with Journal(folder) as journal:
        journal.append(JobStarted(job="train", pid=os.getpid(), config={}))
    assert load_run(folder.name).state == "starting"
    owner = runs.owner_of(folder)
    runs.write_owner(folder, runs.Owner(owner.pid, owner.create_time - 60))
    assert load_run(folder.name).state == "interrupted"


def test_a_run_whose_worker_file_is_gone_does_not_block_the_queue(manager):
    folder = runs.create_run("train", "", "x", queued=False)
    with Journal(folder) as journal:
        journal.append(JobStarted(job="train", pid=os.getpid(), config={}))
    (folder / runs.OWNER).unlink()
    assert manager.wait(manager.start(config(steps=1)), 20).state == "done"
    assert manager.view(folder.name).state == "interrupted"


def test_a_run_deleted_by_hand_leaves_the_list(manager):
    run_id = manager.start(config(steps=1))
    folder = manager.wait(run_id, 20).folder
    time.sleep(0.3)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    until(lambda: run_id not in [view.id for view in manager.views()])


# --- readers ---

def test_readers_see_one_consistent_history(manager):
    run_id = manager.start(config(steps=60))
    seen = [[], []]

    def read_all(views):
        while not views or not views[-1].over:
            views.append(manager.view(run_id))
            time.sleep(0.001)

    readers = [threading.Thread(target=read_all, args=(views,)) for views in seen]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(20)
    for views in seen:
        for view in views:
            assert view.step == (view.losses[-1][0] if view.losses else 0)
        steps = [view.step for view in views]
        assert steps == sorted(steps)
        assert len(set(steps)) > 10
    assert seen[0][-1] == seen[1][-1]


def test_an_idle_manager_changes_nothing(manager):
    manager.wait(manager.start(config(steps=1)), 20)
    time.sleep(0.5)
    version = manager.version
    time.sleep(0.5)
    assert manager.version == version


# --- the warm worker ---

def test_a_warm_worker_has_its_imports_done(manager, home):
    manager.warm()
    spare = manager._spare.pid
    manager.warm()                                        # one is enough
    assert manager._spare.pid == spare
    until((home / "home 家" / f"imported-{spare}").exists)
    asked = time.time()
    view = manager.wait(manager.start(config(steps=1)), 20)
    assert (view.state, view.pid) == ("done", spare)
    assert next(n for n in view.notes if n.key == "imported").params["at"] < asked
    assert "final.safetensors" in runs.log_tail(view.id)
    second = manager.wait(manager.start(config(steps=1)), 20)
    assert second.state == "done"
    assert second.pid != spare


def test_a_dead_spare_is_no_harm(manager):
    manager.warm()
    manager._spare.kill()
    assert manager.wait(manager.start(config(steps=1)), 20).state == "done"


@posix
def test_a_spare_ends_with_its_app(make):
    manager = make()
    manager.warm()
    spare = psutil.Process(manager._spare.pid)
    manager.close()
    until(lambda: not spare.is_running())


# --- the same code path without a process of its own ---

def test_run_job_in_this_process(fake):
    folder = runs.create_run("train", "", "direct", queued=False)
    heard, control = [], Control()
    thread = threading.Thread(target=lambda: worker.run_job(
        "train", config(steps=500), folder, control, heard.append))
    thread.start()
    until(lambda: load_run(folder.name).step >= 2)
    assert load_run(folder.name).state == "running"
    control.ask("pause")
    until(lambda: load_run(folder.name).state == "paused")
    runs.ask(folder.name, "stop")
    thread.join(10)
    view = load_run(folder.name)
    assert (view.state, view.pid) == ("stopped", os.getpid())
    assert heard == read(folder)
    assert heard[-1] == JobEnded(at=heard[-1].at, state="stopped", result=view.result)


def test_a_stop_before_the_first_step_is_a_stop(fake):
    folder = runs.create_run("train", "", "early", queued=False)
    control = Control()
    control.ask("stop")
    assert worker.run_job("train", config(steps=500), folder, control).state == "stopped"
    assert load_run(folder.name).step == 0


def test_an_unknown_job_is_a_fault():
    folder = runs.create_run("teleport", "", "x", queued=False)
    assert worker.run_job("teleport", config(), folder, Control()).state == "failed"
    assert load_run(folder.name).fault.code == "jobs.no_such_job"


def test_a_broken_config_is_a_fault():
    folder = runs.create_run("train", "epoch: 3", "x", queued=False)
    assert worker.run_job("train", None, folder, Control()).state == "failed"
    assert load_run(folder.name).fault.code == "config.unknown_key"


def test_a_full_disk_does_not_raise_from_run_job(monkeypatch):
    folder = runs.create_run("train", "", "x", queued=False)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "append", full)
    assert worker.run_job("train", config(), folder, Control()).state == "failed"


def test_other_managers_leave_a_run_of_this_process_alone(manager):
    """`darkroom train` runs in its own process; its end must not cost that process its life."""
    folder = runs.create_run("train", "", "cli", queued=False)
    until(lambda: [view.state for view in manager.views()] == ["starting"])
    run_id = manager.start(config(steps=1))
    time.sleep(0.3)
    assert manager.view(run_id).state == "queued"         # the GPU is taken
    with Journal(folder) as journal:
        journal.append(JobEnded(state="done"))
    assert manager.wait(run_id, 20).state == "done"       # and free again, though we live


# --- recognising what went wrong ---

def test_faults_are_told_apart():
    def code(error):
        return worker.faulted(error).code

    assert code(RuntimeError("CUDA out of memory. Tried to allocate")) == "jobs.out_of_gpu_memory"
    assert code(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")) \
        == "jobs.out_of_memory"
    assert code(RuntimeError("I/O error: No space left on device (os error 28)")) \
        == "jobs.disk_full"
    assert code(OSError(5, "Input/output error")) == "jobs.crash"
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = OSError(28, "No space left on device", "a.bin")
    assert worker.faulted(wrapped).params == {"file": "a.bin"}


@pytest.mark.parametrize(("batch", "accumulation", "then"), [(4, 1, (2, 2)), (3, 2, (1, 6))])
def test_memory_fixes_keep_the_effective_batch(batch, accumulation, then):
    settings = config(batch_size=batch, gradient_accumulation_steps=accumulation)
    smaller, lighter = worker.faulted(MemoryError(), settings).fixes
    assert tuple(smaller.changes.values()) == then
    assert settings.with_changes(**smaller.changes, **lighter.changes)


# --- fold ---

def step(number, loss=1.0):
    return Step(step=number, total=9, epoch=0.1, loss=loss, lr=1e-4, steps_per_s=2.0, eta_s=1.0,
                validation=loss)


events = st.one_of(
    st.builds(lambda n, loss: step(n, loss), st.integers(0, 10**6),
              st.none() | st.floats(allow_nan=True)),
    st.sampled_from([
        JobStarted(job="train", pid=1, config={"output_dir": "o"}), Phase(name="load"),
        Sample(step=1, path="a", prompt="", seed=0), Checkpoint(step=1, path="c"),
        Captioned(path="a", caption="b"), Note(key="jobs.paused"), Note(key="jobs.going"),
        Note(key="jobs.stopping"), Note(key="other"), Faulted(code="x"),
        JobEnded(state="done"), JobEnded(state="unheard of")]))


@given(st.lists(events, max_size=40))
def test_fold_never_fails_and_many_at_once_are_the_same(history):
    start = view = JobView(id="x", folder=Path("x"))
    for event in history:
        after = fold(view, event)
        assert after.updated == (view.updated if view.over else event.at)
        view = after
    assert runs.fold_all(start, history) == view
    assert start == JobView(id="x", folder=Path("x"))


def test_states_of_a_run():
    view = JobView(id="x", folder=Path("x"))
    states = []
    for event in (JobStarted(job="train", pid=1, config={}), Phase(name="load"),
                  Note(key="jobs.paused"), step(1), Note(key="jobs.going"), step(2),
                  Note(key="jobs.stopping"), step(3), JobEnded(state="stopped"), step(4)):
        view = fold(view, event)
        states.append(view.state)
    assert states == ["starting", "running", "paused", "paused", "running", "running", "stopping",
                      "stopping", "stopped", "stopped"]
    assert view.step == 3


def test_the_series_of_a_long_run_stays_short():
    view = runs.fold_all(JobView(id="x", folder=Path("x")),
                         [step(n, 100.0 if n == 777 else 1 / (n + 1)) for n in range(10_000)])
    assert len(view.losses) <= 2 * runs.POINTS
    assert view.losses[0] == (0, 1.0)
    assert (777, 100.0) in view.losses
    assert view.losses[-1][0] == 9999


def test_losses_that_are_no_numbers_are_no_points():
    view = JobView(id="x", folder=Path("x"))
    for n, loss in enumerate((0.5, float("nan"), float("inf"), 0.25)):
        view = fold(view, step(n, loss))
    assert view.losses == ((0, 0.5), (3, 0.25))


@pytest.mark.parametrize(("said", "state"), [
    ("done", "done"), ("stopped", "stopped"), ("failed", "failed"), ("a newer word", "failed")])
def test_an_end_that_nobody_knows_is_no_success(said, state):
    view = fold(JobView(id="x", folder=Path("x")), JobEnded(state=said))
    assert view.state == state
    assert fold(view, step(1, 0.5)) is view                 # nothing comes after the end


# --- rules of the code ---

def test_the_window_side_takes_no_torch():
    code = ("import sys, core.jobs.manager, core.jobs.journal, core.jobs.worker\n"
            "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
            "sys.exit(', '.join(heavy) or 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_code_has_its_sentence():
    keys = set()
    for path in (ROOT / "core/jobs").glob("*.py"):
        keys |= set(re.findall(r'"(jobs\.[a-z_]+)"', path.read_text("utf-8")))
    assert len(keys) > 12
    for language in i18n.LANGUAGES:
        assert keys <= i18n.catalogue(language).keys()


def test_owner_file_is_plain_json():
    folder = runs.create_run("train", "", "x", queued=False)
    owner = json.loads((folder / runs.OWNER).read_text("utf-8"))
    assert owner["pid"] == os.getpid()
    assert abs(owner["create_time"] - psutil.Process().create_time()) < 1
    assert (folder / EVENTS).exists() is False
