"""Models found on this machine, or fetched from the hub when the user says so, never else.

They are looked for as a path, in our own models/OWNER/NAME, in the cache of huggingface_hub.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout

from core import paths
from core.base_models import catalog
from core.base_models.download import disk_fault, download
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Event, Note, Phase
from core.serialization import from_json

MARKERS = ("config.json", "model_index.json", "model.onnx", "open_clip_config.json")
RESERVE = 200_000_000                   # bytes that stay free on the disk
TELL_S = 0.5                            # between two Phase events


# --- on this machine ---

def local(name: str, needs: Sequence[str] = ()) -> Path | None:
    """The file or folder of a path or repository on this machine; None where it is not here. Never
    asks the network.

    A folder of ours or of the hub's cache counts only with a match for every pattern in `needs`;
    a path that the user wrote counts as it is.
    """
    if not name:
        return None
    path = paths.expanded(name)
    if path.exists():
        return path.absolute()
    return next((_usable(folder, name) for folder in _folders(name, needs)
                 if all(any(folder.glob(pattern)) for pattern in needs)), None)


def find(name: str, needs: Sequence[str] = ()) -> Path:
    """As `local`, but raises UserError `hub.missing` (with the command that fetches it) or
    `hub.no_path` where nothing is here."""
    path = local(name, needs)
    if path is None:
        if catalog.REPOSITORY.fullmatch(name):
            raise UserError("hub.missing", name=name)
        raise UserError("hub.no_path", path=name)
    return path


def stamp(name: str) -> str:
    """A key for caches that changes with the weights of a path or repository."""
    path = local(name)
    files = [path] if path and path.is_file() else sorted(path.rglob("*")) if path else []
    stats = [(file.name, file.stat()) for file in files if file.name.endswith(catalog.WEIGHTS)]
    return "|".join([name, *(f"{file}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in stats)])


def _folders(name: str, needs: Sequence[str]) -> Iterator[Path]:
    """The folders where a repository may be: our own, then snapshots in the hub's cache."""
    if not catalog.REPOSITORY.fullmatch(name):
        return
    if (downloaded := catalog.models_dir() / name).is_dir():
        yield downloaded
    from huggingface_hub import try_to_load_from_cache
    entry = catalog.known(name)
    # the cache is asked for a file; any that most models have
    markers = [need for need in needs if "*" not in need] or list(MARKERS)
    for revision in dict.fromkeys([entry.revision if entry else "main", "main"]):
        for marker in [*([entry.use] if entry and entry.use else []), *markers]:
            file = try_to_load_from_cache(name, marker, revision=revision)
            if isinstance(file, str):
                yield Path(file).parents[marker.count("/")]


def _usable(folder: Path, name: str) -> Path:
    """What a config names of a model's folder: mostly the folder, at times one file in it."""
    entry = catalog.known(name)
    return folder / entry.use if entry and (folder / entry.use).is_file() else folder


# --- fetching ---

def fetch(repo: str, emit: Callable[[Event], None], control: Control, mirror: str = "",
          revision: str = "", offer: catalog.Offer | None = None) -> Path | None:
    """Downloads a model into our models folder; to be called only when the user said so.

    Returns the folder (or the one file that configs name), or None where a stop was asked for:
    what has come stays, and the next call goes on from there, also after a crash. Phase "download"
    counts in MB (10^6 bytes). The folder appears at the end, whole and checked, or not at all.
    """
    offer = offer or catalog.describe(repo, mirror, revision)
    offer.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(offer.folder.parent / f".{offer.folder.name}.lock")
    try:
        with lock.acquire(timeout=0):
            done = _fetch(offer, emit, control)
    except Timeout:
        raise UserError("hub.busy", repo=offer.repo) from None
    return _usable(offer.folder, offer.repo) if done else None


def _fetch(offer: catalog.Offer, emit: Callable[[Event], None], control: Control) -> bool:
    """Fills the stage, then renames it. Returns False after a stop. The caller holds the lock."""
    stage = _stage(offer)
    if offer.folder.exists():
        manifest = _manifest(offer.folder)
        if not manifest:
            # a folder of the user's own stands in the way
            raise UserError("hub.folder_taken", folder=offer.folder)
        if all(manifest.get(file.name) == file.digest
               and _size(offer.folder / file.name) == file.size for file in offer.files):
            return True
    try:
        stage.mkdir(exist_ok=True)
        have = _reuse(offer, stage)
        free, needed = shutil.disk_usage(stage.parent).free, offer.size - have + RESERVE
    except OSError as error:
        raise disk_fault(error, stage) from None
    if free < needed:
        raise UserError("hub.no_room", repo=offer.repo, needed=_mb(needed), free=_mb(free),
                        folder=stage.parent)
    emit(Note(key="hub.resumes" if have else "hub.fetching", params={
        "repo": offer.repo, "mb": _mb(offer.size), "have": _mb(have),
        "licence": offer.licence or "?", "source": offer.source}))
    from huggingface_hub import get_token, hf_hub_url
    from huggingface_hub.constants import ENDPOINT
    # a mirror must not see the user's token
    token = get_token() if offer.source == ENDPOINT else None
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    total, before, emitted_at = _mb(offer.size), 0, 0.0

    def progress(done: int) -> None:
        nonlocal emitted_at
        now = time.monotonic()
        if now - emitted_at >= TELL_S:
            emitted_at = now
            emit(Phase(name="download", done=min(_mb(before + done), total), total=total))

    for file in offer.files:
        url = hf_hub_url(offer.repo, file.name, revision=offer.commit, endpoint=offer.source)
        if not (stage / file.name).exists() and not download(
                file, url, stage / file.name, headers, progress, control):
            return False
        before += file.size
    emit(Phase(name="download", done=total, total=total))
    _publish(offer, stage)
    emit(Note(key="hub.fetched", params={"repo": offer.repo, "folder": str(offer.folder)}))
    return True


def _manifest(folder: Path) -> dict[str, str]:
    """File name -> hash; empty where we did not fetch the folder."""
    try:
        files = from_json((folder / catalog.MANIFEST).read_text("utf-8"))["files"]
        return {str(file["name"]): str(file["digest"]) for file in files}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _stage(offer: catalog.Offer) -> Path:
    """The hidden folder that is filled. Tidies up: stages of other versions are removed, and a swap
    of folders that a crash cut in two is undone."""
    stage = offer.folder.with_name(f".{offer.folder.name}.{offer.commit[:12]}.partial")
    for other in offer.folder.parent.glob(f".{offer.folder.name}.*.partial"):
        if other != stage:
            shutil.rmtree(other, ignore_errors=True)
    old = _old_folder(offer)
    if old.exists() and not offer.folder.exists():
        os.replace(old, offer.folder)
    shutil.rmtree(old, ignore_errors=True)
    return stage


def _old_folder(offer: catalog.Offer) -> Path:
    """Where the old version is while the new one takes its place."""
    return offer.folder.with_name(f".{offer.folder.name}.before")


def _reuse(offer: catalog.Offer, stage: Path) -> int:
    """Links unchanged files of the old version. Returns how many bytes need not be fetched."""
    digests, have = _manifest(offer.folder), 0
    for file in offer.files:
        target, old = stage / file.name, offer.folder / file.name
        if (not target.exists() and digests.get(file.name) == file.digest
                and _size(old) == file.size):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(old, target)
            except OSError:
                # a file system without hard links
                shutil.copy2(old, target)
        have += _size(target) or _size(target.with_name(f"{target.name}.part"))
    return have


def _publish(offer: catalog.Offer, stage: Path) -> None:
    """Makes the stage the model's folder, by renames only, so that it is never half there."""
    manifest = {"repo": offer.repo, "commit": offer.commit, "licence": offer.licence,
                "source": offer.source, "files": [asdict(file) for file in offer.files]}
    paths.write_atomic(stage / catalog.MANIFEST, json.dumps(manifest, indent=1))
    try:
        if offer.folder.exists():
            os.replace(offer.folder, _old_folder(offer))
        os.replace(stage, offer.folder)
    except OSError as error:
        raise disk_fault(error, offer.folder) from None
    shutil.rmtree(_old_folder(offer), ignore_errors=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _mb(size: int) -> int:
    """Bytes in 10^6, rounded up."""
    return -(-size // 1_000_000)
