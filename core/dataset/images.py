"""One picture file: is it whole, how large is it, and its pixels as plain RGB. Pillow only."""

from __future__ import annotations

import io
import re
import threading
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageCms,
    ImageColor,
    ImageFile,
    PngImagePlugin,
    UnidentifiedImageError,
)

from core.errors import UserError

# Text and profiles in a PNG may be large: workflows of node editors, print profiles.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**28
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "AVIF", "TIFF", "GIF")
MAX_MEGAPIXELS = 175                        # more is a bomb; below Pillow's own limit of 179
BIG = 24_000_000                            # px; such pictures are decoded one at a time

Look = tuple[tuple[int, int], bool]         # size as seen, whether some pixel is not opaque


@dataclass(frozen=True, slots=True)
class Decoded:
    """The first frame of a file, upright."""

    image: Image.Image                      # any mode; a JPEG may be smaller than `size`
    size: tuple[int, int]                   # width, height as seen
    format: str                             # "JPEG", "PNG" ...
    animated: bool                          # or with several pages
    turned: bool                            # EXIF says that the stored pixels lie otherwise
    tables: dict[int, list[int]] = field(default_factory=dict)      # of a JPEG's quantisation


_OTHERS = ((b"\xff\x0a", "JPEG XL"), (b"\0\0\0\x0cJXL ", "JPEG XL"), (b"8BPS", "PSD"),
           (b"%PDF", "PDF"), (b"<!DOCTYPE html", "HTML"), (b"<!doctype html", "HTML"),
           (b"<html", "HTML"), (b"<svg", "SVG"), (b"PK\x03\x04", "ZIP"),
           (b"\0\0\0\x0cjP  ", "JPEG 2000"), (b"\x1a\x45\xdf\xa3", "WebM"))
# By the orientation in EXIF; 5 to 8 are those of pictures that lie on a side.
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
          4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
          6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}
_one_big = threading.Lock()

# Pillow warns on stderr about odd metadata and large pictures. We judge sizes ourselves, and
# warnings.catch_warnings() isn't safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def prepare() -> None:
    """Loads Pillow's readers; call it before threads need them."""
    Image.init()


def look_at(path: Path) -> Look | UserError:
    """Decodes the whole picture, so that a damaged one is found now and not in the training."""
    try:
        decoded = decode(path, least=1)
        return decoded.size, is_see_through(decoded.image)
    except UserError as fault:
        return fault
    except Exception as error:
        return damage(path, error)


def open_picture(path: Path, background: str | None = "white") -> Image.Image:
    """Returns the picture upright, as RGB in sRGB, with transparent parts over `background`.

    With None as background they stay: then it is RGBA, if some pixel is not opaque. Raises
    UserError when it can't be decoded or the colour's name has no meaning.
    """
    try:
        colour = None if background is None else ImageColor.getrgb(background.strip())[:3]
    except ValueError:
        raise UserError("dataset.bad_colour", colour=background) from None
    image = decode(path).image
    try:
        image = _to_8_bit(image)
        if colour is None and is_see_through(image):
            return _painted(image)
        return _flat(image, colour or (0, 0, 0))
    except Exception as error:
        # A palette that is too short, for example.
        raise damage(path, error) from None


# --- decoding ---------------------------------------------------------------------------------

def decode(path: Path, least: int | None = None) -> Decoded:
    """Decodes a picture and turns it upright.

    With `least`, a JPEG's data is read in full, but its pixels come at 1/2, 1/4 or 1/8 size as long
    as the shorter side keeps `least` px, which is several times faster. Raises UserError for all
    that keeps a picture from being decoded in full.
    """
    try:
        if path.stat().st_size == 0:
            raise UserError("dataset.empty", file=path)
        with Image.open(path, formats=FORMATS) as image:
            return _upright(image, path, least)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except UnidentifiedImageError:
        raise _unknown(path) from None
    except Exception as error:
        # Readers raise nearly anything on damaged data.
        raise damage(path, error) from None


def _upright(image: ImageFile.ImageFile, path: Path, least: int | None) -> Decoded:
    width, height = image.size
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise _too_large(path)
    if least is not None:
        share = min(1.0, least / min(width, height))
        image.draft(None, (ceil(width * share), ceil(height * share)))
    tables = dict(getattr(image, "quantization", None) or {})
    animated = False
    # It fails where later frames are damaged; the first one counts.
    with suppress(Exception):
        # An MPO is a phone's JPEG with a map of depth or brightness as its second frame.
        animated = image.format != "MPO" and bool(getattr(image, "is_animated", False))
    with _one_big if image.width * image.height > BIG else nullcontext():
        image.load()
    # After load(): it turns a TIFF by itself and then forgets the tag. Broken EXIF is no reason
    # to refuse the picture.
    orientation: Any = None
    with suppress(Exception):
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    turn = _TURNS.get(orientation)
    size = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
    return Decoded(image if turn is None else image.transpose(turn), size, image.format or "",
                   animated, turn is not None, tables)


def _unknown(path: Path) -> UserError:
    """The error for a file with which no reader could begin: no picture, or only its beginning."""
    with open(path, "rb") as file:
        head = file.read(64)
    if kind := _kind_of(head):
        return UserError("dataset.is_other_format", file=path, kind=kind)
    for name in FORMATS:
        # Readers fail on the shortest files, and some are not built in.
        with suppress(Exception):
            accept = Image.OPEN[name][1]
            if accept and accept(head) is True:
                return UserError("dataset.corrupt", file=path, reason=f"incomplete {name}")
    return UserError("dataset.not_a_picture", file=path)


def _kind_of(head: bytes) -> str:
    """What a file is that is sometimes called .jpg, by its beginning; "" for anything else."""
    if head[4:8] == b"ftyp":
        brands = head[8:max(16, min(int.from_bytes(head[:4]), len(head)))]
        if b"avi" in brands:
            return ""
        # Phones write it, whatever the name.
        return "HEIC/HEIF" if re.search(rb"mif1|msf1|he[iv][a-z]", brands) else "MP4"
    return next((kind for start, kind in _OTHERS if head.lstrip().startswith(start)), "")


def _too_large(path: Path) -> UserError:
    return UserError("dataset.too_large", file=path, limit=MAX_MEGAPIXELS)


def damage(path: Path, error: Exception) -> UserError:
    """Turns an error on the way to a picture's pixels into one that says what the file has."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        return UserError("dataset.unreadable", file=path, reason=reason)
    if "truncated" in reason.lower():
        return UserError("dataset.truncated", file=path)
    return UserError("dataset.corrupt", file=path, reason=reason)


# --- pixels -----------------------------------------------------------------------------------

def is_see_through(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    return _to_8_bit(image).convert("RGBA").getchannel("A").getextrema()[0] != 255


def plain(image: Image.Image) -> Image.Image:
    """Returns 8-bit RGB over white, for measuring: the colour profile is ignored, to save time."""
    image = _to_8_bit(image)
    image.info.pop("icc_profile", None)
    return _flat(image, (255, 255, 255))


def _flat(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """RGB in sRGB, transparent parts over `colour`."""
    if not image.has_transparency_data:
        return _to_srgb(image)
    flat = Image.new("RGBA", image.size, colour)
    flat.alpha_composite(_painted(image))
    return flat.convert("RGB")


def _painted(image: Image.Image) -> Image.Image:
    """RGBA, the colours in sRGB."""
    # Profiles know nothing of transparency: the colours go through theirs alone.
    image = image.convert("RGBA")
    painted = _to_srgb(image.convert("RGB")).convert("RGBA")
    painted.putalpha(image.getchannel("A"))
    return painted


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey as 8-bit grey; other pictures as they are."""
    if not (image.mode == "F" or image.mode.startswith("I")):
        return image
    raw = np.asarray(image)
    values = np.nan_to_num(raw.astype(np.float64), nan=0, posinf=0, neginf=0)
    if image.mode.startswith("I;16"):
        black, white = 0.0, 65535.0
    else:
        # Nothing says what is black and white: the smallest usual range that holds all values.
        low, high = float(values.min()), float(values.max())
        usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        top = next((top for top in usual if low >= 0 and high <= top), None)
        black, white = (0.0, top) if top else (low, max(high, low + 1))
    grey = Image.fromarray(np.rint((values - black) * (255 / (white - black))).astype(np.uint8))
    # A PNG may name one value that is transparent.
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(raw == transparent, 0, 255).astype(np.uint8)))
    grey.info = {k: v for k, v in image.info.items() if k == "icc_profile"}
    return grey


def _to_srgb(image: Image.Image) -> Image.Image:
    """RGB, through the embedded colour profile if there is one that works."""
    profile = image.info.get("icc_profile")
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    # A profile may be damaged, or of another colour space than its picture.
    with suppress(ImageCms.PyCMSError, OSError):
        if profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            # Most pictures: not one rounding more than needed.
            if image.mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
                return image
            if converted := ImageCms.profileToProfile(
                    image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"):
                return converted
    return image.convert("RGB")
