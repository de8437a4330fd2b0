"""Labelled picture grids: the compare sheet."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, SOFT = (34, 32, 40), (250, 249, 246), (120, 116, 128)
_CJK_FONTS = ("C:/Windows/Fonts/msyh.ttc", "/System/Library/Fonts/PingFang.ttc",
              "/System/Library/Fonts/STHeiti Light.ttc",
              "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
              "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc")

Row = tuple[str, Sequence[Image.Image]]


@functools.cache
def font(size: int, cjk: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font; for Chinese labels one of the system's, where there is one."""
    for path in _CJK_FONTS if cjk else ():
        if Path(path).exists():
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)


def draw_sheet(columns: Sequence[str], rows: Sequence[Row], caption: str = "") -> Image.Image:
    """Pictures in rows under column labels, all of the first picture's size. Small pictures grow in
    whole multiples, so that their pixels stay square."""
    first = rows[0][1][0]
    # below 128 px labels could not be read
    cell = max(first.width, first.width * (128 // max(1, first.width)))
    height = round(cell * first.height / first.width)
    gap, text = max(4, cell // 24), max(11, min(22, cell // 9))
    label_width = max((_width(label, text) for label, _ in rows), default=0)
    left = gap * 2 + (label_width + gap * 2 if label_width else 0)
    top = gap * 2 + (text + gap * 2 if any(columns) else 0)
    bottom = (text + gap * 3) if caption else gap
    sheet = Image.new("RGB", (left + len(columns) * (cell + gap) + gap,
                              top + len(rows) * (height + gap) + bottom), PAPER)
    pen = ImageDraw.Draw(sheet)
    for x, label in enumerate(columns):
        _write(pen, (left + x * (cell + gap) + cell // 2, top - gap * 2), label, text, "ms", cell)
    for y, (label, pictures) in enumerate(rows):
        middle = top + y * (height + gap) + height // 2
        _write(pen, (gap * 2, middle), label, text, "lm")
        for x, picture in enumerate(pictures):
            sharp = picture.width * 2 <= cell
            grown = picture.convert("RGB").resize(
                (cell, height), Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS)
            sheet.paste(grown, (left + x * (cell + gap), top + y * (height + gap)))
    if caption:
        _write(pen, (left, sheet.height - gap * 2), caption, text, "ls",
               sheet.width - left - gap * 2, SOFT)
    return sheet


def _width(label: str, size: int) -> int:
    return round(font(size, not label.isascii()).getlength(label)) if label else 0


def _write(pen: ImageDraw.ImageDraw, at: tuple[int, int], label: str, size: int, anchor: str,
           most: int = 0, colour: tuple[int, int, int] = INK) -> None:
    # a label that is too wide is written smaller, then shortened
    while most and size > 8 and _width(label, size) > most:
        size -= 1
    while most and len(label) > 4 and _width(label, size) > most:
        label = label[:-2].rstrip("…") + "…"
    pen.text(at, label, colour, font(size, not label.isascii()), anchor=anchor)
