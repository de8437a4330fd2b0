from __future__ import annotations

import csv
import io
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner.captions.edits import check_writable, perform
from captioner.captions.store import Store
from captioner.captions.table import Table
from captioner.captions.undo import History
from core.dataset.caption_files.tables import (
    CAPTION_KEYS,
    NAME_KEYS,
    plain_key,
    read_metadata,
)
from core.dataset.captions import one_line
from core.dataset.image_folder import scan
from core.errors import UserError
from core.text_encoding import decode_text, read

resource = pytest.importorskip("resource")                  # limits of a process: POSIX only
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def folder(*names: str, **files: str | bytes) -> Path:
        """Pictures by name, and files with their content."""
        root = tmp_path / "pictures"
        for name in names or ("a.png", "b.png", "sub/c.png"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), "red").save(root / name)
        for name, content in files.items():
            path = root / name.replace("__", "/")
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return root
    return folder


def write(folder: Path, wanted: dict[str, str], **options: object) -> Store:
    store = Store(folder, **options)                        # type: ignore[arg-type]
    assert perform(store.swaps(wanted)) == []
    return store


def trained(folder: Path, metadata: Path | None = None) -> dict[str, str]:
    """What training reads, by its own code."""
    return {one.path.relative_to(folder).as_posix(): one.caption
            for one in scan(folder, metadata).pictures}


# --- where captions go ------------------------------------------------------------------------

def test_nothing_there_means_txt(make: Make) -> None:
    folder = make()
    write(folder, {"a.png": "a cat", "sub/c.png": "猫, 红"})
    assert (folder / "a.txt").read_bytes() == b"a cat"
    assert (folder / "sub/c.txt").read_bytes() == "猫, 红".encode()
    assert trained(folder) == {"a.png": "a cat", "b.png": "", "sub/c.png": "猫, 红"}


@pytest.mark.parametrize(("files", "new"), [
    ({"a.caption": "x"}, "b.caption"), ({"a.png.txt": "x"}, "b.png.txt"),
    ({"a.txt": "x", "sub__c.txt": "x", "b.caption": ""}, "b.caption"),
    ({"a.png.caption": "x"}, "b.png.caption")])
def test_as_the_user_has_it(make: Make, files: dict[str, str], new: str) -> None:
    folder = make(**files)
    write(folder, {"b.png": "new", "a.png": "other"})
    assert (folder / new).read_text() == "new"
    assert trained(folder)["a.png"] == "other"
    assert trained(folder)["b.png"] == "new"
    assert len(list(folder.glob("a.*"))) == 2


def test_a_metadata_file_takes_all(make: Make) -> None:
    folder = make(**{"metadata.csv": "filename,prompt\na.png,old\n"})
    write(folder, {"a.png": "new", "sub/c.png": "one, two"})
    assert (folder / "metadata.csv").read_text() == (
        'filename,prompt\na.png,new\nsub/c.png,"one, two"\n')
    assert trained(folder) == {"a.png": "new", "b.png": "", "sub/c.png": "one, two"}


def test_a_sidecar_that_is_read_wins_over_an_empty_row(make: Make) -> None:
    folder = make(**{"metadata.csv": "filename,prompt\na.png,\nb.png,\n", "a.txt": "mine"})
    write(folder, {"a.png": "new", "b.png": "row"})
    assert (folder / "a.txt").read_text() == "new"
    assert (folder / "metadata.csv").read_text() == "filename,prompt\na.png,\nb.png,row\n"
    assert trained(folder) == {"a.png": "new", "b.png": "row", "sub/c.png": ""}


@pytest.mark.parametrize(("write_to", "file", "content"), [
    ("csv", "metadata.csv", 'filename,prompt\na.png,"x, y"\nsub/c.png,z\n'),
    ("jsonl", "metadata.jsonl", '{"file_name": "a.png", "text": "x, y"}\n'
                                '{"file_name": "sub/c.png", "text": "z"}\n'),
    ("caption", "a.caption", "x, y"), ("txt", "a.txt", "x, y")])
def test_on_demand(make: Make, write_to: str, file: str, content: str) -> None:
    folder = make()
    write(folder, {"a.png": "x, y", "sub/c.png": "z"}, write_to=write_to)
    assert (folder / file).read_text() == content
    assert trained(folder) == {"a.png": "x, y", "b.png": "", "sub/c.png": "z"}


def test_a_given_table_outside_the_folder(make: Make, tmp_path: Path) -> None:
    folder, table = make(), tmp_path / "out" / "labels.csv"
    store = Store(folder, table)
    assert perform(store.swaps({"sub/c.png": "cat"})) == []
    assert table.read_text() == "filename,prompt\nsub/c.png,cat\n"
    assert trained(folder, table)["sub/c.png"] == "cat"
    with pytest.raises(UserError) as caught:
        Store(folder, tmp_path / "labels.xlsx")
    assert caught.value.code == "captions.table_suffix"


def test_what_training_would_never_read_is_refused(make: Make) -> None:
    folder = make(**{"metadata.csv": "a.png,cat\nb.png,dog\n"})
    with pytest.raises(UserError, match="2 pictures have a caption in") as caught:
        Store(folder, write_to="txt")
    assert caught.value.code == "captions.shadowed"
    other = make(**{"a.txt": "cat", "metadata.csv": ""})
    with pytest.raises(UserError, match=r"a\.txt"):
        Store(other, write_to="caption")


def test_a_class_token_is_no_written_caption(make: Make) -> None:
    folder = make("5_cat/1.png")
    assert trained(folder) == {"5_cat/1.png": "cat"}
    assert Store(folder).captions == {"5_cat/1.png": ""}


def test_the_same_captions_as_training(make: Make) -> None:
    folder = make("a.png", "b.png", "c.png", "sub/d.png", "sub/e.png", **{
        "a.TXT": "one\ntwo", "b.caption": "three", "c.png.txt": "four", "c.caption": "no",
        "sub__metadata.jsonl": '{"file_name": "d", "text": ["x", "y"]}\n',
        "metadata.csv": "sub/d.png,far\nsub/e.png,near"})
    assert Store(folder).captions == trained(folder)


# --- what stays as it is ----------------------------------------------------------------------

def test_other_columns_header_delimiter_and_quotes(make: Make) -> None:
    text = ('id; FileName ;prompt;note\r\n1;"a.png";"old";"x;y"\r\n\r\n2; b.png;older ;  z\r\n'
            '3;gone.png;"kept ""so""";')
    folder = make(**{"metadata.csv": text})
    write(folder, {"a.png": 'new "q"', "b.png": "a;b"})
    assert (folder / "metadata.csv").read_bytes().decode() == (
        'id; FileName ;prompt;note\r\n1;"a.png";"new ""q""";"x;y"\r\n\r\n2; b.png;"a;b";  z\r\n'
        '3;gone.png;"kept ""so""";')


def test_quotes_everywhere_and_no_last_line_end(make: Make) -> None:
    folder = make(**{"metadata.csv": '"file_name","w","text"\n"a.png","8","x"'})
    write(folder, {"b.png": "y"})
    assert (folder / "metadata.csv").read_text() == (
        '"file_name","w","text"\n"a.png","8","x"\n"b.png","","y"\n')


def test_jsonl_keeps_its_other_values(make: Make) -> None:
    lines = ['{"id":1.10,"file_name":"a.png","text":"old","t":[1, 2]}',
             '  {"File_Name": "b.png", "tags": ["x", "y"], "prompt": ""}  ', "nonsense", "",
             '{"file_name": "sub/c.png"}']
    folder = make(**{"metadata.jsonl": "\r\n".join(lines)})
    write(folder, {"a.png": "n\\ew", "b.png": "one, two", "sub/c.png": "猫"})
    told = (folder / "metadata.jsonl").read_bytes().decode().split("\r\n")
    assert told == ['{"id":1.10,"file_name":"a.png","text":"n\\\\ew","t":[1, 2]}',
                    '  {"File_Name": "b.png", "tags": ["one", "two"], "prompt": ""}  ',
                    "nonsense", "", '{"file_name": "sub/c.png", "text": "猫"}']
    assert trained(folder) == {"a.png": "n\\ew", "b.png": "one, two", "sub/c.png": "猫"}


@pytest.mark.parametrize(("encoding", "mark"), [
    ("utf-8", b""), ("utf-8-sig", b"\xef\xbb\xbf"), ("gb18030", b"\xef\xbb\xbf"),
    ("utf-16", b"\xef\xbb\xbf")])
def test_encodings_of_tables(make: Make, encoding: str, mark: bytes) -> None:
    folder = make(**{"metadata.csv": "a.png,一只红色的猫\nb.png,狗\n".encode(encoding)})
    write(folder, {"b.png": "一条狗"})
    assert (folder / "metadata.csv").read_bytes() == mark + (
        "a.png,一只红色的猫\nb.png,一条狗\n").encode()
    assert trained(folder)["b.png"] == "一条狗"


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-8-sig"])
def test_sidecars_become_plain_utf_8_and_come_back(make: Make, encoding: str) -> None:
    old = "一只红色的猫\n坐着\n".encode(encoding)
    folder = make(**{"a.txt": old})
    store = Store(folder)
    swaps = store.swaps({"a.png": "狗"})
    perform(swaps)
    assert (folder / "a.txt").read_bytes().rstrip(b"\n") == "狗".encode()
    assert perform([swap.back for swap in swaps]) == []
    assert (folder / "a.txt").read_bytes() == old


def test_lines_stay_where_the_caption_does(make: Make) -> None:
    folder = make(**{"a.txt": "1girl, solo\nred hair\n"})
    store = Store(folder)
    assert store.entries["a.png"].several_lines
    assert store.swaps({"a.png": "1girl, solo, red hair"}) == []
    write(folder, {"a.png": "1girl"})
    assert (folder / "a.txt").read_text() == "1girl\n"


def test_links_and_permissions_stay(make: Make, tmp_path: Path) -> None:
    folder = make(**{"b.txt": "x"})
    target = tmp_path / "elsewhere.txt"
    target.write_text("linked")
    (folder / "a.txt").symlink_to(target)
    (folder / "b.txt").chmod(0o600)
    write(folder, {"a.png": "new", "b.png": "new"})
    assert (folder / "a.txt").is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE((folder / "b.txt").stat().st_mode) == 0o600


# --- what is left alone -----------------------------------------------------------------------

def test_edits_from_elsewhere_are_left(make: Make) -> None:
    folder = make(**{"a.txt": "old"})
    store = Store(folder)
    swaps = store.swaps({"a.png": "new", "b.png": "new"})
    (folder / "a.txt").write_text("by hand")
    (folder / "b.txt").write_text("by hand too")
    assert [swap.picture for swap in perform(swaps)] == ["a.png", "b.png"]
    assert (folder / "a.txt").read_text() == "by hand"
    assert (folder / "b.txt").read_text() == "by hand too"


def test_a_row_is_left_and_the_others_are_written(make: Make) -> None:
    folder = make(**{"metadata.csv": "filename,prompt\na.png,old\nb.png,old\n"})
    store = Store(folder)
    swaps = store.swaps({"a.png": "new", "b.png": "new", "sub/c.png": "new"})
    (folder / "metadata.csv").write_text(
        "filename,prompt\nx.png,more\nb.png,by hand\na.png,old\nsub/c.png,by hand\n")
    assert [swap.picture for swap in perform(swaps)] == ["b.png", "sub/c.png"]
    assert (folder / "metadata.csv").read_text() == (
        "filename,prompt\nx.png,more\nb.png,by hand\na.png,new\nsub/c.png,by hand\n")


def test_a_table_that_went_away(make: Make) -> None:
    folder = make(**{"metadata.csv": "a.png,old\n"})
    swaps = Store(folder).swaps({"a.png": "new"})
    (folder / "metadata.csv").unlink()
    assert perform(swaps) == swaps
    assert not (folder / "metadata.csv").exists()


def test_shared_rows_and_binary_sidecars_are_locked(make: Make) -> None:
    folder = make("a.png", "a.jpg", "b.png", **{"metadata.csv": "a,both\n",
                                                "b.txt": bytes(range(256))})
    store = Store(folder)
    assert {entry.name: entry.locked for entry in store.entries.values()} == {
        "a.png": "shared_row", "a.jpg": "shared_row", "b.png": "not_text"}
    assert store.swaps({"a.png": "x", "b.png": "x"}) == []


def test_going_on_after_an_edit(make: Make) -> None:
    folder = make(**{"metadata.csv": "a.png,old\n", "b.txt": "x"})
    store = Store(folder)
    for text in ("one", "two, three", ""):
        swaps = store.swaps({"a.png": text, "b.png": text, "sub/c.png": text})
        assert perform(swaps) == []
        store.accept(swaps)
        assert store.captions == {"a.png": text, "b.png": text, "sub/c.png": text}
        assert Store(folder).captions == store.captions


# --- disks and permissions --------------------------------------------------------------------

@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Files can't grow beyond a size: as a full disk, for this process only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_half_written(
        make: Make, small_files: Callable[[int], None]) -> None:
    rows = "".join(f"{i}.png,caption {i}\n" for i in range(200))
    folder = make(**{"metadata.csv": "a.png,old\n" + rows, "b.txt": "old"})
    before = (folder / "metadata.csv").read_bytes()
    swaps = Store(folder).swaps({"a.png": "x" * 5000, "b.png": "y" * 5000})
    small_files(2000)
    with pytest.raises(UserError) as caught:
        perform(swaps)
    small_files(resource.RLIM_INFINITY)
    assert caught.value.code == "captions.disk_full"
    assert "metadata.csv" in str(caught.value)
    assert (folder / "metadata.csv").read_bytes() == before
    assert (folder / "b.txt").read_text() == "old"
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_a_really_full_disk(tmp_path: Path) -> None:
    """On a file system of 64 KiB, where this machine lets a test mount one."""
    code = """
import os, subprocess, sys
from pathlib import Path
disk = Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]).returncode:
    sys.exit(77)
from PIL import Image
from captioner.captions.store import Store
from captioner.captions.edits import perform
from core.errors import UserError
Image.new("RGB", (8, 8)).save(disk / "a.png")
(disk / "a.txt").write_text("old")
swaps = Store(disk).swaps({"a.png": "new " * 5000})
try:
    (disk / "filler").write_bytes(bytes(10**6))
except OSError:
    pass
try:
    perform(swaps)
except UserError as fault:
    print(fault.code, (disk / "a.txt").read_text(), sorted(os.listdir(disk)))
"""
    done = subprocess.run(["unshare", "--mount", sys.executable, "-c", code, str(tmp_path)],
                          capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[2]) if sys.platform == "linux" else None
    if done is None or done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert done.stdout.strip() == "captions.disk_full old ['a.png', 'a.txt', 'filler']", done.stderr


def test_a_read_only_file_stays(make: Make) -> None:
    folder = make(**{"a.txt": "old"})
    (folder / "a.txt").chmod(0o444)
    with pytest.raises(UserError) as caught:
        perform(Store(folder).swaps({"a.png": "new"}))
    assert caught.value.code == "captions.read_only"
    assert (folder / "a.txt").read_text() == "old"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder(make: Make) -> None:
    folder = make()
    folder.chmod(0o555)
    with pytest.raises(UserError) as caught:
        check_writable([folder])
    folder.chmod(0o755)
    assert caught.value.code == "captions.read_only"


def test_a_read_only_file_system(tmp_path: Path) -> None:
    code = """
import subprocess, sys
from pathlib import Path
disk = Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk]).returncode:
    sys.exit(77)
from captioner.captions.edits import check_writable
from core.errors import UserError
try:
    check_writable([disk])
except UserError as fault:
    print(fault.code)
"""
    done = subprocess.run(["unshare", "--mount", sys.executable, "-c", code, str(tmp_path)],
                          capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[2]) if sys.platform == "linux" else None
    if done is None or done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert done.stdout.strip() == "captions.read_only", done.stderr


# --- properties -------------------------------------------------------------------------------

TEXT = st.text(alphabet='ab,;"\t 猫。\\\n', max_size=20)
NAMES = st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=6)


@settings(deadline=None, max_examples=150)
@given(NAMES, st.data())
def test_any_table_keeps_all_but_the_changed_caption(
        tmp_path_factory: pytest.TempPathFactory, numbers: list[int], data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("csv") / "metadata.csv"
    rows = [(f"{n}.png", data.draw(TEXT), data.draw(TEXT)) for n in numbers]
    file = io.StringIO(newline="")
    delimiter = data.draw(st.sampled_from(",;\t"))
    csv.writer(file, delimiter=delimiter, quoting=data.draw(st.sampled_from(
        (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))).writerows([("filename", "prompt", "note"), *rows])
    table = Table(path, file.getvalue().encode())
    assert decode_text(table.to_bytes()) == file.getvalue()
    at, new = data.draw(st.integers(0, len(rows) - 1)), one_line(one_line(data.draw(TEXT)))
    record = table.rows(rows[at][0])[0]
    record.raw = table.syntax.with_caption(record.raw, new)
    assert table.syntax.caption_of(record.raw) == new
    path.write_bytes(table.to_bytes())
    assert [(row.name, row.caption) for row in read_metadata(path)[0]] == [
        (name, new if i == at else one_line(caption))
        for i, (name, caption, _) in enumerate(rows)]
    read = list(csv.reader(io.StringIO(decode_text(path.read_bytes()), newline=""),
                           delimiter=delimiter))
    assert [row[2] for row in read[1:]] == [note for _, _, note in rows]


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4), TEXT, TEXT, st.booleans(),
       st.booleans())
def test_any_json_line_keeps_its_other_values(
        extra: dict[str, object], old: str, new: str, ascii_only: bool, compact: bool) -> None:
    extra = {key: value for key, value in extra.items() if plain_key(key) not in {
        *NAME_KEYS, *CAPTION_KEYS}}
    line = json.dumps({**extra, "file_name": "a.png", "text": old, "z": 1},
                      ensure_ascii=ascii_only, separators=(",", ":") if compact else None)
    table = Table(Path("m.jsonl"), line.encode())
    (record,) = table.rows("a.png")
    assert record.caption == one_line(old)
    changed = table.syntax.with_caption(record.raw, one_line(new))
    assert json.loads(changed) == {**extra, "file_name": "a.png", "text": one_line(new), "z": 1}
    assert list(json.loads(changed)) == list(json.loads(line))


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet='a.png,;"\t {}[]:\\\n\r\x01猫', max_size=40).map(
    str.encode), st.sampled_from(("m.csv", "m.jsonl")))
@example(b'"\x01', "m.csv")                                 # a quote that nobody closed
def test_any_bytes_come_back_or_are_refused(data: bytes, name: str) -> None:
    try:
        table = Table(Path(name), data)
    except (ValueError, UserError):
        return
    told = table.to_bytes()
    assert Table(Path(name), told).to_bytes() == told
    assert read(told).text == read(data).text
    for record in table.records:
        if record.name:
            raw = table.syntax.with_caption(record.raw, "new, caption")
            assert table.syntax.caption_of(raw) == "new, caption"
            assert list(table.syntax.records(raw + "\n"))[-1].raw == raw        # one record still


@pytest.mark.parametrize("row", ['a.png,"old', 'a.png,"old\n', 'a.png,x"y', 'a.png,"x"y"z',
                                 '"a.png', '"a.png"x,old', 'a.png,"x""', 'a.png, "x", "y'])
def test_odd_quotes_cost_no_neighbour(make: Make, row: str) -> None:
    folder = make(**{"metadata.csv": f"b.png,first\n{row}"})
    before = trained(folder)
    write(folder, {"sub/c.png": "three"})
    assert trained(folder) == before | {"sub/c.png": "three"}
    write(folder, {"sub/c.png": "four", "a.png": "new, one"})
    assert trained(folder) == {"a.png": "new, one", "b.png": "first", "sub/c.png": "four"}


def test_an_endless_quote_costs_its_own_row_alone(make: Make) -> None:
    """It is longer than a field of a .csv may be."""
    folder = make(**{"metadata.csv": 'b.png,first\na.png,"x\n' + f"{'x' * 99}\n" * 1400})
    assert Store(folder).captions == trained(folder) == {
        "a.png": "x", "b.png": "first", "sub/c.png": ""}


def test_letters_that_would_be_taken_for_chinese(make: Make) -> None:
    folder = make()
    write(folder, {"a.png": "À", "b.png": "café"})
    assert trained(folder)["a.png"] == "À"
    assert (folder / "b.txt").read_bytes() == "café".encode()


def test_history_and_store_agree_on_a_folder(make: Make) -> None:
    folder = make()
    assert History(folder).folder == Store(folder).folder
