"""Small WebP pictures of large ones, made once and kept in the cache folder. Pillow only.

A thumbnail is known by the path, time of change and size of its picture: a picture that changed
gets a new one, and the old one is never shown for it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from core import paths
from core.dataset import images
from core.errors import UserError

SIDE = 256                      # px of the longer side
VIEW = 1024                     # px: one picture by itself
QUALITY = 80                    # of WebP
MOST_BYTES = 512 * 2**20        # kept from one start to the next

# A browser asks for a whole page at once; each picture under way may take 100 MB.
_slots = threading.BoundedSemaphore(max(1, min(os.cpu_count() or 1, 4)))


def thumbnail(picture: Path, side: int = SIDE) -> Path:
    """The WebP file of a picture, upright, over white; safe to call from several threads.

    Raises UserError where the picture can't be decoded, OSError where nothing can be written.
    """
    small = place_of(picture, side)
    with contextlib.suppress(OSError):
        if time.time() - small.stat().st_mtime > 86_400:
            os.utime(small)                 # still wanted: see prune
        return small
    with _slots:
        if not small.is_file():             # another thread may have made it meanwhile
            _make(picture, small, side)
    return small


def stamp(picture: Path) -> str:
    """Differs when the picture does; "" where there is none."""
    try:
        facts = picture.stat()
    except OSError:
        return ""
    return f"{facts.st_mtime_ns:x}-{facts.st_size:x}"


def place_of(picture: Path, side: int = SIDE) -> Path:
    text = f"{os.fsencode(picture)!r} {stamp(picture)} {side}"
    key = blake2b(text.encode(), digest_size=16).hexdigest()
    return paths.cache_dir() / "thumbs" / key[:2] / f"{key}.webp"


def prune(most: int = MOST_BYTES) -> None:
    """Keeps `most` bytes of thumbnails, those that were wanted last."""
    found = []
    for path in (paths.cache_dir() / "thumbs").glob("*/*.webp"):
        with contextlib.suppress(OSError):
            facts = path.stat()
            found.append((facts.st_mtime, facts.st_size, path))
    for _, size, path in sorted(found, reverse=True):
        most -= size
        if most < 0:
            path.unlink(missing_ok=True)


def _make(picture: Path, small: Path, side: int) -> None:
    images.prepare()
    decoded = images.decode(picture, least=side)
    try:
        image = images.plain(decoded.image)
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        with paths.atomic(small) as fresh:
            image.save(fresh, "WEBP", quality=QUALITY, method=2)
    except (UserError, OSError):
        raise
    except Exception as error:              # a palette that is too short, for example
        raise images.damage(picture, error) from None
