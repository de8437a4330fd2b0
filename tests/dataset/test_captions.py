"""Captions: encodings, joined lines, triggers, tags, and both metadata formats."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import TrainConfig
from core.dataset.caption_files.tables import read_metadata
from core.dataset.captions import one_line, shuffle_tags, split_tags, variants, with_trigger
from core.errors import UserError
from core.i18n import tr
from core.serialization import readable_name

CHINESE = "一只红色的猫，水墨画，café"
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030")


# --- text -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode elsewhere")
@pytest.mark.parametrize(("raw", "name"), [
    (b"cat.png", "cat.png"), ("猫.png".encode(), "猫.png"),
    ("红猫.png".encode("gb18030"), "红猫.png"), (b"\x81\x98\x01\xff", "??\x01?")])
def test_file_names_are_readable(raw: bytes, name: str) -> None:
    assert readable_name(os.fsdecode(raw)) == name


@pytest.mark.parametrize(("text", "line"), [
    ("", ""), ("\n \r\n\t", ""),
    ("a red cat", "a red cat"),
    ("\n\n  a red   cat \n", "a red cat"),
    ("1girl, solo\nred hair, smile,\n", "1girl, solo, red hair, smile"),
    ("1girl\r\nsolo\r\nlong red hair", "1girl, solo, long red hair"),
    ("一个女孩\n红发", "一个女孩, 红发"),
    ("一只猫，红色，\n水墨", "一只猫，红色, 水墨"),
    ("A red cat sits on the\nold wall, at night.", "A red cat sits on the old wall, at night."),
    ("a very long line of prose that\ngoes on here without an end",
     "a very long line of prose that goes on here without an end"),
    ("猫坐在墙上。\n天黑了。", "猫坐在墙上。 天黑了。"),
    ("\ufeffa cat", "a cat"),
])
def test_one_line(text: str, line: str) -> None:
    assert one_line(text) == line


@settings(deadline=None)
@given(st.text())
def test_one_line_is_one_line_and_stays(text: str) -> None:
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert line == line.strip()
    assert one_line(line) == line


# --- triggers and tags ------------------------------------------------------------------------

@pytest.mark.parametrize(("caption", "trigger", "expected"), [
    ("a red cat", "sks", "sks, a red cat"),
    ("", "sks", "sks"),
    ("a red cat", "", "a red cat"),
    ("a red cat", "  ", "a red cat"),
    ("a sks cat", "sks", "a sks cat"),
    ("a SKS cat", "sks", "a SKS cat"),
    ("asks a cat", "sks", "sks, asks a cat"),
    ("sks_style cat", "sks", "sks, sks_style cat"),
    ("sks2 cat", "sks", "sks, sks2 cat"),
    ("cat, sks", "sks", "cat, sks"),
    ("in my   style, cat", "my style", "in my   style, cat"),
    ("in mystyle", "my style", "my style, in mystyle"),
    ("a (c++) cat", "(c++)", "a (c++) cat"),
    ("a.b cat", "a.b", "a.b cat"), ("axb cat", "a.b", "a.b, axb cat"),
    ("一只猫", "水墨", "水墨, 一只猫"),
    ("一幅水墨画", "水墨", "一幅水墨画"),
    ("一只sks狗", "sks", "一只sks狗"),
])
def test_trigger(caption: str, trigger: str, expected: str) -> None:
    assert with_trigger(caption, trigger) == expected


@settings(deadline=None)
@given(st.text(), st.text())
def test_a_trigger_is_put_in_once(caption: str, trigger: str) -> None:
    once = with_trigger(caption, trigger)
    assert once in (caption, trigger.strip(), f"{trigger.strip()}, {caption.strip()}")


@settings(deadline=None)
@given(st.text(alphabet="ab ,", max_size=30), st.sampled_from(("sks", "水墨", "my style")))
def test_a_second_time_changes_nothing(caption: str, trigger: str) -> None:
    once = with_trigger(caption, trigger)
    assert with_trigger(once, trigger) == once


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), max_size=12), st.integers(0, 15), st.integers())
def test_shuffling_keeps_the_tags_and_the_leading_ones(
        tags: list[str], keep: int, seed: int) -> None:
    shuffled = split_tags(shuffle_tags(", ".join(tags), keep, Random(seed)))
    assert Counter(shuffled) == Counter(tags)
    assert shuffled[:keep] == tags[:keep]
    assert shuffle_tags(", ".join(tags), keep, Random(seed)) == ", ".join(shuffled)


@pytest.mark.parametrize(("caption", "first", "last", "moving"), [
    ("1girl, frieren ||| sword, hat, standing", ["1girl", "frieren"], [], 3),
    ("a|||b, c, d|||e, f", ["a"], ["e", "f"], 3),
    ("||| b, c, d", [], [], 3), ("a, b |||", ["a", "b"], [], 0),
    ("a ||| red hat;;;boots, d", ["a"], [], 3)])
def test_kohya_s_separators_are_obeyed_and_never_learned(
        caption: str, first: list[str], last: list[str], moving: int) -> None:
    config = TrainConfig(shuffle_tags=True, keep_tokens=2)
    texts = variants(caption, config, 0)
    for tags in map(split_tags, texts):
        assert tags[:len(first)] == first
        assert tags[len(tags) - len(last):] == last
        assert len(tags) == len(first) + len(last) + moving
        assert not {"red hat", "boots"} & {*tags} or (
            tags.index("boots") == tags.index("red hat") + 1)
    assert (len(texts) > 1) == (moving > 1)
    (plain,) = variants(caption, TrainConfig(), 0)
    assert "|" not in plain + "".join(texts)
    assert ";" not in plain + "".join(texts)


def test_the_trigger_takes_its_place() -> None:
    for trigger, text in (("mi4", "photo of mi4, hat"), ("", "photo of [trigger], hat")):
        assert variants("photo of [trigger], hat", TrainConfig(trigger_word=trigger), 0) == (text,)


def test_shuffling_shuffles() -> None:
    caption = "a, b，c, d, , e"
    orders = {shuffle_tags(caption, 1, Random(seed)) for seed in range(50)}
    assert len(orders) > 10
    assert all(order.startswith("a, ") for order in orders)


# --- metadata.csv -----------------------------------------------------------------------------

def read_csv(tmp_path: Path, text: str | bytes, name: str = "metadata.csv") -> dict[str, str]:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    rows, faults = read_metadata(path)
    assert not faults
    return {row.name: row.caption for row in rows}


CAT_AND_DOG = {"01.png": "a red cat, sitting", "sub/02.jpg": "a dog"}


@pytest.mark.parametrize("text", [
    'filename,prompt\n01.png,"a red cat, sitting"\nsub/02.jpg,a dog\n',
    'file_name,text\n01.png,"a red cat, sitting"\nsub/02.jpg,a dog\n',
    'FileName, Caption \r\n01.png,"a red cat, sitting"\r\nsub/02.jpg,a dog\r\n',
    'prompt,filename\n"a red cat, sitting",01.png\na dog,sub/02.jpg\n',
    'id,prompt,x,filename\n7,"a red cat, sitting",,01.png\n8,a dog,y,sub/02.jpg\n',
    ',filename,caption\n0,01.png,"a red cat, sitting"\n1,sub/02.jpg,a dog\n',
    '01.png,"a red cat, sitting"\nsub/02.jpg,a dog\n',
    '01.png, "a red cat, sitting"\nsub/02.jpg, a dog',
    '01.png,a red cat, sitting\nsub/02.jpg,a dog\n',
    'filename,prompt\n01.png,a red cat, sitting\nsub/02.jpg,a dog,\n',
    '\n01.png,"a red cat,\nsitting"\n\n,\nsub/02.jpg,a dog\n',
    '"01.png";"a red cat, sitting"\n"sub/02.jpg";"a dog"\n',
    '01.png;a red cat, sitting\nsub/02.jpg;a dog\n',
    'filename;prompt\n01.png;a red cat, sitting\nsub/02.jpg;a dog\n',
    'filename\tprompt\n01.png\ta red cat, sitting\nsub/02.jpg\ta dog\n',
    'filename,prompt,text\n01.png,"a red cat, sitting",no\nsub/02.jpg,,a dog\n',
])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_in_all_its_shapes(tmp_path: Path, text: str, encoding: str) -> None:
    assert read_csv(tmp_path, text.encode(encoding)) == CAT_AND_DOG


def test_csv_of_chinese_windows(tmp_path: Path) -> None:
    text = "文件 一.png,一只红色的猫\r\n02.png,一条狗\r\n"
    assert read_csv(tmp_path, text.encode("gb18030")) == {
        "文件 一.png": "一只红色的猫", "02.png": "一条狗"}


@pytest.mark.parametrize("caption", ["image", "file", "path", "text"])
def test_a_caption_that_looks_like_a_header(tmp_path: Path, caption: str) -> None:
    assert read_csv(tmp_path, f"01.png,{caption}\n02.png,dog\n") == {
        "01.png": caption, "02.png": "dog"}


def test_names_without_suffix_and_rows_without_caption(tmp_path: Path) -> None:
    assert read_csv(tmp_path, "01,a cat\n02,\n03\n") == {"01": "a cat", "02": "", "03": ""}


def test_csv_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text('filename,prompt\n01.png,"a\n\ncat"\n\n02.png,dog\n')
    rows, _ = read_metadata(tmp_path / "m.csv")
    assert [(row.line, row.name, row.caption) for row in rows] == [
        (2, "01.png", "a, cat"), (6, "02.png", "dog")]


def test_a_header_without_caption_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("filename,width\n01.png,12\n")
    with pytest.raises(UserError, match="filename, width") as caught:
        read_metadata(tmp_path / "m.csv")
    assert caught.value.code == "dataset.metadata_columns"


def test_an_endless_quote_is_reported(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text('01.png,cat\n02.png,"' + "x" * 140_000)
    rows, faults = read_metadata(tmp_path / "m.csv")
    assert [row.name for row in rows] == ["01.png", "02.png"]
    assert [(f.code, f.params["line"]) for f in faults] == [("dataset.row_open", 2)]


def test_missing_and_unreadable_metadata(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing\\.csv") as caught:
        read_metadata(tmp_path / "nothing.csv")
    assert caught.value.code == "dataset.metadata_missing"
    (tmp_path / "m.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError) as caught:
        read_metadata(tmp_path / "m.csv")
    assert caught.value.code == "dataset.metadata_unreadable"


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert read_csv(tmp_path, "") == {}
    assert read_csv(tmp_path, "filename,prompt\n") == {}


NAMES = st.text(alphabet='ab ，猫;-_.\t"', max_size=12).map(lambda s: f"x{s}.png")
ROWS = st.lists(st.tuples(NAMES, st.text(alphabet='ab,;"\n\t 猫。\\', max_size=30)), max_size=8)


def as_csv(rows: list[tuple[str, str]], delimiter: str = ",", **options: int) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, **options).writerows(rows)  # type: ignore[arg-type]
    return file.getvalue().encode()


@settings(deadline=None)
@given(ROWS, st.booleans(), st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
def test_csv_rows_come_back(tmp_path_factory: pytest.TempPathFactory,
                            rows: list[tuple[str, str]], header: bool, quoting: int) -> None:
    path = tmp_path_factory.mktemp("csv") / "metadata.csv"
    path.write_bytes(as_csv([*[("filename", "prompt")] * header, *rows], quoting=quoting))
    found, faults = read_metadata(path)
    assert not faults
    assert [(row.name, row.caption) for row in found] == [
        (name, one_line(caption)) for name, caption in rows]


@settings(deadline=None)
@given(ROWS, st.sampled_from(",;\t"))
def test_every_delimiter_comes_back(tmp_path_factory: pytest.TempPathFactory,
                                    rows: list[tuple[str, str]], delimiter: str) -> None:
    path = tmp_path_factory.mktemp("csv") / "metadata.csv"
    path.write_bytes(as_csv([("filename", "prompt"), *rows], delimiter))
    found, _ = read_metadata(path)
    assert [(row.name, row.caption) for row in found] == [
        (name, one_line(caption)) for name, caption in rows]


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from((".csv", ".jsonl")))
def test_any_bytes_give_rows_or_a_fault(tmp_path_factory: pytest.TempPathFactory,
                                        data: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("any") / f"metadata{suffix}"
    path.write_bytes(data)
    try:
        rows, faults = read_metadata(path)
    except UserError:                                           # and no other exception
        return
    assert all(row.caption == one_line(row.caption) for row in rows)
    assert {fault.code for fault in faults} <= {
        "dataset.row_bad", "dataset.row_open", "dataset.row_names_several"}


# --- metadata.jsonl ---------------------------------------------------------------------------

def test_jsonl(tmp_path: Path) -> None:
    lines = [{"file_name": "01.png", "text": "a cat"}, {"filename": "02.png", "caption": "一只狗"},
             {"FILE_NAME": " 03.png ", "Prompt": "x\ny", "extra": 3},
             {"file_name": "04.png", "text": ["red", "cat"]}, {"file_name": "05.png"},
             {"file_name": "06.png", "prompt": None, "text": "line\u2028break"}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    assert read_csv(tmp_path, text, "metadata.jsonl") == {
        "01.png": "a cat", "02.png": "一只狗", "03.png": "x, y", "04.png": "red, cat",
        "05.png": "", "06.png": "line, break"}


@pytest.mark.parametrize("bad", ["{", "[1]", '"x"', '{"text": "no name"}', "nonsense",
                                 '{"file_name": 3, "text": "x"}',
                                 '{"file_name": "a.png", "text": 7}', "[" * 100_000])
def test_bad_jsonl_lines_are_named_and_the_rest_is_read(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "01.png", "text": "cat"}\n' + bad
                    + '\n{"file_name": "02.png", "text": "dog"}\n')
    rows, faults = read_metadata(path)
    assert [(row.line, row.name) for row in rows] == [(1, "01.png"), (3, "02.png")]
    assert [(f.code, f.params["line"]) for f in faults] == [("dataset.row_bad", 2)]
    assert tr(faults[0].code, faults[0].params, "en").startswith("metadata.jsonl, line 2:")


@settings(deadline=None)
@given(st.lists(st.tuples(NAMES, st.text(max_size=30)), max_size=6))
def test_jsonl_rows_come_back(tmp_path_factory: pytest.TempPathFactory,
                              rows: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "metadata.jsonl"
    path.write_text("".join(json.dumps({"file_name": name, "text": text}) + "\n"
                            for name, text in rows), "utf-8")
    found, faults = read_metadata(path)
    assert not faults
    assert [(row.name, row.caption) for row in found] == [
        (name, one_line(caption)) for name, caption in rows]


def test_of_several_caption_columns_the_first_that_is_filled_counts(tmp_path: Path) -> None:
    """In the order of CAPTION_KEYS, whatever the order in the file."""
    path = tmp_path / "metadata.jsonl"
    path.write_text('{"file_name": "a.png", "tags": "t", "text": "second", "prompt": "first"}\n'
                    '{"file_name": "b.png", "tags": "t", "text": "second", "prompt": ""}\n')
    assert [row.caption for row in read_metadata(path)[0]] == ["first", "second"]
    path = tmp_path / "metadata.csv"
    path.write_text("file_name,tags,text,prompt\na.png,t,second,first\nb.png,t,second,\n")
    assert [row.caption for row in read_metadata(path)[0]] == ["first", "second"]
