from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.dataset import import_files
from core.errors import UserError


def drop(folder: Path, **files: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    made = []
    for name, content in files.items():
        path = folder / name.replace("_", ".")
        path.write_text(content)
        made.append(path)
    return made


def test_pictures_and_captions_are_copied_others_refused(tmp_path: Path) -> None:
    files = drop(tmp_path / "a", one_png="1", one_txt="a cat", notes_pdf="x")
    taken = import_files.copy_all(files, tmp_path / "to")
    assert (taken.copied, taken.same, taken.refused) == (2, 0, ("notes.pdf",))
    assert (tmp_path / "to" / "one.txt").read_text() == "a cat"
    assert all(file.exists() for file in files)


def test_the_same_again_is_known(tmp_path: Path) -> None:
    files = drop(tmp_path / "a", one_png="1", one_txt="a cat")
    import_files.copy_all(files, tmp_path / "to")
    assert import_files.copy_all(files, tmp_path / "to") == import_files.Taken(0, 2, ())


def test_another_picture_of_that_name_takes_its_caption_along(tmp_path: Path) -> None:
    import_files.copy_all(drop(tmp_path / "a", one_png="1", one_txt="a cat"), tmp_path / "to")
    import_files.copy_all(drop(tmp_path / "b", one_png="2", one_txt="a dog"), tmp_path / "to")
    found = {path.name: path.read_text() for path in (tmp_path / "to").iterdir()}
    assert found == {"one.png": "1", "one.txt": "a cat", "one-2.png": "2", "one-2.txt": "a dog"}


def test_files_of_one_name_from_two_folders_are_both_kept(tmp_path: Path) -> None:
    """In one drop, each with its caption; the very same file twice is one."""
    files = [*drop(tmp_path / "a", one_png="1", one_txt="a cat"),
             *drop(tmp_path / "b", one_png="2", one_txt="a dog"),
             *drop(tmp_path / "c", one_png="1")]
    taken = import_files.copy_all(files, tmp_path / "to")
    found = {path.name: path.read_text() for path in (tmp_path / "to").iterdir()}
    assert found == {"one.png": "1", "one.txt": "a cat", "one-2.png": "2", "one-2.txt": "a dog"}
    assert (taken.copied, taken.same) == (4, 1)


def test_a_browser_drops_each_file_in_a_folder_of_its_own(tmp_path: Path) -> None:
    files = [path for n, (name, text) in enumerate(
        [("one_png", "1"), ("one_txt", "a cat"), ("one_png", "2"), ("one_txt", "a dog")])
        for path in drop(tmp_path / str(n), **{name: text})]
    import_files.copy_all(files, tmp_path / "to")
    assert (tmp_path / "to" / "one-2.txt").read_text() == "a dog"


def test_every_kind_of_caption_stays_beside_its_picture(tmp_path: Path) -> None:
    for folder, text in (("a", "1"), ("b", "2")):
        (tmp_path / folder).mkdir()
        names = ["x.png", "x.caption.txt", "x.png.txt", "x.json", "X.tags", "y?.png", "y*.png"]
        for name in names:
            (tmp_path / folder / name).write_text(text + name[:2])
        import_files.copy_all([tmp_path / folder / name for name in names], tmp_path / "to")
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == sorted(
        [f"x{n}{rest}" for n in ("", "-2") for rest in (
            ".png", ".caption.txt", ".png.txt", ".json", ".tags")]
        + [f"y_{n}.png" for n in ("", "-2", "-3", "-4")])


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    import_files.copy_all(drop(tmp_path / "a", x_png="1", y_png="2"), tmp_path / "to",
                          lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "to").write_text("a file")
    with pytest.raises(UserError) as told:
        import_files.copy_all(drop(tmp_path / "a", x_png="1"), tmp_path / "to")
    assert "x.png" in str(told.value)


@given(st.text(max_size=200))
def test_stems_are_names_and_no_paths(text: str) -> None:
    stem = import_files.clean(text)
    assert stem
    assert len(stem) <= 120
    assert not set(stem) & set('<>:"/\\|?*\x00\n')
    assert stem not in (".", "..")
    assert import_files.clean(stem) == stem


def test_a_long_chinese_name_fits_any_file_system(tmp_path: Path) -> None:
    """255 bytes are the most for a name, and Chinese has three a letter."""
    stem = import_files.clean("风" * 110)
    assert stem == "风" * 63
    (tmp_path / f"{stem}.caption.txt").write_text("a")
