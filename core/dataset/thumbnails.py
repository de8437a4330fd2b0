"""Thumbnails: small WebP pictures, made once and kept in the cache folder. Pillow only.

A thumbnail is named by the path, time of change and size of its picture, so that the old one is
never shown for a picture that changed.
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
MOST_BYTES = 512 * 2**20        # on disk from one start to the next

# A browser asks for a whole page at once; each picture under way may take 100 MB.
_slots = threading.BoundedSemaphore(max(1, min(os.cpu_count() or 1, 4)))


def thumbnail(picture: Path, side: int = SIDE) -> Path:
    """Returns the WebP file of a picture, upright and over white. Several threads may call it.

    Raises UserError where the picture can't be decoded, OSError where nothing can be written.
    """
    small = place_of(picture, side)
    with contextlib.suppress(OSError):
        # The time of change says when it was last wanted, see prune; a day is exact enough.
        if time.time() - small.stat().st_mtime > 86_400:
            os.utime(small)
        return small
    with _slots:
        # Another thread may have made it while this one waited.
        if small.is_file():
            return small
        images.prepare()
        decoded = images.decode(picture, least=side)
        try:
            image = images.plain(decoded.image)
            image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
            with paths.atomic(small) as fresh:
                image.save(fresh, "WEBP", quality=QUALITY, method=2)
        except (UserError, OSError):
            raise
        except Exception as error:
            # Pillow raises nearly anything, for a palette that is too short for example.
            raise images.damage(picture, error) from None
    return small


def stamp(picture: Path) -> str:
    """Returns a text that changes when the picture does, "" where there is no picture."""
    try:
        stat = picture.stat()
    except OSError:
        return ""
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}"


def place_of(picture: Path, side: int = SIDE) -> Path:
    """Returns where the thumbnail of a picture lies, or will lie."""
    text = f"{os.fsencode(picture)!r} {stamp(picture)} {side}"
    key = blake2b(text.encode(), digest_size=16).hexdigest()
    return paths.cache_dir() / "thumbs" / key[:2] / f"{key}.webp"


def prune(most: int = MOST_BYTES) -> None:
    """Deletes thumbnails until `most` bytes are left: those that were wanted last stay."""
    files = []
    for path in (paths.cache_dir() / "thumbs").glob("*/*.webp"):
        with contextlib.suppress(OSError):
            stat = path.stat()
            files.append((stat.st_mtime, stat.st_size, path))
    for _, size, path in sorted(files, reverse=True):
        most -= size
        if most < 0:
            path.unlink(missing_ok=True)
