"""Findings about pictures: files, size, sharpness, compression, borders, copies, crops, styles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.dataset.checks import near_duplicates, saliency
from core.dataset.checks.findings import Action, Finding, Level, Subject, worst_first
from core.dataset.checks.image_stats import Table, subject_of
from core.dataset.crops import Planned

Purpose = Literal["", "person", "object", "style"]

ENLARGED = 1.15                 # times; less can't be seen
EXTREME = 3.0                   # longer side by shorter side; buckets end at 4
BLURRED = 0.25                  # of the scale that training sees: no detail finer than 4 px
SOFT = 0.5                      # of the same scale: no detail finer than 2 px
LOW_QUALITY = 50                # of JPEG, 1..100
BLOCKY = 1.4                    # see measures.blocking
MUCH_CUT = 0.15                 # of the area
TOP_CUT = 0.05                  # of the height: where heads are
OUTLYING = 3.5                  # robust z (Iglewicz and Hoaglin 1993)
FEWEST_FOR_STYLE = 8
REFERENCES = 2000               # pictures that all others are compared with
NEIGHBOURS = 5                  # with which a picture is compared in style

# What a file's content may be called. MPO is the JPEG of a phone with a second picture inside.
SUFFIXES = {"JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "MPO": (".jpg", ".jpeg", ".jpe", ".jfif"),
            "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",), "DIB": (".bmp",),
            "AVIF": (".avif",), "TIFF": (".tif", ".tiff"), "GIF": (".gif",)}


@dataclass(frozen=True, slots=True)
class Pictures:
    """What the checks look at: rows of `table`, names and plans of the same pictures."""

    names: Sequence[str]                    # image_folder.relative_name
    table: Table                            # image_stats.RECORD
    planned: Sequence[Planned]
    purpose: Purpose = ""


def check_pictures(pictures: Pictures) -> Iterator[Finding]:
    """Yields all findings about the pictures themselves."""
    for check in (check_files, check_sizes, check_sharpness, check_compression, check_borders,
                  check_copies, check_crops):
        yield from check(pictures)


def _finding(pictures: Pictures, code: str, level: Level, which: Any, actions: tuple[Action, ...],
             weights: Any = None, params: Callable[[int], dict[str, Any]] = lambda i: {},
             **about: float) -> Iterator[Finding]:
    """A finding on the pictures where `which` is true, if there are any; most weight first."""
    subjects = worst_first([
        (0 if weights is None else weights[i], Subject(pictures.names[i], params(i)))
        for i in np.flatnonzero(which).tolist()])
    if subjects:
        yield Finding(code, level, subjects, about, actions)


def check_files(pictures: Pictures) -> Iterator[Finding]:
    table = pictures.table
    formats = [name.decode() for name in table["format"].tolist()]
    wrong = [PurePosixPath(name).suffix.lower() not in SUFFIXES.get(kind, ())
             for name, kind in zip(pictures.names, formats, strict=True)]
    yield from _finding(pictures, "checks.wrong_suffix", "note", wrong, ("convert",),
                        params=lambda i: {"format": formats[i]})
    for key in ("alpha", "animated", "turned"):
        yield from _finding(pictures, f"checks.{key}", "note", table[key], ("convert",))


# --- size and shape ---------------------------------------------------------------------------

def check_sizes(pictures: Pictures) -> Iterator[Finding]:
    scales = np.array([picture.scale for picture in pictures.planned])
    aspects = np.array([max(picture.size) / min(picture.size) for picture in pictures.planned])

    def size(i: int) -> dict[str, Any]:
        (width, height), (wide, high) = pictures.planned[i].size, pictures.planned[i].crop.size
        return {"width": width, "height": height, "wide": wide, "high": high,
                "scale": round(scales[i].item(), 2), "aspect": round(aspects[i].item(), 1)}

    yield from _finding(pictures, "checks.too_small", "warning", scales >= ENLARGED, ("leave_out",),
                        scales, size, worst=round(max(scales.tolist(), default=0), 1))
    yield from _finding(pictures, "checks.extreme_aspect", "warning", aspects > EXTREME,
                        ("focus", "leave_out"), aspects, size)


# --- sharpness and compression ----------------------------------------------------------------

def check_sharpness(pictures: Pictures) -> Iterator[Finding]:
    # By what training sees: a large photo that is soft at full size is sharp at 512 px.
    detail = pictures.table["detail"].astype(float)
    shares = detail / np.minimum([picture.scale for picture in pictures.planned], 1)

    def params(i: int) -> dict[str, Any]:
        width, height = pictures.planned[i].size
        return {"width": width, "height": height, "wide": max(round(width * detail[i]), 1),
                "high": max(round(height * detail[i]), 1)}

    yield from _finding(pictures, "checks.blurred", "warning", shares <= BLURRED, ("leave_out",),
                        -shares, params)
    yield from _finding(pictures, "checks.soft", "note", (shares > BLURRED) & (shares <= SOFT),
                        ("leave_out",), -shares, params)


def check_compression(pictures: Pictures) -> Iterator[Finding]:
    quality, blocks = pictures.table["quality"].astype(int), pictures.table["blocking"]
    low = (quality > 0) & (quality < LOW_QUALITY)
    yield from _finding(pictures, "checks.compressed", "warning", low, ("leave_out",), -quality,
                        lambda i: {"quality": quality[i].item()})
    # Blocks outlive a later save at high quality, as a PNG for example.
    yield from _finding(pictures, "checks.blocky", "warning", (blocks >= BLOCKY) & ~low,
                        ("leave_out",), blocks)


def check_borders(pictures: Pictures) -> Iterator[Finding]:
    borders = pictures.table["borders"]
    yield from _finding(
        pictures, "checks.borders", "warning", borders.any(1), ("remove_borders", "leave_out"),
        borders.sum(1), lambda i: dict(zip(("left", "top", "right", "bottom"),
                                           borders[i].tolist(), strict=True)))


# --- copies -----------------------------------------------------------------------------------

def check_copies(pictures: Pictures) -> Iterator[Finding]:
    names, all_groups = pictures.names, near_duplicates.group_copies(pictures.table)
    for code, same_file in (("checks.same_file", True), ("checks.near_same", False)):
        groups = [group for group in all_groups if group.same_file is same_file]
        if groups:
            copies = tuple(Subject(names[other], {"best": names[group.best], "distance": distance})
                           for group in groups
                           for other, distance in zip(group.others, group.distances, strict=True))
            yield Finding(code, "warning", copies, {"groups": len(groups)}, ("keep_one_of_group",),
                          tuple((names[group.best], *(names[i] for i in group.others))
                                for group in groups))


# --- crops ------------------------------------------------------------------------------------

def check_crops(pictures: Pictures) -> Iterator[Finding]:
    subject_lost = np.array([saliency.lost(box, picture.crop, picture.size)
                             if picture.cut and (box := subject_of(pictures.table, i)) else 0.0
                             for i, picture in enumerate(pictures.planned)])
    tops = np.array([picture.top_cut for picture in pictures.planned])
    cuts = np.array([picture.cut for picture in pictures.planned])

    def params(i: int) -> dict[str, Any]:
        wide, high = pictures.planned[i].crop.size
        return {"lost": round(100 * subject_lost[i]), "top": round(100 * tops[i]),
                "cut": round(100 * cuts[i]), "wide": wide, "high": high}

    # A picture whose subject is cut is named once; the other two findings are guesses beside it.
    subject_cut = subject_lost > saliency.LOST
    yield from _finding(pictures, "checks.subject_cut", "warning", subject_cut, ("focus",),
                        subject_lost, params)
    if pictures.purpose in ("", "person"):
        yield from _finding(pictures, "checks.top_cut", "warning" if pictures.purpose else "note",
                            (tops > TOP_CUT) & ~subject_cut, ("focus",), tops, params)
    yield from _finding(pictures, "checks.much_cut", "note", (cuts > MUCH_CUT) & ~subject_cut,
                        ("focus", "leave_out"), cuts, params)


# --- styles -----------------------------------------------------------------------------------

def style_outliers(embeddings: NDArray[Any]) -> list[tuple[int, float]]:
    """Returns (index, robust z) of pictures unlike their nearest neighbours, the strangest first.

    `embeddings` are (N, D) floats of any scale, one CLIP vector for each picture. A picture's
    similarity is its mean cosine to its 5 nearest others (among at most 2,000, evenly taken); that
    of an outlier lies 3.5 robust deviations (median, MAD) below the median. Two styles of similar
    number have no outliers; fewer than 8 pictures tell nothing. Raises ValueError where the array
    isn't of finite numbers in two dimensions.
    """
    vectors = np.asarray(embeddings, dtype=np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError("expected finite numbers, (N, D)")
    if len(vectors) < FEWEST_FOR_STYLE:
        return []
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    count = len(vectors)
    chosen = np.unique(np.linspace(0, count - 1, min(count, REFERENCES)).astype(int))
    references = vectors[chosen]
    nearest = min(NEIGHBOURS, len(chosen) - 1)
    similarity = np.empty(count, dtype=np.float32)
    # In blocks of rows: all pairs of 100,000 pictures would take 800 MB.
    for start in range(0, count, 1024):
        cosines = vectors[start:start + 1024] @ references.T
        # No picture is its own neighbour: where a row is also a reference, that place goes.
        numbers = np.arange(start, start + len(cosines))
        rows = np.flatnonzero(np.isin(numbers, chosen))
        cosines[rows, np.searchsorted(chosen, numbers[rows])] = -np.inf
        best = np.partition(cosines, len(chosen) - nearest, axis=1)[:, len(chosen) - nearest:]
        similarity[start:start + len(cosines)] = best.mean(1)
    below = np.median(similarity) - similarity
    # 0.6745: makes of the MAD a normal distribution's deviation. At least 0.001, or pictures that
    # are all alike would have outliers by rounding.
    deviation = max(float(np.median(np.abs(below))) / 0.6745, 1e-3)
    z = below / deviation
    outliers = [(int(i), float(z[i])) for i in np.flatnonzero(z > OUTLYING)]
    return sorted(outliers, key=lambda pair: (-pair[1], pair[0]))


def style_finding(names: Sequence[str], embeddings: NDArray[Any],
                  purpose: Purpose = "") -> Finding | None:
    """Names pictures of another style or subject; None where there is none.

    It is no part of check_pictures, as `embeddings` (see style_outliers) need a CLIP model.
    """
    outliers = style_outliers(embeddings)
    if not outliers:
        return None
    return Finding("checks.style_outlier", "warning" if purpose == "style" else "note",
                   tuple(Subject(names[i], {"z": round(z, 1)}) for i, z in outliers),
                   actions=("leave_out",))
