"""The planning child: real answers over its pipe, faults as answers, its client in the window."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from core import paths
from core.errors import UserError
from core.memory import service
from core.system import processes
from core.workspace import presets
from gui.state.dataset import Question
from gui.state.dataset_view import facts_of
from gui.state.plan_client import Planning
from tests.families.test_components import BASES, sparse

ROOT = Path(__file__).resolve().parents[2]


def demo(**config: object) -> dict[str, object]:
    return {"config": {"base_model": "demo", "train_data_dir": str(paths.DEMO / "pictures"),
                       "device": "cpu", **config}, "purpose": "style", "language": "zh-CN"}


def test_a_plan_with_its_suggestion() -> None:
    found = service.answer({**demo(epochs=3, batch_size=4), "suggest": True})
    assert found["pictures"] == 20
    assert found["updates"] == 15
    assert found["plan"]["needs_mb"] > 100
    assert found["verdict"] in ("fits", "tight", "too_big")
    assert found["suggestion"]["values"].keys() == found["suggestion"]["reasons"].keys()
    json.dumps(found)


def test_faults_are_answers(tmp_path: Path) -> None:
    missing = service.answer(demo(train_data_dir=str(tmp_path / "gone")))
    assert missing["pictures_fault"]["code"] == "dataset.folder_missing"
    assert "plan" in missing                        # the base alone can be planned
    assert service.answer(demo(base_model="/no/base"))["fault"]["code"] == "plan.no_base"
    assert service.answer({"config": {"lora_rank": -1}})["fault"]["code"] == "gui.plan_failed"


def test_one_line_in_one_line_out_and_noise_is_skipped() -> None:
    lines = ["no json", json.dumps({"config": {"epochs": 0}}),
             json.dumps(demo(base_model="/no/base"))]
    done = subprocess.run(processes.command("plan-service"), input="\n".join(lines) + "\n",
                          env=processes.environment(), text=True, timeout=120, capture_output=True)
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["fault"]["code"] == "gui.plan_failed"
    assert second["fault"]["code"] == "plan.no_base"


ECHO = """
import json, sys
for line in sys.stdin:
    question = json.loads(line)
    if question.get("die"): sys.exit(3)
    print(json.dumps({"echo": question["n"], "suggested": question["suggest"]}), flush=True)
"""


def test_the_newest_question_wins_and_a_dead_child_is_replaced() -> None:
    planning = Planning([sys.executable, "-c", ECHO])
    try:
        for n in range(50):
            planning.ask({"n": n})
        found = planning.wait(20)
        assert found.answer["echo"] == 49
        planning.ask({"n": 1, "die": True})
        found = planning.wait(20)
        assert found.answer["fault"]["code"] == "gui.no_plan"
        planning.ask({"n": 2})
        assert planning.wait(20).answer["echo"] == 2
    finally:
        planning.close()


def test_closing_ends_the_child() -> None:
    planning = Planning([sys.executable, "-c", ECHO])
    planning.ask({"n": 1})
    planning.wait(20)
    child = planning._child
    planning.close()
    assert child is not None
    assert child.wait(10) is not None
    assert not planning._thread.is_alive()


@pytest.mark.skipif(os.name == "nt", reason="hands a pipe's end on")
def test_a_child_whose_window_was_killed_leaves(tmp_path: Path) -> None:
    """Even one that isn't reading: its stdin stays open here."""
    code = ("import subprocess, sys, time\n"
            "child = subprocess.Popen(sys.argv[1:], start_new_session=True)\n"
            "print(child.pid, flush=True)\ntime.sleep(100)")
    reader, writer = os.pipe()
    window = subprocess.Popen([sys.executable, "-c", code, *processes.command("plan-service")],
                              stdin=reader, stdout=subprocess.PIPE, text=True,
                              env=processes.environment())
    try:
        assert window.stdout is not None
        child = psutil.Process(int(window.stdout.readline()))
        os.write(writer, b'{"config": {"epochs": 0}}\n')
        assert "fault" in window.stdout.readline()      # the child's own answer
        window.kill()
        window.wait()
        assert not psutil.wait_procs([child], timeout=60)[1]
    finally:
        window.kill()
        os.close(reader)
        os.close(writer)


@pytest.mark.thorough
def test_a_family_that_the_user_names_counts_everywhere(tmp_path: Path) -> None:
    """A file that is called like what can't be trained, of a user who knows better."""
    file = sparse(tmp_path / "my_kontext_merge.safetensors", BASES["flux"])
    with pytest.raises(UserError) as caught:
        presets.family_of(str(file))
    assert caught.value.code == "families.by_name"
    said = caught.value.fixes[0].changes
    assert said == {"family": "flux"}
    assert presets.family_of(str(file), family="flux") == "flux"
    with pytest.raises(UserError):                      # but it isn't believed to be anything
        presets.family_of(str(file), family="zimage")
    asked = Question(str(tmp_path), "", str(file), tuple(said.items()), "style")
    facts = facts_of(asked)
    assert (facts.token_limit, facts.base) == (511, file.name)
    found = service.answer({"config": {"base_model": str(file), "device": "cpu", **said}})
    assert "fault" not in found
    assert found["plan"]["needs_mb"] > 10_000
