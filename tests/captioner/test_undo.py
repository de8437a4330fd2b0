from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner.captions.store import Store
from captioner.captions.undo import Action, History, Outcome, state_dir
from core.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures(tmp_path / "pictures")


def pictures(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def edit(folder: Path, history: History | None = None, **wanted: str) -> Outcome:
    swaps = Store(folder).swaps({f"{name}.png": text for name, text in wanted.items()})
    return (history or History(folder)).carry_out(Action("edit"), swaps)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".png"}


def test_undo_and_redo_with_a_new_history_each_time(folder: Path) -> None:
    states = [files(folder)]
    for n in range(5):
        edit(folder, a=f"caption {n}", **({"b": f"other {n}"} if n % 2 else {}))
        states.append(files(folder))
    for state in reversed(states[:-1]):
        outcome = History(folder).undo()
        assert outcome is not None
        assert outcome.left == []
        assert files(folder) == state
    assert History(folder).undo() is None
    assert files(folder) == {}                              # files that came are gone
    for state in states[1:]:
        assert History(folder).redo() is not None
        assert files(folder) == state
    assert History(folder).redo() is None


def test_a_new_edit_ends_redo(folder: Path) -> None:
    edit(folder, a="one")
    edit(folder, a="two")
    History(folder).undo()
    edit(folder, b="three")
    assert History(folder).redo() is None
    assert [one.id for one in History(folder).actions()] == [1, 3]


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl"])
def test_a_table_that_was_begun_goes_again(folder: Path, table: str) -> None:
    swaps = Store(folder, write_to=table.rpartition(".")[2]).swaps(  # type: ignore[arg-type]
        {"a.png": "x, y", "b.png": "z"})
    History(folder).carry_out(Action("edit"), swaps)
    whole = files(folder)
    assert list(whole) == [table]
    History(folder).undo()
    assert files(folder) == {}
    History(folder).redo()
    assert files(folder) == whole


def test_rows_go_and_other_rows_stay(folder: Path) -> None:
    (folder / "metadata.csv").write_text("a.png,old\n")
    edit(folder, a="new", b="more")
    with open(folder / "metadata.csv", "a") as file:
        file.write("x.png,by hand\n")
    outcome = History(folder).undo()
    assert outcome is not None
    assert outcome.left == []
    assert (folder / "metadata.csv").read_text() == "a.png,old\nx.png,by hand\n"


def test_an_edit_from_elsewhere_is_not_undone(folder: Path) -> None:
    edit(folder, a="one", b="one")
    (folder / "a.txt").write_text("by hand")
    outcome = History(folder).undo()
    assert outcome is not None
    assert [swap.picture for swap in outcome.left] == ["a.png"]
    assert files(folder) == {"a.txt": b"by hand"}
    again = History(folder).redo()
    assert again is not None
    assert [swap.picture for swap in again.left] == ["a.png"]
    assert files(folder) == {"a.txt": b"by hand", "b.txt": b"one"}


def test_what_could_not_be_done_is_not_undone(folder: Path) -> None:
    (folder / "a.txt").write_text("old")
    swaps = Store(folder).swaps({"a.png": "new", "b.png": "new"})
    (folder / "a.txt").write_text("by hand")
    outcome = History(folder).carry_out(Action("edit"), swaps)
    assert [swap.picture for swap in outcome.left] == ["a.png"]
    undone = History(folder).undo()
    assert undone is not None
    assert undone.left == []
    assert files(folder) == {"a.txt": b"by hand"}


def test_old_encodings_come_back_byte_for_byte(folder: Path) -> None:
    old = "红猫\r\n坐着".encode("gb18030")
    (folder / "a.txt").write_bytes(old)
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfcat\n")
    edit(folder, a="new", b="new")
    History(folder).undo()
    assert files(folder) == {"a.txt": old, "b.txt": b"\xef\xbb\xbfcat\n"}


@pytest.mark.parametrize("torn", [
    b'{"do":"change","id":2,"pic', b"\x00\xff", b"{}", b'{"do":"begin"'])
def test_a_torn_last_line_costs_only_itself(folder: Path, torn: bytes) -> None:
    edit(folder, a="one")
    history = History(folder)
    with open(history.file, "ab") as file:
        file.write(torn)
    edit(folder, a="two")
    assert [one.id for one in History(folder).actions()] == [1, 2]
    History(folder).undo()
    assert files(folder) == {"a.txt": b"one"}
    History(folder).undo()
    assert files(folder) == {}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_between_journal_and_files(folder: Path) -> None:
    """The journal knows of a write that never came: undo has nothing to do there."""
    (folder / "a.txt").write_text("old")
    code = """
import os, sys
from pathlib import Path
import captioner.captions.undo as undo
from captioner.captions.store import Store
undo.perform = lambda swaps: os.kill(os.getpid(), 9)
folder = Path(sys.argv[1])
undo.History(folder).carry_out(undo.Action("edit"), Store(folder).swaps({"a.png": "new"}))
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, check=False)
    assert done.returncode == -9
    outcome = History(folder).undo()
    assert outcome is not None
    assert outcome.left == []
    assert files(folder) == {"a.txt": b"old"}


def test_a_journal_that_can_not_grow_changes_nothing(folder: Path) -> None:
    resource = pytest.importorskip("resource")
    (folder / "a.txt").write_text("old")
    edit(folder, a="older")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (History(folder).file.stat().st_size + 90, before[1]))
    try:
        with pytest.raises(UserError) as caught:
            edit(folder, a="x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.code == "captions.disk_full"
    assert files(folder) == {"a.txt": b"older"}
    edit(folder, a="newest")
    for state in (b"older", b"old"):
        History(folder).undo()
        assert files(folder) == {"a.txt": state}


def test_compaction_drops_the_oldest(folder: Path) -> None:
    history = History(folder, most_bytes=20_000)
    for n in range(60):
        edit(folder, history, a=f"{n} " + "x" * 500)
    assert history.file.stat().st_size < 22_000
    kept = [one.id for one in history.actions()]
    assert kept == list(range(kept[0], 61))
    assert 8 < len(kept) < 40
    for n in reversed(kept):
        assert files(folder)["a.txt"].startswith(b"%d " % (n - 1))
        history.undo()
    assert history.undo() is None


def test_compaction_drops_what_can_not_be_redone_first(folder: Path) -> None:
    history = History(folder, most_bytes=6_000)
    edit(folder, history, a="first")
    for n in range(9):
        edit(folder, history, a=f"{n} " + "x" * 500)
        history.undo()
    edit(folder, history, b="last")
    assert [one.id for one in history.actions()] == [1, 11]
    assert history.file.stat().st_size < 6_000
    history.undo()
    history.undo()
    assert files(folder) == {}


def test_redo_survives_a_compaction_by_another_action(folder: Path) -> None:
    history = History(folder, most_bytes=3000)
    for text in ("one " * 300, "two " * 300, "three"):
        edit(folder, history, a=text)
    assert [one.id for one in history.actions()] == [2, 3]
    history.undo()
    assert [one.undone for one in history.actions()] == [False, True]
    assert history.redo() is not None
    assert files(folder) == {"a.txt": b"three"}


def test_the_key_is_the_real_folder(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert state_dir(link) == state_dir(folder)
    assert state_dir(tmp_path / "红猫").name.isascii()
    assert state_dir(tmp_path / "a b").name.startswith("a-b-")


def test_history_is_small(folder: Path) -> None:
    edit(folder, a="cat")
    lines = History(folder).file.read_text().splitlines()
    assert [json.loads(line)["do"] for line in lines] == ["begin", "change"]


@settings(deadline=None, max_examples=40)
@given(steps=st.lists(st.one_of(
    st.tuples(st.sampled_from(("a", "b")), st.sampled_from(("x", "y, z", "", "猫"))),
    st.sampled_from(("undo", "redo"))), max_size=12), kind=st.sampled_from(("txt", "csv", "jsonl")))
def test_any_course_of_edits(tmp_path_factory: pytest.TempPathFactory, steps: list[object],
                             kind: str) -> None:
    """Against a model: a list of states and a position in it."""
    folder = pictures(tmp_path_factory.mktemp("any") / "p")
    states, at = [files(folder)], 0
    for step in steps:
        history = History(folder)
        if isinstance(step, tuple):
            store = Store(folder, write_to=kind)            # type: ignore[arg-type]
            swaps = store.swaps({f"{step[0]}.png": step[1]})
            history.carry_out(Action("edit"), swaps)
            if swaps:
                states, at = [*states[:at + 1], files(folder)], at + 1
        else:
            moved: Callable[[], Outcome | None] = getattr(history, str(step))
            possible = at > 0 if step == "undo" else at < len(states) - 1
            assert (moved() is not None) == possible
            at += (-1 if step == "undo" else 1) * possible
        assert files(folder) == states[at]
