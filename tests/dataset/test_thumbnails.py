from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from core import paths
from core.dataset import thumbnails
from core.errors import UserError


def picture(path: Path, size: tuple[int, int] = (800, 400), colour: str = "red") -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def test_a_thumbnail_is_small_and_made_once(tmp_path: Path) -> None:
    small = thumbnails.thumbnail(picture(tmp_path / "a.png"))
    made = small.stat().st_mtime_ns
    with Image.open(small) as image:
        assert image.size == (256, 128)
        assert image.format == "WEBP"
    assert small.is_relative_to(paths.cache_dir())
    assert thumbnails.thumbnail(tmp_path / "a.png") == small
    assert small.stat().st_mtime_ns == made
    with Image.open(thumbnails.thumbnail(tmp_path / "a.png", thumbnails.VIEW)) as image:
        assert image.size == (800, 400)                 # nothing is enlarged


def test_a_changed_picture_gets_a_new_one(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    first, mark = thumbnails.thumbnail(path), thumbnails.stamp(path)
    picture(path, colour="blue")
    os.utime(path, ns=(1, 1))
    assert thumbnails.stamp(path) != mark
    with Image.open(thumbnails.thumbnail(path)) as image:
        assert image.convert("RGB").getpixel((5, 5))[2] > 200
    assert thumbnails.thumbnail(path) != first
    assert thumbnails.stamp(tmp_path / "none.png") == ""


def test_it_stands_upright_over_white(tmp_path: Path) -> None:
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (600, 300), "red").save(turned, exif=exif)
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(clear)
    with Image.open(thumbnails.thumbnail(turned)) as image:
        assert image.size == (128, 256)
    with Image.open(thumbnails.thumbnail(clear)) as image:
        assert min(image.convert("RGB").getpixel((20, 20))) > 250


def test_torn_files_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError):
        thumbnails.thumbnail(path)
    assert not list((paths.cache_dir() / "thumbs").rglob("*.webp"))


def test_many_threads_agree(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", (1200, 1200))
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: thumbnails.thumbnail(path), range(32)))
    assert len(found) == 1
    assert len(list((paths.cache_dir() / "thumbs").rglob("*"))) == 2    # a folder, a file


def test_those_wanted_last_are_kept(tmp_path: Path) -> None:
    made = [thumbnails.thumbnail(picture(tmp_path / f"{n}.png")) for n in range(3)]
    for days, small in ((9, made[0]), (5, made[1]), (7, made[2])):
        os.utime(small, (time.time() - 86_400 * days,) * 2)
    thumbnails.thumbnail(tmp_path / "0.png")            # looked at again
    thumbnails.prune(2 * max(small.stat().st_size for small in made))
    assert [small.exists() for small in made] == [True, True, False]
    thumbnails.prune()
    assert made[0].exists()
