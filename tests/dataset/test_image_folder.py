"""The picture folder: what is found, what is skipped and why, and that nothing is touched."""

from __future__ import annotations

import json
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from core import paths
from core.dataset.image_folder import Dataset, Picture, held_out, scan
from core.errors import UserError
from core.i18n import STRINGS, tr

ROOT = Path(__file__).parents[2]


def draw(path: Path, colour: str = "red", size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write(path: Path, text: str | bytes | bytearray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def found(data: Dataset) -> dict[str, str]:
    return {p.path.relative_to(data.folder).as_posix(): p.caption for p in data.pictures}


def codes(data: Dataset) -> dict[str, list[str]]:
    """file as shown -> what was said about it."""
    said: dict[str, list[str]] = {}
    for problem in data.problems:
        for language in ("en", "zh-CN"):
            sentence = tr(problem.code, problem.params, language)
            assert not re.search(r"\{\w+\}|^dataset\.", sentence), sentence
        said.setdefault(problem.params["file"], []).append(problem.code.removeprefix("dataset."))
    json.dumps([p.params for p in data.problems], ensure_ascii=False).encode()   # for events
    return said


# --- folders ----------------------------------------------------------------------------------

def test_a_flat_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.Jpeg", "d.webp", "e.bmp", "f.avif", "g.TIFF", "h.tif",
                 "i.gif", "j.jfif"):
        write(draw(tmp_path / name).with_suffix(".txt"), f"caption of {name[0]}")
    data = scan(tmp_path)
    assert [p.path.name[0] for p in data.pictures] == list("abcdefghij")
    assert all(p == Picture(p.path, f"caption of {p.path.name[0]}", 1, (20, 16), False)
               for p in data.pictures)
    assert data.problems == ()
    assert data.folder == tmp_path
    assert data.captioned == 10
    assert data.skipped == 0


def test_nested_and_repeat_folders(tmp_path: Path) -> None:
    draw(tmp_path / "top.png")
    draw(tmp_path / "plain" / "deep" / "1.png")
    draw(tmp_path / "10_sks dog" / "1.png")
    draw(tmp_path / "10_sks dog" / "more" / "2.png")
    write(draw(tmp_path / "10_sks dog" / "3.png").with_suffix(".txt"), "a dog in the rain")
    draw(tmp_path / "3_猫" / "2_小 猫" / "1.png")
    data = scan(tmp_path)
    assert {name: (p.repeats, p.caption) for name, p in zip(found(data), data.pictures,
                                                            strict=True)} == {
        "10_sks dog/1.png": (10, "sks dog"), "10_sks dog/3.png": (10, "a dog in the rain"),
        "10_sks dog/more/2.png": (10, "sks dog"), "3_猫/2_小 猫/1.png": (2, "小 猫"),
        "plain/deep/1.png": (1, ""), "top.png": (1, "")}
    assert codes(data) == {str(tmp_path): ["captions_missing"]}
    assert data.problems[0].params | {"file": ""} == {"file": "", "count": 2, "total": 6}


def test_the_repeat_folder_itself_can_be_given(tmp_path: Path) -> None:
    draw(tmp_path / "12_cat" / "1.png")
    picture, = scan(tmp_path / "12_cat").pictures
    assert (picture.repeats, picture.caption) == (12, "cat")


def test_years_and_zeros_are_no_repeats(tmp_path: Path) -> None:
    draw(tmp_path / "2024_summer" / "1.png")
    draw(tmp_path / "0_bad" / "1.png")
    data = scan(tmp_path)
    assert [(p.path.parent.name, p.repeats, p.caption) for p in data.pictures] == [
        ("2024_summer", 1, "")]
    assert codes(data) == {"2024_summer": ["not_repeats"], "0_bad": ["zero_repeats"],
                           str(tmp_path): ["captions_missing"]}


def test_what_is_no_picture_of_the_user_is_ignored(tmp_path: Path) -> None:
    write(draw(tmp_path / "1.png").with_suffix(".txt"), "cat")
    for name in (".hidden.png", "._1.png", ".git/1.png", "_left_out/1.png", "__MACOSX/1.png",
                 "1-masklabel.png"):
        draw(tmp_path / name)
    write(tmp_path / ".DS_Store", b"\0\1")
    write(tmp_path / "1.npz", b"PK")
    data = scan(tmp_path)
    assert found(data) == {"1.png": "cat"}
    assert codes(data) == {}
    draw(tmp_path / "masks" / "1.png")
    draw(tmp_path / "train_mask" / "1.png")
    draw(tmp_path / "5_mask" / "1.png")                     # masks can be what one trains
    data = scan(tmp_path)
    assert found(data) == {"1.png": "cat", "5_mask/1.png": "mask"}
    assert codes(data) == {"masks": ["masks_left_out"], "train_mask": ["masks_left_out"]}


@pytest.mark.parametrize(("inside", "code"), [
    (("d/output/samples/.lora-darkroom", "d/output/samples/x-000001-0.png"), "own_folder"),
    (("d/.LORA-darkroom", "d/x.png"), "own_folder"),
    (("lora.safetensors", "sample/x.png"), "samples_left_out"),
    (("out/lora.ckpt", "out/samples/x.png"), "samples_left_out"),
    (("img/10_sks dog/2.png", "reg/1_dog/x.png"), "kohya_left_out"),
    (("train/3_a/2.png", "regularization/x.png"), "kohya_left_out"),
    (("10_dog/2.png", "model/sample/x.png"), "kohya_left_out"),
    (("image/10_dog/2.png", "samples/x.png"), "kohya_left_out"),
    (("@eaDir/1.png/SYNOPHOTO_THUMB_XL.png", "sub/@eaDir/x.png"), "system_left_out"),
    (("#recycle/x.png",), "system_left_out"), (("$RECYCLE.BIN/S-1/x.png",), "system_left_out"),
    (("@Recycle/x.png",), "system_left_out")])
def test_folders_that_hold_nothing_to_train_on(tmp_path: Path, inside: tuple[str, ...], code: str
                                               ) -> None:
    draw(tmp_path / "1.png")
    for name in inside:
        draw(tmp_path / name) if name.endswith("png") else write(tmp_path / name, b"")
    data = scan(tmp_path)
    trained = {"1.png", *(name for name in inside if name.endswith("2.png"))}
    assert set(found(data)) == trained
    said = [problem.code.removeprefix("dataset.") for problem in data.problems]
    assert said.count(code) == 1


def test_our_own_folders_train_where_they_are_given(tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that were generated may be what one wants; the data folder itself never is."""
    paths.mark(tmp_path / "made")
    draw(tmp_path / "made" / "1.png")
    assert set(found(scan(tmp_path / "made"))) == {"1.png"}
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    draw(tmp_path / "home" / "runs" / "1" / "x.png")
    draw(tmp_path / "home" / "dropped" / "mine" / "2.png")
    draw(tmp_path / "3.png")
    data = scan(tmp_path)
    assert set(found(data)) == {"3.png"}
    assert set(found(scan(tmp_path / "home" / "dropped" / "mine"))) == {"2.png"}


@pytest.mark.parametrize("name", ["model/1.png", "samples/1.png", "log/1.png", "train/1.png"])
def test_such_names_alone_leave_nothing_out(tmp_path: Path, name: str) -> None:
    draw(tmp_path / name)
    assert set(found(scan(tmp_path))) == {name}


def test_chinese_and_spaces_in_paths(tmp_path: Path) -> None:
    folder = tmp_path / "我的 图片"
    draw(folder / "水墨 画" / "猫 1.png")
    write(folder / "水墨 画" / "猫 1.txt", "红色的猫".encode("gb18030"))
    assert found(scan(folder)) == {"水墨 画/猫 1.png": "红色的猫"}


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode elsewhere")
def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode("5_水墨画".encode("gb18030"))
    draw(folder / os.fsdecode("红猫.png".encode("gb18030")))
    draw(folder / "2.png")
    write(folder / os.fsdecode("坏.png".encode("gb18030")), b"")
    write(tmp_path / "metadata.csv", "5_水墨画/红猫,猫\n")
    data = scan(tmp_path)
    assert [p.caption for p in data.pictures] == ["水墨画", "猫"]
    assert codes(data) == {"5_水墨画/坏.png": ["empty"]}
    assert len(held_out(data.pictures, 0.5, 0)) == 1


def test_a_relative_folder_becomes_absolute(tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "a" / "1.png")
    monkeypatch.chdir(tmp_path)
    data = scan(Path("a/../a"))
    assert data.folder == tmp_path / "a"
    assert data.pictures[0].path == tmp_path / "a" / "1.png"


@pytest.mark.skipif(os.name == "nt", reason="links and pipes need rights there")
def test_links_back_broken_links_and_pipes(tmp_path: Path) -> None:
    draw(tmp_path / "real" / "1.png")
    (tmp_path / "real" / "back").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "real")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.txt")
    data = scan(tmp_path)
    assert len(data.pictures) == 1                          # the same folder counts once
    assert codes(data)["gone.png"] == ["unreadable"]


def test_the_same_folder_gives_the_same_dataset(tmp_path: Path) -> None:
    for name in ("b/2.png", "a.png", "b.png", "b/10.png", "B/1.png", "ü.png", "猫.png"):
        draw(tmp_path / name)
    write(tmp_path / "b" / "broken.png", b"no")
    data = scan(tmp_path)
    assert scan(tmp_path) == data
    assert list(found(data)) == ["a.png", "b.png", "B/1.png", "b/2.png", "b/10.png", "ü.png",
                                 "猫.png"]


def test_progress_is_told(tmp_path: Path) -> None:
    for i in range(5):
        draw(tmp_path / f"{i}.png")
    told: list[tuple[int, int]] = []
    scan(tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 5) for i in range(1, 6)]


def test_a_scan_that_is_broken_off_ends(tmp_path: Path) -> None:
    for i in range(50):
        draw(tmp_path / f"{i}.png")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path, progress=stop)


def test_the_folder_is_only_read(tmp_path: Path) -> None:
    draw(tmp_path / "10_cat" / "1.png")
    write(tmp_path / "10_cat" / "1.txt", "猫".encode("gb18030"))
    write(tmp_path / "metadata.csv", "10_cat/1.png,cat\nnone.png,x\n")
    write(tmp_path / "bad.png", b"")
    write(tmp_path / "bad.jpg", b"\xff\xd8\xff")

    def state() -> dict[str, tuple[bytes, int, int]]:
        return {str(p): (p.read_bytes() if p.is_file() else b"", p.stat().st_mtime_ns,
                         p.stat().st_mode) for p in sorted(tmp_path.rglob("*"))}

    before = state()
    mtime = tmp_path.stat().st_mtime_ns
    scan(tmp_path)
    assert state() == before
    assert tmp_path.stat().st_mtime_ns == mtime


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", lambda: 0)() == 0,
                    reason="needs a user whom access rights stop")
def test_folders_and_files_without_access(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    closed = draw(tmp_path / "closed" / "1.png").parent
    draw(tmp_path / "2.png").chmod(0)
    closed.chmod(0)
    try:
        data = scan(tmp_path)
    finally:
        closed.chmod(0o755)
    assert list(found(data)) == ["1.png"]
    assert codes(data)["closed"] == ["folder_unreadable"]
    assert codes(data)["2.png"] == ["unreadable"]


# --- nothing to train on ----------------------------------------------------------------------

def fault_of(folder: Path, metadata: Path | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        scan(folder, metadata)
    for language in ("en", "zh-CN"):
        sentence = tr(caught.value.code, caught.value.params, language)
        assert not re.search(r"\{\w+\}|^dataset\.", sentence), sentence
    return caught.value


def test_a_missing_folder_says_how_far_the_path_goes(tmp_path: Path) -> None:
    fault = fault_of(tmp_path / "none" / "pictures")
    assert fault.code == "dataset.folder_missing"
    assert str(tmp_path / "none" / "pictures") in str(fault)
    assert fault.params["nearest"] == tmp_path


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    assert fault_of(write(tmp_path / "a.zip", b"PK")).code == "dataset.not_a_folder"


def test_a_folder_without_pictures_says_what_it_holds(tmp_path: Path) -> None:
    for i in range(12):
        write(tmp_path / "x" / f"{i}.txt", "caption")
    write(tmp_path / "y" / "README", "")
    (tmp_path / "z").mkdir()
    fault = fault_of(tmp_path)
    assert fault.code == "dataset.no_pictures"
    assert fault.params == {"folder": tmp_path, "folders": 3, "files": 13,
                            "kinds": "12 × .txt, 1 × README"}
    assert fault_of(tmp_path / "z").params["kinds"] == "-"


def test_a_folder_of_broken_pictures_says_why(tmp_path: Path) -> None:
    write(tmp_path / "1.png", b"")
    write(tmp_path / "2.png", b"hello")
    fault = fault_of(tmp_path)
    assert fault.code == "dataset.all_skipped"
    assert fault.params["count"] == 2
    assert "1.png" in fault.params["first"]


# --- skipped pictures -------------------------------------------------------------------------

def test_bad_pictures_are_listed_and_the_rest_trains(tmp_path: Path) -> None:
    draw(tmp_path / "good.png")
    write(tmp_path / "empty.png", b"")
    write(tmp_path / "text.jpg", "not a picture")
    whole = draw(tmp_path / "whole.jpg", size=(300, 300)).read_bytes()
    write(tmp_path / "torn.jpg", whole[:len(whole) // 2])
    header = bytearray(draw(tmp_path / "bomb.png").read_bytes())
    header[16:24] = struct.pack(">II", 20_000, 20_000)      # a real one: test_images.py
    header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
    write(tmp_path / "bomb.png", header)
    write(tmp_path / "phone.HEIC", b"\0\0\0\x18ftypheic")
    (tmp_path / "renamed.png").write_bytes(whole)           # content decides, not the name
    data = scan(tmp_path)
    assert list(found(data)) == ["good.png", "renamed.png", "whole.jpg"]
    said = codes(data)
    said.pop(str(tmp_path))
    assert said == {"empty.png": ["empty"], "text.jpg": ["not_a_picture"],
                    "torn.jpg": ["truncated"], "bomb.png": ["too_large"],
                    "phone.HEIC": ["unsupported"]}
    assert data.skipped == 5
    assert all(problem.path.is_absolute() for problem in data.problems)
    torn = next(problem for problem in data.problems if "torn" in str(problem))
    assert str(torn) == tr(torn.code, torn.params)


# --- captions ---------------------------------------------------------------------------------

def test_sidecars_and_their_order(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d", "e"):
        draw(tmp_path / "1_token" / f"{name}.png")
    folder = tmp_path / "1_token"
    write(folder / "a.txt", "text of a")
    write(folder / "a.caption", "caption of a")
    write(folder / "b.CAPTION", "caption of b")
    write(folder / "c.txt", " \n")                          # empty: the next one counts
    write(folder / "c.caption", "caption of c")
    write(folder / "d.png.txt", "1girl\nsolo")
    data = scan(tmp_path)
    assert found(data) == {"1_token/a.png": "text of a", "1_token/b.png": "caption of b",
                           "1_token/c.png": "caption of c", "1_token/d.png": "1girl, solo",
                           "1_token/e.png": "token"}
    # a.caption says something else than a.txt
    assert [problem.code for problem in data.problems] == ["dataset.captions_second"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_sidecars_of_every_encoding(tmp_path: Path, encoding: str) -> None:
    draw(tmp_path / "猫.png")
    write(tmp_path / "猫.txt", "一只红色的猫, 水墨".encode(encoding))
    assert found(scan(tmp_path)) == {"猫.png": "一只红色的猫, 水墨"}


def test_an_unreadable_caption_is_said(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    write(tmp_path / "1.txt", bytes(range(256)))
    data = scan(tmp_path)
    assert found(data) == {"1.png": ""}
    assert codes(data) == {"1.txt": ["caption_unreadable"], str(tmp_path): ["captions_missing"]}
    assert data.skipped == 0


def test_metadata_in_the_folder_is_found(tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "sub/3.png", "sub/4.png", "x.y.png"):
        draw(tmp_path / name)
    write(tmp_path / "metadata.csv", "filename,prompt\n1.png,one\nsub/3,three\n"
                                     "sub\\4.PNG,four\nx.y,dots\n")
    write(tmp_path / "2.txt", "two")
    data = scan(tmp_path)
    assert found(data) == {"1.png": "one", "2.png": "two", "sub/3.png": "three",
                           "sub/4.png": "four", "x.y.png": "dots"}
    assert codes(data) == {}


def test_metadata_in_a_subfolder_counts_there_and_before_the_outer(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "1.png")
    draw(tmp_path / "train" / "2.png")
    draw(tmp_path / "1.png")
    write(tmp_path / "Metadata.jsonl", '{"file_name": "train/1.png", "text": "outer"}\n'
                                       '{"file_name": "train/2.png", "text": "outer"}\n'
                                       '{"file_name": "1.png", "text": "top"}\n')
    write(tmp_path / "train" / "metadata.csv", "1.png,inner\n")
    data = scan(tmp_path)
    assert found(data) == {"train/1.png": "inner", "train/2.png": "outer", "1.png": "top"}
    assert codes(data) == {}


def test_given_metadata_wins(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "style"
    draw(folder / "1.png")
    draw(folder / "2.png")
    write(folder / "metadata.csv", "1.png,lying there\n2.png,lying there\n")
    write(folder / "1.txt", "sidecar of 1")
    write(folder / "2.txt", "sidecar of 2")
    given_file = write(tmp_path / "given.csv", "1.png,given\n")
    data = scan(folder, given_file)
    assert found(data) == {"1.png": "given", "2.png": "sidecar of 2"}
    assert codes(data) == {str(folder): ["sidecars_unused"]}
    assert data.problems[0].params["count"] == 1
    assert found(scan(folder)) == {"1.png": "lying there", "2.png": "lying there"}


def test_names_written_from_further_up(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "style"
    draw(folder / "1.png")
    draw(folder / "style" / "2.png")
    file = write(tmp_path / "m.csv", "./data/style/1.png,one\nstyle/2.png,two\n")
    assert found(scan(folder, file)) == {"1.png": "one", "style/2.png": "two"}


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "/etc/secret.png",
                                  "C:\\secret.png", "\\\\server\\secret.png", "c:secret.png",
                                  "..\\secret.png"])
def test_names_outside_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    draw(folder / "1.png")
    draw(tmp_path / "secret.png")
    write(folder / "metadata.csv", f"filename,prompt\n1.png,one\n{name},stolen\n")
    data = scan(folder)
    assert found(data) == {"1.png": "one"}
    assert codes(data) == {"metadata.csv": ["row_outside"]}
    assert data.problems[0].params | {"file": ""} == {
        "file": "", "line": 3, "name": name, "count": 1}


def test_rows_that_help_nobody_are_said(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    write(tmp_path / "bad.png", b"")
    write(tmp_path / "metadata.jsonl", '{"file_name": "1.png", "text": "first"}\n'
                                       '{"file_name": "1.png", "text": "second"}\n'
                                       '{"file_name": "2.png", "text": "gone"}\n'
                                       '{"file_name": "bad.png", "text": "bad"}\n{\n')
    data = scan(tmp_path)
    assert found(data) == {"1.png": "first"}
    assert {name: sorted(said) for name, said in codes(data).items()} == {
        "metadata.jsonl": ["row_bad", "row_twice", "row_without_picture"], "bad.png": ["empty"]}


def test_exact_names_come_before_similar_ones(tmp_path: Path) -> None:
    draw(tmp_path / "cat.png")
    draw(tmp_path / "cat.jpg")
    draw(tmp_path / "Zoë.png")
    write(tmp_path / "metadata.csv", "cat.png,png\ncat.jpg,jpg\nzoe\u0308,composed\n")
    assert found(scan(tmp_path)) == {"cat.png": "png", "cat.jpg": "jpg", "Zoë.png": "composed"}
    write(tmp_path / "metadata.csv", "cat,both\n")
    assert found(scan(tmp_path)) == {"cat.png": "both", "cat.jpg": "both", "Zoë.png": ""}


def test_given_metadata_must_exist_and_fit(tmp_path: Path) -> None:
    draw(tmp_path / "1.png")
    fault = fault_of(tmp_path, tmp_path / "none.csv")
    assert fault.code == "dataset.metadata_missing"
    assert str(tmp_path / "none.csv") in str(fault)
    file = write(tmp_path / "other.csv", "filename,prompt\n7.png,seven\n8.png,eight\n")
    fault = fault_of(tmp_path, file)
    assert fault.code == "dataset.metadata_no_match"
    assert (fault.params["count"], fault.params["name"]) == (2, "7.png")
    write(file, "filename,width\n1.png,7\n")
    assert fault_of(tmp_path, file).code == "dataset.metadata_columns"


def test_found_metadata_that_is_broken_is_said(tmp_path: Path) -> None:
    write(draw(tmp_path / "1.png").with_suffix(".txt"), "cat")
    write(tmp_path / "metadata.csv", "filename,width\n1.png,7\n")
    write(tmp_path / "metadata.jsonl", bytes(range(256)))
    data = scan(tmp_path)
    assert found(data) == {"1.png": "cat"}
    assert codes(data) == {"metadata.csv": ["metadata_columns"],
                           "metadata.jsonl": ["metadata_unreadable"]}


# --- held-out pictures ------------------------------------------------------------------------

def made_up(count: int, root: str = "/data") -> list[Picture]:
    return [Picture(Path(root) / "10_cat" / f"{i}.png", "", 1, (1, 1), False)
            for i in range(count)]


@settings(deadline=None)
@given(st.integers(0, 60), st.floats(0, 0.999), st.integers(0, 2**63))
def test_held_out_pictures(count: int, share: float, seed: int) -> None:
    pictures = made_up(count)
    chosen = held_out(pictures, share, seed)
    assert chosen <= frozenset(range(count))
    if share > 0 and count >= 2:
        assert 0 < len(chosen) < count
        assert abs(len(chosen) - share * count) <= 1
    else:
        assert not chosen
    assert held_out(made_up(count, "/elsewhere"), share, seed) == chosen


def test_another_seed_holds_out_others() -> None:
    assert len({held_out(made_up(40), 0.2, seed) for seed in range(20)}) > 15


def test_the_choice_hangs_on_names_not_on_order() -> None:
    pictures = made_up(30)
    names = {pictures[i].path.name for i in held_out(pictures, 0.2, 1)}
    pictures.reverse()
    assert {pictures[i].path.name for i in held_out(pictures, 0.2, 1)} == names


# --- the sentences ----------------------------------------------------------------------------

def test_every_code_has_its_sentence_in_every_language() -> None:
    sentences = {language: yaml.safe_load((STRINGS / language / "dataset.yaml").read_text("utf-8"))
                 for language in ("en", "zh-CN")}
    assert sentences["en"].keys() == sentences["zh-CN"].keys()
    for key, text in sentences["en"].items():
        assert (sorted(re.findall(r"\{\w+\}", text))
                == sorted(re.findall(r"\{\w+\}", sentences["zh-CN"][key]))), key
    source = "".join(path.read_text("utf-8") for path in (ROOT / "core/dataset").rglob("*.py"))
    used = set(re.findall(r'"dataset\.(\w+)"', source))
    assert used == sentences["en"].keys()
