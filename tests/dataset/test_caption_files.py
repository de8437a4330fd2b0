"""Where captions stand and whose they are: what training and the caption tools read in folders as
people have them, and what they are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from captioner.captions.edits import perform
from captioner.captions.rule_parser import parse, parse_line
from captioner.captions.rules import apply
from captioner.captions.store import Store
from core.dataset.caption_files.places import Index, caption_places, fold, natural
from core.dataset.checks.report import check_scan
from core.dataset.image_folder import Dataset, scan

Files = dict[str, str | bytes]
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(*pictures: str, **files: str | bytes) -> Path:
        return folder(tmp_path / "set", pictures or ("1.png", "2.png", "3.png"), files)
    return made


def folder(at: Path, pictures: tuple[str, ...], files: Files) -> Path:
    for name in pictures:
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), "red").save(at / name)
    for name, content in files.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return at


def captions(at: Path, metadata: Path | None = None) -> dict[str, str]:
    """As training reads them; the caption tools read the same ones."""
    data = scan(at, metadata)
    found = {name: one.caption for name, one in zip(data.names, data.pictures, strict=True)}
    assert Store(at, metadata).captions == found
    return found


def told(data: Dataset) -> set[str]:
    return {problem.code.removeprefix("dataset.") for problem in data.problems
            } - {"captions_missing"}


# --- beside the pictures ----------------------------------------------------------------------

@pytest.mark.parametrize(("files", "caption"), [
    ({"IMG 1.TXT": "a cat"}, "a cat"), ({"img 1.txt": "a cat"}, "a cat"),
    ({"IMG 1.caption.txt": "a cat"}, "a cat"), ({"IMG 1.tags": "cat, mat"}, "cat, mat"),
    ({"img 1.cap": "a cat"}, "a cat"), ({"IMG 1.JPG.txt": "a cat"}, "a cat"),
    ({"img 1.jpg.caption": "a cat"}, "a cat"),
    ({"IMG 1.txt": " ", "IMG 1.caption": "", "IMG 1.tags": "cat"}, "cat"),
    ({"IMG 1.json": '{"caption": "a cat"}'}, "a cat"),
    ({"IMG 1.txt": '{\n "caption": "a cat"\n}\n'}, "a cat"),
    ({"IMG 1.json": '{"Prompt": "a cat", "tags": ["x"]}'}, "a cat"),
    ({"IMG 1.json": '{"caption": null, "tags": ["cat", "mat", 3]}'}, "cat, mat"),
    ({"IMG 1.json": '["cat", "mat"]'}, "cat, mat"), ({"IMG 1.json": '"a cat"'}, "a cat"),
    ({"IMG 1.json": '\ufeff{"text": "a cat\\non a mat"}'}, "a cat, on a mat"),
    ({"IMG 1.json": '{"nodes": [], "description": "posted on Monday"}'}, ""),
    ({"IMG 1.txt": "a cat\ron a mat\r"}, "a cat, on a mat"),
    ({"IMG 1.txt": "a\xa0cat,\u3000a mat\u200b"}, "a cat, a mat\u200b"),
])
def test_every_kind_of_file_beside_a_picture(tmp_path: Path, files: Files, caption: str) -> None:
    at = folder(tmp_path / "set", ("IMG 1.JPG",), files)
    assert captions(at) == {"IMG 1.JPG": caption}
    assert told(scan(at)) == set()


def test_names_in_another_unicode_form(make: Make) -> None:
    at = make("Zo\u00eb.png", "ガ.png", **{"Zoe\u0308.txt": "a", "カ\u3099.txt": "b"})
    assert captions(at) == {"Zo\u00eb.png": "a", "ガ.png": "b"}


def test_what_fits_exactly_is_not_taken_by_what_fits_loosely(make: Make) -> None:
    at = make("A.png", "a.png", "B.png", **{"a.txt": "small", "b.txt": "loose"})
    assert captions(at) == {"A.png": "", "a.png": "small", "B.png": "loose"}


def test_texts_of_no_picture_are_named(make: Make) -> None:
    at = make(**{"captions/1.txt": "a", "4.txt": "b", "captions.csv": "1.png,x", "README.txt": "c",
                 "train.parquet": b"PAR1", "5.heic": b"", "5.txt": "of five", "6.mp4": b"",
                 "6.txt": "a film", "1.txt": "one", "1.json": "{}", "license.txt": "d"})
    problem, = [one for one in scan(at).problems if one.code == "dataset.texts_unused"]
    assert problem.params["count"] == 4
    assert problem.params["names"] == "4.txt, captions.csv, captions/1.txt, train.parquet"
    assert [one.code for one in Store(at).problems].count("dataset.texts_unused") == 1


def test_a_second_caption_that_says_something_else_is_named(make: Make) -> None:
    at = make("a.png", "b.png", "c.png", **{
        "a.txt": "a cat", "a.caption": "a dog", "a.json": '"a fox"', "b.txt": "a hen",
        "b.caption": "a hen", "c.txt": "", "c.caption": "a cow"})
    assert captions(at) == {"a.png": "a cat", "b.png": "a hen", "c.png": "a cow"}
    problem, = [one for one in scan(at).problems if one.code == "dataset.captions_second"]
    assert (problem.params["count"], problem.params["names"]) == (2, "a.caption, a.json")


def test_the_lines_of_a_file_are_read_as_its_caption_is(make: Make) -> None:
    """For `enable_wildcard`: by the folder's encoding; a JSON and a table have none."""
    at = make("1.png", "2.png", "3.png", "4.png", "5.png", **{
        "1.txt": "女孩, 红发\n男孩, 黑发".encode("gb18030"),
        "2.txt": '{\n "caption": "a red cat"\n}\n',
        "3.tags": "a, b\nc, d", "4.txt": "one line", "metadata.csv": "file_name,text\n5.png,x\n"})
    pictures = scan(at).pictures
    assert [picture.lines for picture in pictures] == [
        ("女孩, 红发", "男孩, 黑发"), (), ("a, b", "c, d"), (), ()]
    assert [picture.caption for picture in pictures] == [
        "女孩, 红发, 男孩, 黑发", "a red cat", "a, b, c, d", "one line", "x"]


def test_a_json_of_other_keys_in_a_text_is_its_caption(make: Make) -> None:
    at = make("1.png", "2.png", **{"1.txt": '{"description": "a red cat"}',
                                  "2.txt": '{"mood": "calm"}'})
    assert captions(at) == {"1.png": "a red cat", "2.png": '{"mood": "calm"}'}


@given(st.lists(st.from_regex(r"\A(IMG_|image \(|猫|)[0-9]{1,4}\)?\Z"), unique_by=fold, max_size=9))
def test_natural_order(stems: list[str]) -> None:
    ordered = sorted(stems, key=natural)
    assert sorted(reversed(stems), key=natural) == ordered
    for prefix in ("IMG_", "image (", "猫"):
        numbers = [int(stem.removeprefix(prefix).rstrip(")")) for stem in ordered
                   if stem.startswith(prefix)]
        assert numbers == sorted(numbers)


def test_2_comes_before_10(make: Make) -> None:
    at = make("p (10).png", "p (2).png", "P (1).png", "p (100).png", "b10/1.png", "b9/1.png")
    assert list(captions(at)) == ["b9/1.png", "b10/1.png", "P (1).png", "p (2).png", "p (10).png",
                                  "p (100).png"]


@given(st.lists(st.text("aAbBß.1 ", min_size=1, max_size=4).map(lambda s: s.strip(". ") or "x"),
                unique=True, max_size=6))
def test_every_picture_finds_its_own_file(stems: list[str]) -> None:
    pictures, files = ([Path("/d") / f"{stem}{suffix}" for stem in stems]
                       for suffix in (".png", ".txt"))
    found = caption_places(pictures, [*pictures, *files])
    assert all(file in found[picture] for picture, file in zip(pictures, files, strict=True))


# --- a.png and a.jpg --------------------------------------------------------------------------

def test_a_file_that_two_pictures_share_is_told(make: Make) -> None:
    at = make("a.png", "a.jpg", "b.png", **{"a.txt": "both", "b.txt": "b"})
    assert captions(at) == {"a.jpg": "both", "a.png": "both", "b.png": "b"}
    assert told(scan(at)) == {"caption_shared"}


@pytest.mark.parametrize("files", [{}, {"a.txt": "both"}])
def test_new_captions_of_two_pictures_are_kept_apart(make: Make, files: Files) -> None:
    at = make("a.png", "a.jpg", "b.png", **files)
    assert perform(Store(at).swaps({"a.png": "red", "a.jpg": "blue", "b.png": "c"})) == []
    assert captions(at) == {"a.jpg": "blue", "a.png": "red", "b.png": "c"}
    assert {path.name for path in at.glob("*.txt")} == {"a.png.txt", "a.jpg.txt", "b.txt", *files}


def test_a_json_is_read_and_never_written(make: Make) -> None:
    content = b'{"caption": "old", "score": 0.5}'
    at = make("1.png", **{"1.json": content})
    assert perform(Store(at).swaps({"1.png": "new"})) == []
    assert (at / "1.json").read_bytes() == content
    assert captions(at) == {"1.png": "new"}


# --- encodings --------------------------------------------------------------------------------

def test_a_folder_decides_for_its_short_files(make: Make) -> None:
    german = {"1.txt": "ä", "2.txt": "mädchen in grüner jacke, straße", "3.txt": "é"}
    at = make(**{name: text.encode("cp1252") for name, text in german.items()})
    assert list(captions(at).values()) == list(german.values())
    assert told(scan(at)) == set()
    assert set(scan(at).encodings.values()) == {"Windows-1252"}


def test_a_doubt_is_told_with_the_text_and_stays_unwritten(make: Make) -> None:
    at = make(**{"1.txt": "ä".encode("cp1252"), "2.txt": "crème brûlée, кафе"})
    data = scan(at)
    problem, = [one for one in data.problems if one.code == "dataset.encoding_doubt"]
    assert problem.params["text"] == "ä"
    assert "Windows-1252" in str(problem)
    store = Store(at)
    assert store.entries["1.png"].locked == "in_doubt"
    rules = parse([parse_line("suffix:wet", 1)])
    perform(store.swaps({name: apply(text, rules) for name, text in store.captions.items()}))
    assert (at / "1.txt").read_bytes() == "ä".encode("cp1252")
    assert (at / "2.txt").read_bytes() == "crème brûlée, кафе, wet".encode()


def test_a_table_is_not_written_in_another_reading(make: Make) -> None:
    """Its one letter says nothing; the captions beside it say Russian."""
    table = "filename,prompt\n1.png,а\n2.png,x\n".encode("cp1251")
    at = make(**{"metadata.csv": table, "3.txt": "девушка в красном платье".encode("cp1251")})
    assert captions(at)["1.png"] == "а"
    store = Store(at)
    assert {entry.locked for name, entry in store.entries.items() if name != "3.png"} == {
        "in_doubt"}
    perform(store.swaps({"2.png": "new"}))
    assert (at / "metadata.csv").read_bytes() == table


@pytest.mark.parametrize("content", [b"\xff\xfea\0b", bytes(range(256)), b"cat\0",
                                     rb"{\rtf1\ansi a cat\par}", b"<html><body>a cat</body></html>",
                                     b'{"caption": "a cat",}'])
def test_what_is_no_text_is_told_once(make: Make, content: bytes) -> None:
    at = make("1.png", **{"1.txt": content})
    for problems in (scan(at).problems, Store(at).problems):
        assert [one.code for one in problems].count("dataset.caption_unreadable") == 1
    subjects = [subject for finding in check_scan(scan(at)) for subject in finding.subjects]
    assert [subject.name for subject in subjects] == ["1.txt"]


# --- tables -----------------------------------------------------------------------------------

TWO = {"1.png": "a cat", "2.png": "b", "3.png": ""}


@pytest.mark.parametrize(("name", "text"), [
    ("metadata.csv", "sep=;\r\nfilename;prompt\r\n1.png;a cat\r\n2.png;b\r\n"),
    ("metadata.csv", '"sep=\t"\nFile Name\tCaption\n1.png\ta cat\n2.png\tb\n'),
    ("metadata.tsv", "image-path\tTEXT\n1.png\ta cat\n2.png\tb\n"),
    ("metadata.csv", "文件名,提示词\n1.png,a cat\n2.png,b\n"),
    ("metadata.csv", "img|caption\n1|a cat\n2|b\n"),
    ("metadata.csv", "filename,prompt\r1.png,a cat\r2.png,b\r"),
    ("metadata.csv", 'filename,prompt\n1.png,"a\ncat."\n2.png,b\n'.replace("\ncat.", " cat")),
    ("metadata.csv", '{"file_name": "1.png", "text": "a cat"}\n{"file_name": "2", "text": "b"}'),
    ("metadata.jsonl", "filename,prompt\n1.png,a cat\n2.png,b\n"),
    ("metadata.jsonl", '[{"file_name": "1.png", "text": "a cat"},\n '
                       '{"image": "2", "tags": ["b"]}]'),
    ("metadata.json", '{"1.png": "a cat", "2": {"tags": "b"}}'),
    ("metadata.json", '{"version": 2, "images": [{"path": "1.png", "caption": "a cat"},'
                      '{"path": "2.png", "label": 7, "caption": "b"}]}'),
    ("metadata.json", '{"file_name": "1.png", "text": "a cat"}\n'
                      '{"file_name": "2.png", "text": "b", "label": 3}\n'),
    ("metadata.csv", "filename,prompt\n{at}/1.png,a cat\n{at}/../set/2.png,b\n"),
    ("metadata.csv", "filename,prompt\nC:\\data\\set\\1.png,a cat\n.\\2.png,b\n"),
    ("metadata.csv", "filename,prompt\n\\\\nas\\x\\IMG\\1.PNG,a cat\nset/2.png,b\n"),
    ("metadata.jsonl", '{"file_name": "/home/me/1.png", "text": "a cat"}\n'
                       '{"file_name": "~/x/2.png", "text": "b"}\n'),
])
def test_tables_as_people_have_them(make: Make, name: str, text: str) -> None:
    at = make()
    (at / name).write_text(text.replace("{at}", str(at)), "utf-8", newline="")
    assert captions(at) == TWO
    assert told(scan(at)) == set()


def test_kohyas_meta_json_by_name(make: Make, tmp_path: Path) -> None:
    at = make("1.png", "sub/2.png")
    meta = tmp_path / "meta_cap.json"
    meta.write_text(json.dumps({str(at / "1"): {"caption": "one", "tags": "x, y"},
                                "D:\\old\\sub\\2": {"tags": "z", "train_resolution": [8, 8]}}))
    assert captions(at, meta) == {"1.png": "one, x, y", "sub/2.png": "z"}
    store = Store(at, meta)
    assert {entry.locked for entry in store.entries.values()} == {"whole_json"}
    assert store.swaps({"1.png": "new"}) == []


@pytest.mark.parametrize(("rows", "line", "found"), [
    ('1.png,"a cat\n2.png,b\n3.png,c\n', 2, ["a cat", "b", "c"]),
    ('1.png,a cat\n2.png,"b\n3.png,"c"\n', 3, ["a cat", "b", "c"]),
    ('1.png,a cat\n2.png,b\n3.png,"c\n', 4, ["a cat", "b", "c"]),
    ('1.png,"a cat"" \n2.png,b\n3.png,c\n', 2, ["a cat", "b", "c"]),
    ('"1.png,a cat\n2.png,b\n3.png,c\n', 2, ["a cat", "b", "c"]),
])
def test_an_open_quote_swallows_no_row(make: Make, rows: str, line: int, found: list[str]) -> None:
    at = make(**{"metadata.csv": f"filename,prompt\n{rows}"})
    assert list(captions(at).values()) == found
    problem, = scan(at).problems
    assert (problem.code, problem.params["line"]) == ("dataset.row_open", line)
    # The mended caption is written as a whole row, and the others stay.
    perform(Store(at).swaps({"2.png": "new, one"}))
    assert list(captions(at).values()) == [found[0], "new, one", found[2]]


def test_one_remark_a_file_and_kind(make: Make) -> None:
    rows = "".join(f"x{n}.png,c\n" for n in range(14))
    at = make(**{"metadata.csv": f"filename,prompt\n{rows}1.png,a cat 2.png,b\n2.png,3.png\n"})
    assert {one.code: (one.params["line"], one.params["count"]) for one in scan(at).problems
            if one.code != "dataset.captions_missing"} == {
        "dataset.row_names_several": (16, 2), "dataset.row_without_picture": (2, 14)}


@pytest.mark.parametrize("start", [b"PK\x03\x04\0\0", b"\xd0\xcf\x11\xe0\xa1\xb1"])
def test_a_workbook_says_what_it_is(make: Make, start: bytes) -> None:
    assert told(scan(make(**{"metadata.csv": start + bytes(40)}))) == {"metadata_workbook"}


# --- whose row --------------------------------------------------------------------------------

def test_a_picture_belongs_to_the_path_that_says_most(make: Make) -> None:
    rows = ("filename,prompt\nD:\\set\\b\\1.png,of b\nD:\\set\\1.png,top\nD:\\set\\a\\1.png,of a\n"
            "D:\\set\\gone\\1.png,nobody's\n")
    at = make("1.png", "a/1.png", "b/1.png", **{"metadata.csv": rows})
    assert captions(at) == {"1.png": "top", "a/1.png": "of a", "b/1.png": "of b"}
    assert told(scan(at)) == {"row_outside"}


def test_an_end_that_fits_twice_fits_nothing(make: Make) -> None:
    at = make("a/1.png", "b/1.png", "10_dog/2.png",
              **{"metadata.csv": "filename,prompt\n/x/1.png,whose?\n/home/me/imgs/2.png,a dog\n"})
    assert {name: caption for name, caption in captions_of_training(at).items() if caption} == {
        "10_dog/2.png": "a dog"}
    assert told(scan(at)) == {"row_outside"}


def captions_of_training(at: Path) -> dict[str, str]:
    data = scan(at)
    return {name: one.caption for name, one in zip(data.names, data.pictures, strict=True)}


def test_a_full_path_of_another_folder_is_that_folders(make: Make, tmp_path: Path) -> None:
    other = folder(tmp_path / "other", ("1.png",), {})
    at = make(**{"metadata.csv": f"filename,prompt\n{other / '1.png'},theirs\n2.png,ours\n"})
    assert captions(at) == {"1.png": "", "2.png": "ours", "3.png": ""}
    assert told(scan(at)) == {"row_outside"}
    (tmp_path / "link").symlink_to(at)
    (at / "metadata.csv").write_text(f"filename,prompt\n{tmp_path / 'link' / '1.png'},ours\n")
    assert captions(at)["1.png"] == "ours"


@settings(max_examples=60)
@given(st.sets(st.from_regex(r"\A([ab]/){0,2}[0-9]{1,2}\.png\Z"), min_size=1, max_size=8),
       st.sampled_from(["C:\\data\\", "/home/me/sets/", "\\\\nas\\share\\x\\"]))
def test_paths_of_another_computer_mean_the_same_pictures(names: set[str], root: str) -> None:
    pictures = {name: Path("/here/set") / name for name in names}
    ordered = sorted(names)
    rows = [f"{root}{name}".replace("/", "\\" if "\\" in root else "/") for name in ordered]
    matched = Index(pictures, Path("/here/set")).match(rows, Path("/here/set"))
    assert matched == [[pictures[name]] for name in ordered]


# --- pictures that aren't what their names say ------------------------------------------------

@pytest.mark.parametrize(("start", "kind"), [
    (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "HEIC/HEIF"),
    (b"\0\0\0\x18ftypheic\0\0\0\0heicmif1", "HEIC/HEIF"),
    (b"\0\0\0\x18ftyphevc\0\0\0\0", "HEIC/HEIF"),
    (b"\0\0\0\x18ftypmp42\0\0\0\0", "MP4"), (b"\xff\x0a\xfa\x7f", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"), (b"8BPS\0\x01", "PSD"),
    (b"\n<!DOCTYPE html><html>", "HTML"), (b"%PDF-1.7", "PDF"), (b"<svg xmlns=''>", "SVG"),
    (b"PK\x03\x04\x14", "ZIP")])
def test_what_another_format_is(make: Make, start: bytes, kind: str) -> None:
    at = make("ok.png", **{"phone.jpg": start + bytes(2000)})
    problem = next(one for one in scan(at).problems if one.skipped)
    assert (problem.code, problem.params["kind"]) == ("dataset.is_other_format", kind)
    assert "AVIF" not in str(problem)


def test_a_broken_avif_is_still_one(make: Make) -> None:
    at = make("ok.png", **{"a.avif": b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(2000)})
    assert told(scan(at)) == {"corrupt"}


def test_png_with_large_texts_and_profiles(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    info.add_itxt("prompt", "猫" * 700_000, zip=True)
    Image.new("RGB", (16, 12)).save(tmp_path / "a.png", pnginfo=info)
    Image.new("RGB", (16, 12)).save(tmp_path / "b.png", icc_profile=bytes(3_000_000))
    assert len(scan(tmp_path).pictures) == 2
