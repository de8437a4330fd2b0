"""Weights: found on this machine, or fetched from the hub on the user's word; never by themselves.

Looked for as a path, under our own models/OWNER/NAME, in the cache of huggingface_hub.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from core import paths
from core.base_models.catalog import (
    MANIFEST,
    REPOSITORY,
    WEIGHTS,
    Entry,
    File,
    Offer,
    catalogue,
    describe,
    known,
    models_dir,
)
from core.base_models.download import Wanted, disk_fault, download
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Event, Note, Phase
from core.serialization import from_json

__all__ = ["Entry", "File", "Offer", "catalogue", "describe", "fetch", "find", "known", "local",
           "models_dir", "stamp"]

MARKERS = ("config.json", "model_index.json", "model.onnx", "open_clip_config.json")
RESERVE = 200_000_000                   # bytes that stay free on the disk
TELL_S = 0.5                            # between two Phase events


# --- on this machine ---

def local(name: str, needs: Sequence[str] = ()) -> Path | None:
    """The file or folder of a path or repository that is on this machine; asks no network.

    A folder of ours or of the hub's cache counts only with a match for every pattern in `needs`;
    a path that the user wrote counts as it is.
    """
    if not name:
        return None
    written = Path(name).expanduser()
    if written.exists():
        return written.absolute()
    return next((_usable(folder, name) for folder in _folders(name, needs)
                 if all(any(folder.glob(pattern)) for pattern in needs)), None)


def find(name: str, needs: Sequence[str] = ()) -> Path:
    """As `local`. Raises UserError `hub.missing` (with the command that fetches it) or
    `hub.no_path`."""
    found = local(name, needs)
    if found is None:
        if REPOSITORY.fullmatch(name):
            raise UserError("hub.missing", name=name)
        raise UserError("hub.no_path", path=name)
    return found


def stamp(name: str) -> str:
    """What stands for the weights of a path or repository in an identity: files, sizes, times."""
    place = local(name)
    files = [place] if place and place.is_file() else sorted(place.rglob("*")) if place else []
    found = [(file.name, file.stat()) for file in files if file.name.endswith(WEIGHTS)]
    return "|".join([name, *(f"{n}:{s.st_size}:{s.st_mtime_ns}" for n, s in found)])


def _folders(name: str, needs: Sequence[str]) -> Iterator[Path]:
    if not REPOSITORY.fullmatch(name):
        return
    if (own := models_dir() / name).is_dir():
        yield own
    from huggingface_hub import try_to_load_from_cache
    entry = known(name)
    markers = [need for need in needs if "*" not in need] or list(MARKERS)
    for revision in dict.fromkeys([entry.revision if entry else "main", "main"]):
        for marker in [*([entry.use] if entry and entry.use else []), *markers]:
            found = try_to_load_from_cache(name, marker, revision=revision)
            if isinstance(found, str):
                yield Path(found).parents[marker.count("/")]


def _usable(folder: Path, name: str) -> Path:
    entry = known(name)
    return folder / entry.use if entry and (folder / entry.use).is_file() else folder


# --- fetching ---

def fetch(repo: str, emit: Callable[[Event], None], control: Control, mirror: str = "",
          revision: str = "", offer: Offer | None = None) -> Path | None:
    """Downloads a model into our models folder; call it only on the user's word.

    Returns the folder (or the one file that configs name); None where a stop was asked for: what
    has come stays, and the next call goes on from there, also after a crash. Phase "download"
    counts in MB (10^6 bytes). The folder appears at the end, whole and checked, or not at all.
    """
    offer = offer or describe(repo, mirror, revision)
    offer.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(offer.folder.parent / f".{offer.folder.name}.lock")
    try:
        with lock.acquire(timeout=0):
            done = _fetched(offer, emit, control)
    except Timeout:
        raise UserError("hub.busy", repo=offer.repo) from None
    return _usable(offer.folder, offer.repo) if done else None


def _fetched(offer: Offer, emit: Callable[[Event], None], control: Control) -> bool:
    stage = _stage(offer)
    if _complete(offer):
        return True
    try:
        stage.mkdir(exist_ok=True)
        have = _reuse(offer, stage)
        _check_room(offer, have)
    except OSError as error:
        raise disk_fault(error, stage) from None
    emit(Note(key="hub.resumes" if have else "hub.fetching", params={
        "repo": offer.repo, "mb": _mb(offer.size), "have": _mb(have),
        "licence": offer.licence or "?", "source": offer.source}))
    progress = _Progress(emit, offer.size)
    for file in offer.files:
        if not (stage / file.name).exists() and not _one(offer, file, stage, progress, control):
            return False
        progress.finished(file.size)
    _settle(offer, stage)
    emit(Note(key="hub.fetched", params={"repo": offer.repo, "folder": str(offer.folder)}))
    return True


def _one(offer: Offer, file: File, stage: Path, progress: _Progress, control: Control) -> bool:
    from huggingface_hub import get_token, hf_hub_url
    from huggingface_hub.constants import ENDPOINT
    url = hf_hub_url(offer.repo, file.name, revision=offer.commit, endpoint=offer.source)
    token = get_token() if offer.source == ENDPOINT else None
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return download(Wanted(file.name, url, file.size, file.digest), stage / file.name, headers,
                    progress.within, control)


class _Progress:
    def __init__(self, emit: Callable[[Event], None], total: int) -> None:
        self.emit, self.total, self.before, self.told_at = emit, total, 0, 0.0

    def within(self, done: int) -> None:
        now = time.monotonic()
        if now - self.told_at >= TELL_S:
            self.told_at = now
            self._tell(self.before + done)

    def finished(self, size: int) -> None:
        self.before += size
        if self.before == self.total:
            self._tell(self.total)

    def _tell(self, done: int) -> None:
        self.emit(Phase(name="download", done=min(_mb(done), _mb(self.total)),
                        total=_mb(self.total)))


def _complete(offer: Offer) -> bool:
    """Raises UserError where a folder of the user's own stands in the way."""
    if not offer.folder.exists():
        return False
    manifest = _manifest(offer.folder)
    if not manifest:
        raise UserError("hub.folder_taken", folder=offer.folder)
    return all(manifest.get(file.name) == file.digest
               and _size(offer.folder / file.name) == file.size for file in offer.files)


def _manifest(folder: Path) -> dict[str, str]:
    """File name -> hash, of a folder that we fetched."""
    try:
        files = from_json((folder / MANIFEST).read_text("utf-8"))["files"]
        return {str(file["name"]): str(file["digest"]) for file in files}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _stage(offer: Offer) -> Path:
    """The hidden folder that fills up. Those of other versions are dropped; a swap that a crash
    cut in two is undone."""
    stage = offer.folder.with_name(f".{offer.folder.name}.{offer.commit[:12]}.partial")
    for other in offer.folder.parent.glob(f".{offer.folder.name}.*.partial"):
        if other != stage:
            shutil.rmtree(other, ignore_errors=True)
    before = _before(offer)
    if before.exists() and not offer.folder.exists():
        os.replace(before, offer.folder)
    shutil.rmtree(before, ignore_errors=True)
    return stage


def _before(offer: Offer) -> Path:
    return offer.folder.with_name(f".{offer.folder.name}.before")


def _reuse(offer: Offer, stage: Path) -> int:
    """Links unchanged files of the version that is there. Returns the bytes we needn't fetch."""
    there, have = _manifest(offer.folder), 0
    for file in offer.files:
        target, old = stage / file.name, offer.folder / file.name
        if (not target.exists() and there.get(file.name) == file.digest
                and _size(old) == file.size):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(old, target)
            except OSError:                     # a file system without hard links
                shutil.copy2(old, target)
        have += _size(target) or _size(target.with_name(f"{target.name}.part"))
    return have


def _check_room(offer: Offer, have: int) -> None:
    free, needed = shutil.disk_usage(offer.folder.parent).free, offer.size - have + RESERVE
    if free < needed:
        raise UserError("hub.no_room", repo=offer.repo, needed=_mb(needed), free=_mb(free),
                        folder=offer.folder.parent)


def _settle(offer: Offer, stage: Path) -> None:
    """The stage becomes the folder, by renames only."""
    paths.write_atomic(stage / MANIFEST, json.dumps(_plain(offer), indent=1))
    try:
        if offer.folder.exists():
            os.replace(offer.folder, _before(offer))
        os.replace(stage, offer.folder)
    except OSError as error:
        raise disk_fault(error, offer.folder) from None
    shutil.rmtree(_before(offer), ignore_errors=True)


def _plain(offer: Offer) -> Mapping[str, Any]:
    return {"repo": offer.repo, "commit": offer.commit, "licence": offer.licence,
            "source": offer.source, "files": [asdict(file) for file in offer.files]}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _mb(size: int) -> int:
    return -(-size // 1_000_000)
