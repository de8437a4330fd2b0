"""Findings about pictures: files, size, sharpness, compression, borders, copies, crops, styles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.dataset.checks import near_duplicates, saliency
from core.dataset.checks.findings import Finding, Subject, worst_first
from core.dataset.checks.image_stats import Table, subject_of
from core.dataset.crops import Planned

Purpose = Literal["", "person", "object", "style"]

ENLARGED = 1.15                 # times; less can't be seen
EXTREME = 3.0                   # longer side by shorter side; buckets end at 4
EMPTY = 0.25                    # of the scale that training sees: no detail finer than 4 px
SOFT = 0.5
LOW_QUALITY = 50                # of JPEG, 1..100
BLOCKY = 1.4                    # see measures.blocking
MUCH_CUT = 0.15                 # of the area
TOP_CUT = 0.05                  # of the height: where heads are
OUTLYING = 3.5                  # robust z (Iglewicz and Hoaglin 1993)
FEWEST_FOR_STYLE = 8
REFERENCES = 2000               # pictures that all others are compared with
NEIGHBOURS = 5

# What a file's content may be called. MPO is the JPEG of a phone with a second picture inside.
SUFFIXES = {"JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "MPO": (".jpg", ".jpeg", ".jpe", ".jfif"),
            "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",), "DIB": (".bmp",),
            "AVIF": (".avif",), "TIFF": (".tif", ".tiff"), "GIF": (".gif",)}


@dataclass(frozen=True, slots=True)
class Pictures:
    """What the checks look at: rows of `table`, names and plans of the same pictures."""

    names: Sequence[str]                    # dataset.relative_name
    table: Table                            # looks.RECORD
    planned: Sequence[Planned]
    purpose: Purpose = ""


def check_pictures(pictures: Pictures) -> Iterator[Finding]:
    for check in (_files, _sizes, _sharpness, _compression, _borders, _copies, _crops):
        yield from check(pictures)


def _listed(pictures: Pictures, which: Any, weight: Callable[[int], float],
            params: Callable[[int], dict[str, Any]]) -> tuple[Subject, ...]:
    """Subjects at the indices where `which` is true."""
    return worst_first([(weight(i), Subject(pictures.names[i], params(i)))
                        for i in np.flatnonzero(which).tolist()])


def _files(pictures: Pictures) -> Iterator[Finding]:
    table, names = pictures.table, pictures.names
    kinds = [one.decode() for one in table["format"].tolist()]
    wrong = [PurePosixPath(name).suffix.lower() not in SUFFIXES.get(kind, ())
             for name, kind in zip(names, kinds, strict=True)]
    if any(wrong):
        yield Finding("checks.wrong_suffix", "note", _listed(
            pictures, wrong, lambda i: 0, lambda i: {"format": kinds[i]}), actions=("convert",))
    for key in ("alpha", "animated", "turned"):
        if table[key].any():
            yield Finding(f"checks.{key}", "note", _listed(
                pictures, table[key], lambda i: 0, lambda i: {}), actions=("convert",))


# --- size and shape ---------------------------------------------------------------------------

def _sizes(pictures: Pictures) -> Iterator[Finding]:
    scales = [one.scale for one in pictures.planned]
    aspects = [max(one.size) / min(one.size) for one in pictures.planned]

    def size(i: int) -> dict[str, Any]:
        (width, height), (wide, high) = pictures.planned[i].size, pictures.planned[i].crop.size
        return {"width": width, "height": height, "wide": wide, "high": high,
                "scale": round(scales[i], 2), "aspect": round(aspects[i], 1)}

    small = [scale >= ENLARGED for scale in scales]
    if any(small):
        yield Finding("checks.too_small", "warning",
                      _listed(pictures, small, lambda i: scales[i], size),
                      {"worst": round(max(scales), 1)}, ("leave_out",))
    extreme = [aspect > EXTREME for aspect in aspects]
    if any(extreme):
        yield Finding("checks.extreme_aspect", "warning",
                      _listed(pictures, extreme, lambda i: aspects[i], size),
                      actions=("focus", "leave_out"))


# --- sharpness and compression ----------------------------------------------------------------

def _sharpness(pictures: Pictures) -> Iterator[Finding]:
    """Against what training sees: a large photo that is soft at full size is sharp at 512 px."""
    detail = pictures.table["detail"].astype(float)
    shares = detail / np.minimum([one.scale for one in pictures.planned], 1)

    def params(i: int) -> dict[str, Any]:
        width, height = pictures.planned[i].size
        return {"width": width, "height": height, "wide": max(round(width * detail[i]), 1),
                "high": max(round(height * detail[i]), 1)}

    blurred, soft = shares <= EMPTY, (shares > EMPTY) & (shares <= SOFT)
    if blurred.any():
        yield Finding("checks.blurred", "warning",
                      _listed(pictures, blurred, lambda i: -shares[i], params),
                      actions=("leave_out",))
    if soft.any():
        yield Finding("checks.soft", "note",
                      _listed(pictures, soft, lambda i: -shares[i], params),
                      actions=("leave_out",))


def _compression(pictures: Pictures) -> Iterator[Finding]:
    quality, blocks = pictures.table["quality"], pictures.table["blocking"]
    low = (quality > 0) & (quality < LOW_QUALITY)
    if low.any():
        yield Finding("checks.compressed", "warning", _listed(
            pictures, low, lambda i: -int(quality[i]), lambda i: {"quality": int(quality[i])}),
            actions=("leave_out",))
    blocky = (blocks >= BLOCKY) & ~low
    if blocky.any():
        yield Finding("checks.blocky", "warning", _listed(
            pictures, blocky, lambda i: float(blocks[i]), lambda i: {}), actions=("leave_out",))


def _borders(pictures: Pictures) -> Iterator[Finding]:
    borders = pictures.table["borders"]

    def params(i: int) -> dict[str, Any]:
        return dict(zip(("left", "top", "right", "bottom"), borders[i].tolist(), strict=True))

    framed = borders.any(axis=1)
    if framed.any():
        yield Finding("checks.borders", "warning", _listed(
            pictures, framed, lambda i: int(borders[i].sum()), params),
            actions=("remove_borders", "leave_out"))


# --- copies -----------------------------------------------------------------------------------

def _copies(pictures: Pictures) -> Iterator[Finding]:
    groups = near_duplicates.group_copies(pictures.table)
    for code, same_file in (("checks.same_file", True), ("checks.near_same", False)):
        chosen = [group for group in groups if group.same_file is same_file]
        if chosen:
            names = pictures.names
            yield Finding(
                code, "warning", tuple(
                    Subject(names[other], {"best": names[group.best], "distance": distance})
                    for group in chosen
                    for other, distance in zip(group.others, group.distances, strict=True)),
                {"groups": len(chosen)}, ("keep_one_of_group",),
                tuple((names[group.best], *(names[i] for i in group.others))
                      for group in chosen))


# --- crops ------------------------------------------------------------------------------------

def _crops(pictures: Pictures) -> Iterator[Finding]:
    """Cut subjects first; then, of the others, heads that may be cut, then large losses."""
    subject_lost = [saliency.lost(box, one.crop, one.size) if one.cut and (
        box := subject_of(pictures.table, i)) else 0.0 for i, one in enumerate(pictures.planned)]
    tops = [one.sides_cut[1] for one in pictures.planned]
    cuts = [one.cut for one in pictures.planned]

    def params(i: int) -> dict[str, Any]:
        wide, high = pictures.planned[i].crop.size
        return {"lost": percent(subject_lost[i]), "top": percent(tops[i]),
                "cut": percent(cuts[i]), "wide": wide, "high": high}

    subject_cut = np.array(subject_lost) > saliency.LOST
    if subject_cut.any():
        yield Finding("checks.subject_cut", "warning", _listed(
            pictures, subject_cut, lambda i: subject_lost[i], params), actions=("focus",))
    top_cut = (np.array(tops) > TOP_CUT) & ~subject_cut
    if pictures.purpose in ("", "person") and top_cut.any():
        level: Literal["warning", "note"] = "warning" if pictures.purpose == "person" else "note"
        yield Finding("checks.top_cut", level, _listed(
            pictures, top_cut, lambda i: tops[i], params), actions=("focus",))
    much = (np.array(cuts) > MUCH_CUT) & ~subject_cut
    if much.any():
        yield Finding("checks.much_cut", "note", _listed(
            pictures, much, lambda i: cuts[i], params), actions=("focus", "leave_out"))


def percent(share: float) -> int:
    return round(100 * share)


# --- styles -----------------------------------------------------------------------------------

def style_outliers(embeddings: NDArray[Any]) -> list[tuple[int, float]]:
    """(index, robust z) of pictures unlike their nearest neighbours, the strangest first.

    `embeddings`: (N, D) floats of any scale, one CLIP vector a picture. A picture's kinship is
    its mean cosine similarity to its 5 nearest others (among at most 2,000, evenly taken); an
    outlier's lies 3.5 robust deviations (median, MAD) below the median. Two styles of similar
    number have no outliers; fewer than 8 pictures tell nothing. Raises ValueError where the
    array isn't of finite numbers in two dimensions.
    """
    vectors = np.asarray(embeddings, dtype=np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError("expected finite numbers, (N, D)")
    if len(vectors) < FEWEST_FOR_STYLE:
        return []
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    kinship = _kinship(vectors)
    below = np.median(kinship) - kinship
    deviation = max(float(np.median(np.abs(below))) / 0.6745, 1e-3)
    z = below / deviation
    found = [(int(i), float(z[i])) for i in np.flatnonzero(z > OUTLYING)]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def _kinship(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    count = len(vectors)
    chosen = np.unique(np.linspace(0, count - 1, min(count, REFERENCES)).astype(int))
    references = vectors[chosen]
    nearest = min(NEIGHBOURS, len(chosen) - 1)
    found = np.empty(count, dtype=np.float32)
    for start in range(0, count, 1024):
        similar = vectors[start:start + 1024] @ references.T
        own = np.searchsorted(chosen, np.arange(start, start + len(similar)))
        rows = np.flatnonzero((own < len(chosen)) & (chosen[np.minimum(own, len(chosen) - 1)]
                                                     == start + np.arange(len(similar))))
        similar[rows, own[rows]] = -np.inf              # nobody is its own neighbour
        best = np.partition(similar, len(chosen) - nearest, axis=1)[:, len(chosen) - nearest:]
        found[start:start + len(similar)] = best.mean(1)
    return found


def style_finding(names: Sequence[str], embeddings: NDArray[Any],
                  purpose: Purpose = "") -> Finding | None:
    """Pictures of another style or subject, for whoever has CLIP at hand."""
    found = style_outliers(embeddings)
    if not found:
        return None
    return Finding("checks.style_outlier", "warning" if purpose == "style" else "note",
                   tuple(Subject(names[i], {"z": round(z, 1)}) for i, z in found),
                   actions=("leave_out",))
