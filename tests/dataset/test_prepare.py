"""`dataset prepare`: right copies in a new folder, the originals as they were, resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

import launcher
from core import i18n, paths
from core.dataset import buckets, curation, image_folder
from core.dataset.prepare import LOG, Prepared, prepare
from core.dataset.render_copy import Options
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Event, Phase
from tests.drawn import clouds, discs, facts_for, save

FACTS = facts_for((128, 128), 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "mine"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "copies"


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.read_bytes())
            for p in folder.rglob("*") if p.is_file()}


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")
            if p.is_file() and p.name != LOG}


def log(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / LOG).read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines[1:]]
    for entry in entries:
        for one in entry["did"]:
            for language in i18n.LANGUAGES:
                assert "{" not in i18n.tr(one["key"], one, language)
                assert one["key"] in i18n.catalogue(language)
    return {entry["name"]: entry for entry in entries}


def did(out: Path, name: str) -> list[str]:
    return [one["key"].removeprefix("checks.did_") for one in log(out)[name]["did"]]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# --- what is done -----------------------------------------------------------------------------

def test_untouched_pictures_are_copied_byte_for_byte(folder: Path, out: Path) -> None:
    for name in ("a.png", "b.jpg", "3_x/c.webp", "d.bmp", "e.gif", "f.tiff", "g.avif"):
        save(clouds((40, 30)), folder / name, "a caption")
    before = state(folder)
    done = prepare(folder, out, Options())
    assert done == Prepared(out, out / LOG, 7, 0, 0, 0)
    assert {n: b for n, (_, b) in state(out).items() if n != LOG} == {
        n: b for n, (_, b) in before.items()}
    assert state(folder) == before
    assert did(out, "3_x/c.webp") == ["copy"]


@pytest.mark.parametrize("to", ["png", "jpg", "webp"])
def test_convert(folder: Path, out: Path, to: Any) -> None:
    for name in ("a.png", "b.webp", "c.bmp", "d.gif", "e.avif"):
        save(clouds((40, 30)), folder / name, "x")
    prepare(folder, out, Options(convert=to))
    assert {n for n in files(out) if not n.endswith(".txt")} == {
        f"{stem}.{to}" for stem in "abcde"}
    for path in out.glob(f"*.{to}"):
        with Image.open(path) as image:
            assert image.format == {"jpg": "JPEG"}.get(to, to.upper())
            assert image.size == (40, 30)
    error = np.abs(pixels(out / f"a.{to}") - pixels(folder / "a.png"))
    assert error.mean() < (2 if to == "jpg" else 1e-9)


def test_pictures_are_turned_upright_and_profiles_become_srgb(folder: Path, out: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = clouds((60, 40)).transpose(Image.Transpose.ROTATE_90)
    save(stored, folder / "turned.jpg", exif=exif, quality=95, subsampling=0)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save(clouds((30, 30)), folder / "profile.webp", icc_profile=profile)
    prepare(folder, out, Options(convert="png"))
    assert did(out, "turned.jpg") == ["turn", "convert"]
    assert np.abs(pixels(out / "turned.png") - np.asarray(clouds((60, 40))).astype(int)).mean() < 3
    with Image.open(out / "profile.png") as image:
        assert "icc_profile" not in image.info
        assert image.getexif().get(0x0112) is None


def test_transparency_stays_where_the_format_can_hold_it(folder: Path, out: Path) -> None:
    image = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 20))
    save(image, folder / "a.png")
    prepare(folder, out, Options(convert="webp"))
    with Image.open(out / "a.webp") as kept:
        assert kept.convert("RGBA").getpixel((5, 5))[3] == 0
        assert kept.convert("RGBA").getpixel((30, 5)) == (255, 0, 0, 255)
    flat = out.with_name("flat")
    prepare(folder, flat, Options(convert="jpg", background="#00ff00"))
    assert np.abs(pixels(flat / "a.jpg")[5, 5] - (0, 255, 0)).max() < 12
    assert did(flat, "a.png")[0] == "flatten"


def test_crop_is_what_training_sees(folder: Path, out: Path) -> None:
    save(clouds((400, 150)), folder / "a.png")
    save(clouds((150, 400), 1), folder / "b.png")
    curation.set_focus(folder, {"b.png": (0.5, 1)})
    prepare(folder, out, Options(crop=True), facts=FACTS)
    for name, size, focus in (("a.png", (400, 150), None), ("b.png", (150, 400), (0.5, 1))):
        bucket = FACTS.assign([size])[0]
        trained = buckets.fit_picture(Image.open(folder / name), bucket, focus).astype(int)
        again = buckets.fit_picture(Image.open(out / name), bucket).astype(int)
        assert np.abs(trained - again).mean() < 2
    assert did(out, "b.png") == ["crop"]


def test_resize_shrinks_only(folder: Path, out: Path) -> None:
    save(clouds((400, 200)), folder / "large.png")
    save(clouds((90, 60)), folder / "small.png")
    prepare(folder, out, Options(resize=100))
    assert Image.open(out / "large.png").size == (200, 100)
    assert Image.open(out / "small.png").size == (90, 60)
    assert (did(out, "large.png"), did(out, "small.png")) == (["resize"], ["copy"])


def test_bars_go(folder: Path, out: Path) -> None:
    image = Image.new("RGB", (200, 160))
    image.paste(clouds((200, 100)), (0, 30))
    save(image, folder / "film.png")
    save(clouds((100, 100), 4), folder / "plain.png")
    curation.set_focus(folder, {"film.png": (0.5, 0.5)})
    prepare(folder, out, Options(remove_borders=True))
    made = pixels(out / "film.png")
    assert made.shape == (98, 200, 3)
    np.testing.assert_array_equal(made, np.asarray(clouds((200, 100))).astype(int)[1:-1])
    assert did(out, "plain.png") == ["copy"]


def test_the_best_copy_is_kept(folder: Path, out: Path) -> None:
    for seed in range(3):
        save(discs((128, 128), seed), folder / f"{seed}.png", f"caption {seed}")
    save(discs((128, 128), 0).resize((64, 64)), folder / "0-small.jpg", "small", quality=70)
    (folder / "1-twin.png").write_bytes((folder / "1.png").read_bytes())
    done = prepare(folder, out, Options(dedupe=True))
    assert (done.written, done.dropped) == (3, 2)
    kept = {Path(name).stem for name in files(out)}
    assert kept >= {"0", "2"}
    assert len({"1", "1-twin"} & kept) == 1
    assert log(out)["0-small.jpg"]["did"][0]["best"] == "0.png"


def test_left_out_pictures_stay_out(folder: Path, out: Path) -> None:
    save(clouds(), folder / "a.png")
    save(clouds(seed=1), folder / "b.png")
    curation.leave_out(folder, ["b.png"])
    prepare(folder, out, Options())
    assert files(out) == {"a.png"}


# --- captions ---------------------------------------------------------------------------------

def test_captions_come_along_from_wherever_they_are(folder: Path, out: Path) -> None:
    save(clouds(), folder / "a.png")
    (folder / "a.txt").write_bytes("一只猫\n第二行".encode("gb18030"))
    save(clouds(seed=1), folder / "b.png")
    (folder / "b.caption").write_text("from .caption")
    save(clouds(seed=2), folder / "c.png")
    (folder / "metadata.csv").write_text("filename,prompt\nc.png,from a table\n")
    save(clouds(seed=3), folder / "5_sks" / "d.png")
    save(clouds(seed=4), folder / "e.png")
    prepare(folder, out, Options())
    assert files(out) - {"a.png", "b.png", "c.png", "e.png", "5_sks/d.png"} == {
        "a.txt", "b.caption", "c.txt"}
    assert (out / "a.txt").read_text("utf-8") == "一只猫\n第二行"
    told = {p.path.name: (p.caption, p.repeats) for p in image_folder.scan(folder).pictures}
    assert {p.path.name: (p.caption, p.repeats) for p in image_folder.scan(out).pictures} == told


def test_two_pictures_of_one_stem_keep_their_captions(folder: Path, out: Path) -> None:
    save(clouds(), folder / "a.png", "both")
    save(clouds(seed=1), folder / "a.jpg")
    save(clouds(seed=2), folder / "a-2.png", "another")
    prepare(folder, out, Options(convert="png"))
    assert len([n for n in files(out) if n.endswith(".png")]) == 3
    captions = sorted((out / n).read_text().strip() for n in files(out) if n.endswith(".txt"))
    assert captions == ["another", "both", "both"]


# --- the folder for the copies ----------------------------------------------------------------

@pytest.mark.parametrize("where", ["mine", "mine/new", "mine/../mine/new", "link/new"])
def test_never_inside_the_users_folder(tmp_path: Path, folder: Path, where: str) -> None:
    save(clouds(), folder / "a.png")
    (tmp_path / "link").symlink_to(folder)
    before = state(folder)
    with pytest.raises(UserError) as caught:
        prepare(folder, tmp_path / where, Options())
    assert caught.value.code == "checks.out_inside"
    assert state(folder) == before


def test_never_into_a_folder_that_holds_something(folder: Path, out: Path) -> None:
    save(clouds(), folder / "a.png")
    save(clouds(), out / "theirs.png")
    for target in (out, folder.parent, out / "theirs.png"):
        with pytest.raises(UserError) as caught:
            prepare(folder, target, Options())
        assert caught.value.code == "checks.out_not_empty"
    assert files(out) == {"theirs.png"}


def test_other_options_need_another_folder(folder: Path, out: Path) -> None:
    save(clouds(), folder / "a.png")
    prepare(folder, out, Options())
    for options in (Options(convert="jpg"), Options(dedupe=True)):
        with pytest.raises(UserError) as caught:
            prepare(folder, out, options)
        assert caught.value.code == "checks.out_other"


def test_a_file_of_someone_else_is_left_alone(folder: Path, out: Path) -> None:
    save(clouds(), folder / "a.png")
    prepare(folder, out, Options())
    save(clouds(seed=1), folder / "b.png")
    (out / "b.png").write_bytes(b"theirs")
    done = prepare(folder, out, Options())
    assert (done.written, done.failed, done.before) == (1, 1, 1)
    assert (out / "b.png").read_bytes() == b"theirs"
    assert log(out)["b.png"]["fault"] == "checks.target_taken"


# --- resuming ---------------------------------------------------------------------------------

def test_a_stopped_run_goes_on(folder: Path, out: Path) -> None:
    for i in range(60):
        save(clouds((20, 20), i), folder / f"{i:02}.png", f"n {i}")
    control = Control()

    def emit(event: Event) -> None:
        if isinstance(event, Phase) and event.name == "prepare" and event.done >= 20:
            control.ask("stop")

    first = prepare(folder, out, Options(convert="jpg"), emit=emit, control=control)
    assert first.stopped
    assert 20 <= first.written < 60
    second = prepare(folder, out, Options(convert="jpg"))
    assert (second.written, second.before) == (60, first.written)
    assert len(files(out)) == 120


def test_only_what_changed_is_done_again(folder: Path, out: Path) -> None:
    for i in range(3):
        save(clouds((20, 20), i), folder / f"{i}.png", f"n {i}")
    prepare(folder, out, Options())
    save(clouds((30, 30), 9), folder / "1.png")
    (folder / "2.txt").write_text("another")
    assert prepare(folder, out, Options()).before == 1
    assert Image.open(out / "1.png").size == (30, 30)
    assert (out / "2.txt").read_text() == "another"


@settings(deadline=None, max_examples=25,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 2000))
def test_a_log_torn_anywhere_is_mended(tmp_path: Path, cut: int) -> None:
    folder, out = tmp_path / "in", tmp_path / f"out{time.monotonic_ns()}"
    if not folder.exists():
        for i in range(4):
            save(clouds((16, 16), i), folder / f"{i}.png", f"n {i}")
    prepare(folder, out, Options())
    whole = (out / LOG).read_bytes()
    header = whole.index(b"\n") + 1
    (out / LOG).write_bytes(whole[:header + cut % (len(whole) - header)])
    assert prepare(folder, out, Options()).written == 4
    assert len(log_lines(out)) >= 4
    assert prepare(folder, out, Options()).before == 4


def log_lines(out: Path) -> list[dict[str, Any]]:
    found = []
    for line in (out / LOG).read_bytes().splitlines()[1:]:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_leaves_no_half_picture(folder: Path, out: Path) -> None:
    for i in range(100):
        save(clouds((100, 100), i), folder / f"{i:03}.png")
    code = ("from pathlib import Path; from core.dataset.prepare import prepare; "
            "from core.dataset.render_copy import Options; import sys; "
            "prepare(Path(sys.argv[1]), Path(sys.argv[2]), Options(convert='webp'))")
    process = subprocess.Popen([sys.executable, "-c", code, str(folder), str(out)],
                               cwd=paths.ROOT)
    until = time.monotonic() + 60
    while len(list(out.glob("*.webp"))) < 10 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    some = list(out.glob("*.webp"))
    assert len(some) >= 10
    for path in some:
        with Image.open(path) as image:
            image.load()
    done = prepare(folder, out, Options(convert="webp"))
    assert (done.written, done.failed) == (100, 0)
    assert done.before >= 5


# --- faults -----------------------------------------------------------------------------------

def test_a_full_disk_is_one_sentence(
        folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        save(clouds((20, 20), i), folder / f"{i}.png")
    real = paths.write_atomic

    def full(path: Path, content: str | bytes) -> None:
        if path.suffix == ".png" and path.stem == "2":
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr("core.paths.write_atomic", full)
    with pytest.raises(UserError) as caught:
        prepare(folder, out, Options())
    assert caught.value.code == "checks.cannot_write"
    assert "No space left" in str(caught.value)
    monkeypatch.undo()
    assert prepare(folder, out, Options()).written == 4


def test_a_bad_colour_is_told_and_pictures_that_cant_be_read_are_skipped(
        folder: Path, out: Path) -> None:
    image = clouds((20, 20)).convert("RGBA")
    image.putalpha(9)
    save(image, folder / "a.png")
    with pytest.raises(UserError) as caught:
        prepare(folder, out, Options(convert="jpg", background="nocolour"))
    assert caught.value.code == "checks.nothing_written"
    assert "nocolour" in str(caught.value)
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n....")
    assert prepare(folder, out.with_name("other"), Options()).written == 1


# --- the command ------------------------------------------------------------------------------

@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    rooms = [room for room in launcher.ROOMS if room != "core.cli.dataset"]
    monkeypatch.setattr(launcher, "ROOMS", (*rooms, "core.cli.dataset"))
    monkeypatch.setattr(launcher, "_prepared", lambda argv: None)
    return lambda *argv: launcher.main(["dataset", "prepare", *map(str, argv)])


def test_the_command(folder: Path, out: Path, command: Any, capsys: Any) -> None:
    for i in range(3):
        save(clouds((300, 200), i), folder / f"{i}.png", f"n {i}")
    arguments = (folder, "--out", out, "--convert", "jpg", "--resize", "64", "--crop",
                 "--dedupe", "--remove-borders")
    assert command(*arguments) == 0
    assert f"3 pictures written to {out}" in capsys.readouterr().out
    assert command(*arguments, "--json") == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["ok"], answer["written"], answer["before"]) == (True, 3, 3)


@pytest.mark.parametrize("wrong", [("--resize", "3"), ("--out", "."), ("--convert", "tga")])
def test_bad_input_is_exit_2(folder: Path, command: Any, capsys: Any, wrong: tuple[str, str],
                             monkeypatch: pytest.MonkeyPatch) -> None:
    save(clouds(), folder / "a.png")
    monkeypatch.chdir(folder)
    assert command(folder, "--out", folder.with_name("new"), *wrong) == 2
    assert "Traceback" not in capsys.readouterr().err
