"""What can be fetched: our catalogue, and what the hub or a mirror of it says of a repository.

Fetched are weights as safetensors or ONNX and plain data files; pickles (.bin, .pt, .ckpt) never.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

from core import paths
from core.base_models.download import TIMEOUT_S, network_errors
from core.errors import UserError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
WEIGHTS = (".safetensors", ".onnx")
DATA = (".json", ".txt", ".csv", ".model", ".jinja")    # .model: a tokenizer's sentencepiece
MANIFEST = "darkroom.json"              # in a folder that we fetched: what, from where, hashes


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of core/base_models/models.yaml."""

    repo: str
    purpose: str                        # caption | tag | clip | base
    mb: int                             # about, 10^6 bytes
    licence: str
    files: tuple[str, ...]              # patterns
    about: dict[str, str]               # language -> one line
    revision: str = "main"
    use: str = ""                       # the file that a config names; "": the folder
    sha256: dict[str, str] = field(default_factory=dict)
    family: str = ""                    # of a base


@dataclass(frozen=True, slots=True)
class File:
    name: str
    size: int                           # bytes
    digest: str                         # SHA-256, or git's SHA-1 of small text files


@dataclass(frozen=True, slots=True)
class Offer:
    """What a download would bring: to be shown before the user says yes."""

    repo: str
    commit: str
    licence: str                        # "" where the repository names none
    source: str                         # address of the hub or mirror
    files: tuple[File, ...]
    folder: Path

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def models_dir() -> Path:
    return paths.data_dir() / "models"


@functools.cache
def catalogue() -> tuple[Entry, ...]:
    entries = yaml.safe_load((Path(__file__).parent / "models.yaml").read_text("utf-8"))
    return tuple(Entry(**{**entry, "files": tuple(entry["files"])}) for entry in entries)


def known(repo: str) -> Entry | None:
    return next((entry for entry in catalogue() if entry.repo.lower() == repo.lower()), None)


# --- what the hub has ---

def describe(repo: str, mirror: str = "", revision: str = "") -> Offer:
    """Asks the hub, or a mirror of it, for the exact files, sizes and licence.

    Raises UserError: `hub.bad_name`, `hub.not_found`, `hub.gated`, `hub.offline`,
    `hub.unreachable`, `hub.only_pickles` ... The user's token never goes to a mirror.
    """
    if not REPOSITORY.fullmatch(repo):
        raise UserError("hub.bad_name", name=repo)
    entry = known(repo)
    source = checked_source(mirror)
    info = _asked(repo, source, revision or (entry.revision if entry else "main"), bool(mirror))
    if not info.sha or not info.siblings:
        raise UserError("hub.not_a_hub", host=urlsplit(source).netloc)
    names = chosen([one.rfilename for one in info.siblings], entry.files if entry else ())
    if not any(name.endswith(WEIGHTS) for name in names):
        raise UserError("hub.only_pickles", repo=repo, revision=revision or "main")
    files = tuple(_file(repo, source, info.sha, one, bool(mirror))
                  for one in info.siblings if one.rfilename in names)
    return Offer(repo, info.sha, _licence(info) or (entry.licence if entry else ""), source,
                 _pinned(files, entry), models_dir() / repo)


def chosen(names: Iterable[str], patterns: Sequence[str] = ()) -> list[str]:
    """The files worth fetching: by the catalogue's patterns, else one copy of the weights.

    Names that would leave the folder, pickles and code are never among them.
    """
    names = [name for name in names if _safe(name) and name.endswith((*WEIGHTS, *DATA))]
    if patterns:
        return [name for name in names if any(_fits(name, one) for one in patterns)]
    if "model_index.json" in names:             # the diffusers layout: parts in folders
        names = [n for n in names if "/" in n or not n.endswith(WEIGHTS)]
    names = [n for n in names if not re.search(r"\.(fp16|bf16|non_ema|int8)\.|(^|/)openvino", n)
             or not n.endswith((*WEIGHTS, ".json"))]
    if any(name.endswith(".safetensors") for name in names):
        names = [name for name in names if not name.endswith(".onnx")]
    return names


def _fits(name: str, pattern: str) -> bool:
    """`*` stays within its folder."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _safe(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return (bool(parts) and not name.startswith(("/", ".")) and ".." not in parts
            and not re.search(r'[\\:*?"<>|\x00-\x1f]', name) and parts[-1] != MANIFEST)


def checked_source(mirror: str) -> str:
    """The address to ask; a mirror as `hf-mirror.com` or with its https://."""
    if not mirror:
        from huggingface_hub.constants import ENDPOINT
        return str(ENDPOINT)
    address = mirror if "://" in mirror else f"https://{mirror}"
    parts = urlsplit(address)
    here = parts.hostname in ("127.0.0.1", "localhost", "::1")
    if (not re.fullmatch(r"[\w.:\[\]-]+", parts.netloc)
            or not (parts.scheme == "https" or (here and parts.scheme == "http"))):
        raise UserError("hub.bad_mirror", mirror=mirror)
    return address.rstrip("/")


def _asked(repo: str, source: str, revision: str, mirrored: bool) -> Any:
    from huggingface_hub import HfApi
    api = HfApi(endpoint=source, token=False if mirrored else None)
    try:
        return api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
    except network_errors() as error:
        raise _told(error, repo, source, revision) from None
    except (ValueError, KeyError, TypeError):           # a web page or other JSON than the hub's
        raise UserError("hub.not_a_hub", host=urlsplit(source).netloc) from None


def _told(error: Exception, repo: str, source: str, revision: str) -> UserError:
    """One clear fault for each way in which a hub refuses."""
    from huggingface_hub import errors
    host = urlsplit(source).netloc
    match error:
        case errors.OfflineModeIsEnabled():
            return UserError("hub.offline")
        case errors.GatedRepoError():
            return UserError("hub.gated", repo=repo, page=f"https://huggingface.co/{repo}")
        case errors.RevisionNotFoundError():
            return UserError("hub.no_revision", repo=repo, revision=revision)
        case errors.RepositoryNotFoundError():
            return UserError("hub.not_found", repo=repo, host=host)
        case errors.HfHubHTTPError():
            status = error.response.status_code
            return UserError("hub.not_found" if status == 404 else "hub.gated" if status in (401,
                                                                                             403)
                             else "hub.status", repo=repo, host=host, status=status,
                             page=f"https://huggingface.co/{repo}")
    return UserError("hub.unreachable", host=host, reason=str(error) or type(error).__name__)


def _file(repo: str, source: str, commit: str, sibling: Any, mirrored: bool) -> File:
    """Size and hash as the hub's list has them, else from the headers of the file itself."""
    size, digest = sibling.size, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if size is None or not HASH.fullmatch(digest or ""):
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        url = hf_hub_url(repo, sibling.rfilename, revision=commit, endpoint=source)
        try:
            facts = get_hf_file_metadata(url, token=False if mirrored else None,
                                         timeout=TIMEOUT_S)
        except network_errors() as error:
            raise _told(error, repo, source, commit) from None
        size, digest = facts.size, facts.etag
    if size is None or not HASH.fullmatch(digest or ""):
        raise UserError("hub.no_hash", file=sibling.rfilename, host=urlsplit(source).netloc)
    return File(sibling.rfilename, int(size), str(digest))


def _pinned(files: tuple[File, ...], entry: Entry | None) -> tuple[File, ...]:
    """Published hashes go before those that a mirror states."""
    known_hashes = entry.sha256 if entry else {}
    return tuple(File(one.name, one.size, known_hashes.get(one.name, one.digest)) for one in files)


def _licence(info: Any) -> str:
    card = info.card_data.to_dict() if info.card_data else {}
    named = [card.get("license_name"), card.get("license")]
    named += [tag.partition(":")[2] for tag in info.tags or () if tag.startswith("license:")]
    return next((str(one) for one in named if one and one != "other"), "")
