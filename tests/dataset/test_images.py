"""One picture file: every format, mode and orientation gives the right pixels, or a UserError."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile

from core.dataset import images
from core.dataset.images import look_at, open_picture
from core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")     # pytest forgets our own filter
ROOT = Path(__file__).parents[2]

# Four fields that tell every orientation apart: red green / blue white.
CORNERS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {}), "jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    "progressive.jpg": ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
    "webp": ("WEBP", {"quality": 95}), "lossless.webp": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}), "avif": ("AVIF", {"quality": 95, "subsampling": "4:4:4"}),
    "gif": ("GIF", {}), "tiff": ("TIFF", {}), "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}),
    "deflate.tif": ("TIFF", {"compression": "tiff_adobe_deflate"})}


def quarters(width: int = 48, height: int = 32) -> Image.Image:
    image = Image.new("RGB", (width, height))
    boxes = [(0, 0), (width // 2, 0), (0, height // 2), (width // 2, height // 2)]
    for colour, (x, y) in zip(CORNERS, boxes, strict=True):
        image.paste(colour, (x, y, x + width // 2, y + height // 2))
    return image


def noise(size: tuple[int, int] = (150, 200), seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def pixels(path: Path, background: str = "white") -> NDArray[np.int_]:
    image = open_picture(path, background)
    assert image.mode == "RGB"
    assert look_at(path) == (image.size, look_at(path)[1])  # type: ignore[index]
    return np.asarray(image).astype(int)


def looks_like(found: NDArray[np.int_], image: Image.Image, most: int) -> None:
    """Equal to the bit with most = 0, else on average: lossy formats blur the edges."""
    wanted = np.asarray(image.convert("RGB")).astype(int)
    assert found.shape == wanted.shape
    error = np.abs(found - wanted)
    assert (error.mean() if most else error.max()) <= most


def has_alpha(path: Path) -> bool:
    look = look_at(path)
    assert isinstance(look, tuple)
    return look[1]


# --- formats and orientation ------------------------------------------------------------------

@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format(tmp_path: Path, suffix: str) -> None:
    kind, options = FORMATS[suffix]
    quarters().save(tmp_path / f"a.{suffix}", kind, **options)
    lossy = 4 if suffix in ("jpg", "progressive.jpg", "webp", "avif") else 0
    looks_like(pixels(tmp_path / f"a.{suffix}"), quarters(), lossy)
    assert look_at(tmp_path / f"a.{suffix}") == ((48, 32), False)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "tiff", "lzw.tif"])
def test_every_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    """The stored pixels are turned away; the picture must come back as it was seen."""
    back = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}
    stored = quarters().transpose(back[orientation]) if orientation > 1 else quarters()
    kind, options = FORMATS[suffix]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a", kind, exif=exif, **options)
    looks_like(pixels(tmp_path / "a"), quarters(), 4)
    assert look_at(tmp_path / "a") == ((48, 32), False)


def test_broken_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12\0\3"
    quarters().save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    looks_like(pixels(tmp_path / "a.jpg"), quarters(), 4)
    quarters().save(tmp_path / "b.png", exif=b"nonsense")
    looks_like(pixels(tmp_path / "b.png"), quarters(), 0)


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    quarters().save(tmp_path / "a.jpg", "PNG")
    looks_like(pixels(tmp_path / "a.jpg"), quarters(), 0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_counts(tmp_path: Path, kind: str) -> None:
    quarters().save(tmp_path / "a", kind, save_all=True,
                    append_images=[Image.new("RGB", (48, 32), "gray")] * 2)
    looks_like(pixels(tmp_path / "a"), quarters(), 6)


# --- modes ------------------------------------------------------------------------------------

def test_grey_palette_and_one_bit(tmp_path: Path) -> None:
    grey = noise().convert("L")
    grey.save(tmp_path / "l.png")
    looks_like(pixels(tmp_path / "l.png"), grey, 0)
    quarters().quantize(4).save(tmp_path / "p.png")
    looks_like(pixels(tmp_path / "p.png"), quarters(), 0)
    quarters().convert("1").save(tmp_path / "1.png")
    found = pixels(tmp_path / "1.png")
    assert set(np.unique(found)) == {0, 255}
    assert (found[20:, 30:] == 255).all()


def test_16_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(4, 16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        found = pixels(tmp_path / name)
        assert (found[..., 0] == np.rint(values / 257)).all()
        assert (found[..., 0] == found[..., 2]).all()
    dark = np.full((4, 4), 2570, np.uint16)                 # dark stays dark
    Image.fromarray(dark).save(tmp_path / "dark.png")
    assert (pixels(tmp_path / "dark.png") == 10).all()
    Image.fromarray(values.astype(">u2")).save(tmp_path / "big.tif")
    assert (pixels(tmp_path / "big.tif")[..., 0] == np.rint(values / 257)).all()


@pytest.mark.parametrize(("values", "expected"), [
    (np.array([[0, 255]], np.int32), [0, 255]),
    (np.array([[0, 32768, 65535]], np.int32), [0, 128, 255]),
    (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),
    (np.array([[0, 10**6, 2 * 10**6]], np.int32), [0, 128, 255]),
    (np.array([[-7, -7]], np.int32), [0, 0]),
    (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
    (np.array([[0, 128.4, 255]], np.float32), [0, 128, 255]),
    (np.array([[0, 257, 65535]], np.float32), [0, 1, 255]),
    (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
    (np.array([[np.nan, np.inf, 1]], np.float32), [0, 0, 255]),
])
def test_32_bit_and_float(tmp_path: Path, values: NDArray[Any], expected: list[int]) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    found = pixels(tmp_path / "a.tif")[0, :, 0]
    assert np.abs(found - expected).max() <= (1 if 127 in found else 0)


def test_cmyk_without_profile_goes_through_pillow(tmp_path: Path) -> None:
    image = quarters().convert("CMYK")
    image.save(tmp_path / "a.jpg", quality=100, subsampling=0)
    looks_like(pixels(tmp_path / "a.jpg"), quarters(), 6)
    image.save(tmp_path / "a.tif")
    looks_like(pixels(tmp_path / "a.tif"), quarters(), 0)


def test_other_colour_spaces(tmp_path: Path) -> None:
    quarters().convert("YCbCr").save(tmp_path / "y.tif", compression="tiff_lzw")
    looks_like(pixels(tmp_path / "y.tif"), quarters(), 3)
    lab = ImageCms.profileToProfile(quarters(), ImageCms.createProfile("sRGB"),
                                    ImageCms.createProfile("LAB"), outputMode="LAB")
    assert lab is not None
    lab.save(tmp_path / "lab.tif")
    looks_like(pixels(tmp_path / "lab.tif"), quarters(), 8)


def test_hsv_pixels_convert() -> None:
    """No file format of ours holds HSV; the way there is the same."""
    flat = images._flat(quarters().convert("HSV"), (0, 0, 0))
    looks_like(np.asarray(flat).astype(int), quarters(), 3)


# --- colour profiles --------------------------------------------------------------------------

def swapped_profile() -> bytes:
    """sRGB with red and blue exchanged: an unmistakable profile of a real RGB space."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(data[128:132], "big")
    at = {bytes(data[i:i + 4]): i for i in range(132, 132 + 12 * count, 12)}
    red, blue = at[b"rXYZ"], at[b"bXYZ"]
    data[red:red + 4], data[blue:blue + 4] = b"bXYZ", b"rXYZ"
    start = int.from_bytes(data[at[b"desc"] + 4:at[b"desc"] + 8], "big")
    return bytes(data).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be")) \
        if start else bytes(data)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "lossless.webp"])
def test_an_embedded_profile_is_applied(tmp_path: Path, suffix: str) -> None:
    kind, options = FORMATS[suffix]
    red, green, blue = quarters().split()
    quarters().save(tmp_path / "a", kind, icc_profile=swapped_profile(), **options)
    looks_like(pixels(tmp_path / "a"), Image.merge("RGB", (blue, green, red)), 6)


def test_a_profile_works_under_alpha_too(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.putpixel((0, 0), (255, 0, 0, 0))
    image.save(tmp_path / "a.png", icc_profile=swapped_profile())
    found = pixels(tmp_path / "a.png", "lime")
    assert tuple(found[0, 0]) == (0, 255, 0)
    assert np.abs(found[4, 4] - (0, 0, 255)).max() <= 3


def test_srgb_changes_no_value(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise().save(tmp_path / "a.png", icc_profile=srgb)
    looks_like(pixels(tmp_path / "a.png"), noise(), 0)


# A profile holds the second in which it was made: as a name it would differ between test processes.
@pytest.mark.parametrize("profile", [b"nonsense", b"\0" * 400, swapped_profile()[:200]],
                         ids=["nonsense", "zeros", "cut"])
def test_a_broken_profile_is_ignored(tmp_path: Path, profile: bytes) -> None:
    noise().save(tmp_path / "a.png", icc_profile=profile)
    looks_like(pixels(tmp_path / "a.png"), noise(), 0)


def test_a_profile_of_another_space_is_ignored(tmp_path: Path) -> None:
    noise().convert("L").save(tmp_path / "a.png", icc_profile=swapped_profile())
    looks_like(pixels(tmp_path / "a.png"), noise().convert("L"), 0)


# --- alpha ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("background", "rgb"), [
    ("white", (255, 255, 255)), ("black", (0, 0, 0)), (" #0080ff ", (0, 128, 255)),
    ("#f00", (255, 0, 0)), ("rgb(1, 2, 3)", (1, 2, 3)), ("hsl(120, 100%, 50%)", (0, 255, 0)),
    ("#11223344", (17, 34, 51))])
def test_alpha_lies_on_the_background(tmp_path: Path, background: str,
                                      rgb: tuple[int, int, int]) -> None:
    image = Image.new("RGBA", (3, 1), (200, 100, 0, 255))
    image.putpixel((1, 0), (200, 100, 0, 0))
    image.putpixel((2, 0), (200, 100, 0, 128))
    image.save(tmp_path / "a.png")
    found = pixels(tmp_path / "a.png", background)[0]
    assert tuple(found[0]) == (200, 100, 0)
    assert tuple(found[1]) == rgb
    half = (np.array((200, 100, 0)) * 128 + np.array(rgb) * 127) / 255
    assert np.abs(found[2] - half).max() <= 1
    assert has_alpha(tmp_path / "a.png")


def test_alpha_of_every_kind(tmp_path: Path) -> None:
    def left_is_clear(name: str) -> None:
        found = pixels(tmp_path / name, "blue")
        assert (found[:, :8] == (0, 0, 255)).all()
        assert np.abs(found[:, 8:] - 255).max() <= 3
        assert has_alpha(tmp_path / name)

    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 8, 16))
    white = Image.new("RGB", (16, 16), "white")
    rgba = white.copy()
    rgba.putalpha(mask)
    for name, options in (("a.webp", {"lossless": True}), ("a.avif", {}), ("a.tif", {}),
                          ("a.png", {})):
        rgba.save(tmp_path / name, **options)
        left_is_clear(name)
    grey = Image.new("L", (16, 16), 255)
    grey.putalpha(mask)
    grey.save(tmp_path / "la.png")
    left_is_clear("la.png")
    palette = Image.new("P", (16, 16), 1)                   # one clear index, as in a GIF
    palette.putpalette([255, 0, 0, 255, 255, 255])
    palette.paste(0, (0, 0, 8, 16))
    palette.save(tmp_path / "p.gif", transparency=0)
    left_is_clear("p.gif")
    palette.save(tmp_path / "p.png", transparency=b"\0\xff")    # alpha by index
    left_is_clear("p.png")
    for mode, clear in (("L", 9), ("RGB", (9, 9, 9))):      # one clear colour
        image = Image.new(mode, (16, 16), "white")
        image.paste(clear, (0, 0, 8, 16))
        image.save(tmp_path / f"{mode}.png", transparency=clear)
        left_is_clear(f"{mode}.png")
    deep = np.full((16, 16), 65535, np.uint16)
    deep[:, :8] = 300
    Image.fromarray(deep).save(tmp_path / "deep.png", transparency=300)
    left_is_clear("deep.png")


def test_opaque_alpha_is_no_alpha(tmp_path: Path) -> None:
    noise().convert("RGBA").save(tmp_path / "a.png")
    assert not has_alpha(tmp_path / "a.png")
    looks_like(pixels(tmp_path / "a.png", "red"), noise(), 0)


@pytest.mark.parametrize("colour", ["", "wheit", "#12", "12,3,4"])
def test_a_colour_without_meaning(tmp_path: Path, colour: str) -> None:
    quarters().save(tmp_path / "a.png")
    with pytest.raises(UserError) as caught:
        open_picture(tmp_path / "a.png", colour)
    assert caught.value.code == "dataset.bad_colour"
    assert caught.value.params == {"colour": colour}


# --- damage -----------------------------------------------------------------------------------

def code_of(path: Path) -> str:
    """Scanning and training must agree."""
    look = look_at(path)
    assert isinstance(look, UserError)
    with pytest.raises(UserError) as caught:
        open_picture(path)
    assert caught.value.code == look.code
    assert str(path) in str(look)
    return look.code.removeprefix("dataset.")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_torn_file_is_found(tmp_path: Path, suffix: str, share: float) -> None:
    kind, options = FORMATS[suffix]
    whole = io.BytesIO()
    noise().save(whole, kind, **options)
    data = whole.getvalue()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data[:int(len(data) * share)])
    assert code_of(path) in ("truncated", "corrupt")
    path.write_bytes(data)
    assert look_at(path) == ((150, 200), False)


def test_damaged_png_data(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2:len(data) // 2 + 50] = b"\x55" * 50
    (tmp_path / "a.png").write_bytes(data)
    assert code_of(tmp_path / "a.png") == "corrupt"


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    for name, data, code in (("a", b"", "empty"), ("b", b"hello", "not_a_picture"),
                             ("c", b"\0" * 500, "not_a_picture"),
                             ("d", b"%!PS-Adobe-3.0 EPSF-3.0\n", "not_a_picture")):
        (tmp_path / name).write_bytes(data)
        assert code_of(tmp_path / name) == code
    assert code_of(tmp_path / "missing.png") == "unreadable"
    (tmp_path / "folder.png").mkdir()
    assert code_of(tmp_path / "folder.png") == "unreadable"


def bomb(path: Path, width: int, height: int) -> Path:
    """A valid one-bit PNG of a few kilobytes, however many pixels it unpacks to."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))

    packer = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    path.write_bytes(b"\x89PNG\r\n\x1a\n"
                     + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
                     + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("size", [(20_000, 20_000), (14_000, 12_600), (200_000, 1000)])
def test_bombs_are_told_by_their_header(tmp_path: Path, size: tuple[int, int]) -> None:
    path = bomb(tmp_path / "bomb.png", *size)
    assert path.stat().st_size < 1_000_000
    assert code_of(path) == "too_large"
    assert look_at(bomb(path, 300, 200)) == ((300, 200), False)     # the same file, smaller


def test_large_pictures_below_the_limit_are_read(tmp_path: Path) -> None:
    """100 megapixels: Pillow would warn; we stay calm, and decode one at a time."""
    assert look_at(bomb(tmp_path / "a.png", 10_000, 10_000)) == ((10_000, 10_000), False)
    assert not images._one_big.locked()


def test_pillow_stays_quiet(tmp_path: Path) -> None:
    """Its warnings about size and metadata say nothing to a user."""
    bomb(tmp_path / "a.png", 10_000, 10_000)
    quarters().save(tmp_path / "b.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12\0\3")
    code = ("import sys; from pathlib import Path; from core.dataset.images import look_at\n"
            "assert all(isinstance(look_at(Path(p)), tuple) for p in sys.argv[1:])")
    done = subprocess.run([sys.executable, "-W", "default", "-c", code, tmp_path / "a.png",
                           tmp_path / "b.jpg"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_gives_a_picture_or_a_fault(data: st.DataObject,
                                               tmp_path_factory: pytest.TempPathFactory) -> None:
    kind = data.draw(st.sampled_from(("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")))
    file = io.BytesIO()
    quarters(16, 16).save(file, kind)
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damage") / "a"
    path.write_bytes(content)
    look = look_at(path)
    if isinstance(look, tuple):
        assert open_picture(path).size == look[0]
    else:
        assert look.code.startswith("dataset.")


def test_pictures_open_in_threads(tmp_path: Path) -> None:
    """Readers are loaded once, and none disturbs another."""
    paths = []
    for i, (suffix, (kind, options)) in enumerate(FORMATS.items()):
        paths.append(tmp_path / f"{i}.{suffix}")
        noise((64, 64), i).save(paths[-1], kind, **options)
    alone = [np.asarray(open_picture(path)) for path in paths]
    wrong: list[Path] = []

    def work() -> None:
        for path, expected in zip(paths * 3, alone * 3, strict=True):
            if not (np.asarray(open_picture(path)) == expected).all():
                wrong.append(path)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not ImageFile.LOAD_TRUNCATED_IMAGES              # nobody may switch the check off
