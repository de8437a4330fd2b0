"""Writing whole files or none, and names that are free."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from core import paths


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """Whoever opened the old file keeps it; the name is the new one at once."""
    path = tmp_path / "a.bin"
    paths.write_atomic(path, b"old" * 1000)
    with open(path, "rb") as reader:
        assert reader.read(3) == b"old"
        paths.write_atomic(path, b"new" * 2000)
        assert reader.read() == b"old" * 999
    assert path.read_bytes() == b"new" * 2000
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    paths.write_atomic(path, "whole")

    def breaks() -> None:
        with paths.atomic(path) as temporary:
            temporary.write_text("ha")
            raise RuntimeError("the disk is gone")
    with pytest.raises(RuntimeError):
        breaks()
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_writers_at_once_leave_one_of_their_files(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    contents = [bytes([n]) * 200_000 for n in range(8)]
    threads = [threading.Thread(target=paths.write_atomic, args=(path, one)) for one in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_next_free_name(tmp_path: Path) -> None:
    names = [paths.create(tmp_path / "a.safetensors", Path.touch).name for _ in range(3)]
    assert names == ["a.safetensors", "a-2.safetensors", "a-3.safetensors"]
    (tmp_path / "run.v1").mkdir()
    found = paths.create(tmp_path / "run.v1", Path.touch)
    assert found.name == "run.v1-2"                         # a folder's dot is no suffix


def test_what_can_t_be_read_is_set_aside_never_lost(tmp_path: Path) -> None:
    for content in ("first", "second"):
        (tmp_path / "x.yaml").write_text(content)
        paths.set_aside(tmp_path / "x.yaml")
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ["first", "second"]
    assert not (tmp_path / "x.yaml").exists()


def test_nothing_raises_for_a_user_who_isn_t_there() -> None:
    """`Path.expanduser` does, so all paths that users write go through `expanded`."""
    assert paths.expanded("~nobody-at-all/x") == Path("~nobody-at-all/x")
    assert paths.expanded(Path("~/x")) == Path.home() / "x"
    used = [file for room in (paths.ROOT / name for name in ("core", "captioner", "gui"))
            for file in room.rglob("*.py")
            if ".expanduser()" in file.read_text("utf-8")]
    assert used == []
