"""Models that can be downloaded: our catalogue, and what the hub or a mirror says of a repository.

Only weights as safetensors or ONNX and plain data files are fetched, never pickles (.bin, .pt,
.ckpt), which can run code.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

from core import paths
from core.base_models.download import TIMEOUT_S, File, network_errors
from core.errors import UserError
from core.system import surroundings

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
    mb: int                             # about, in 10^6 bytes
    licence: str
    files: tuple[str, ...]              # patterns of the files to fetch
    about: dict[str, str]               # language -> one line
    revision: str = "main"
    use: str = ""                       # the file that a config names; "": the folder
    sha256: dict[str, str] = field(default_factory=dict)    # file -> hash
    family: str = ""                    # of a base model


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

    Raises UserError: `hub.bad_name`, `hub.not_found`, `hub.gated`, `hub.offline`, `hub.socks`,
    `hub.unreachable`, `hub.only_pickles` ... The user's token never goes to a mirror.
    """
    from huggingface_hub import HfApi
    if not REPOSITORY.fullmatch(repo):
        raise UserError("hub.bad_name", name=repo)
    if proxy := surroundings.unusable_proxy():
        raise UserError("hub.socks", proxy=proxy)
    # an empty entry for what the catalogue doesn't have
    entry = known(repo) or Entry(repo, "", 0, "", (), {})
    source = checked_source(mirror)
    host = urlsplit(source).netloc
    asked_revision = revision or entry.revision
    # False: never, None: the one that the user has stored
    token = False if mirror else None
    try:
        info: Any = HfApi(endpoint=source, token=token).model_info(
            repo, revision=asked_revision, files_metadata=True, timeout=TIMEOUT_S)
    except network_errors() as error:
        raise _network_fault(error, repo, source, asked_revision) from None
    except (ValueError, KeyError, TypeError):
        # a web page, or other JSON than the hub's
        raise UserError("hub.not_a_hub", host=host) from None
    if not info.sha or not info.siblings:
        raise UserError("hub.not_a_hub", host=host)
    names = chosen([sibling.rfilename for sibling in info.siblings], entry.files)
    if not any(name.endswith(WEIGHTS) for name in names):
        raise UserError("hub.only_pickles", repo=repo, revision=revision or "main")
    files = [_file(repo, source, info.sha, sibling, token)
             for sibling in info.siblings if sibling.rfilename in names]
    # Hashes that we published ourselves go before those that a mirror states.
    files = [replace(file, digest=entry.sha256.get(file.name, file.digest)) for file in files]
    card = info.card_data.to_dict() if info.card_data else {}
    licences = [card.get("license_name"), card.get("license"), *(
        tag.partition(":")[2] for tag in info.tags or () if tag.startswith("license:"))]
    licence = next((str(name) for name in licences if name and name != "other"), "")
    return Offer(repo, info.sha, licence or entry.licence, source, tuple(files),
                 models_dir() / repo)


def chosen(names: Iterable[str], patterns: Sequence[str] = ()) -> list[str]:
    """The files worth fetching: by the catalogue's patterns, else one copy of the weights.

    Names that would leave the folder, pickles and code are never among them.
    """
    names = [name for name in names if _is_safe(name) and name.endswith((*WEIGHTS, *DATA))]
    if patterns:
        # fnmatch's * crosses folders; the same depth keeps it within one
        return [name for name in names if any(
            name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
            for pattern in patterns)]
    # diffusers' layout has its parts in folders; weights beside them are a copy of all
    if "model_index.json" in names:
        names = [name for name in names if "/" in name or not name.endswith(WEIGHTS)]
    # the same weights in other numbers or for other runtimes
    names = [name for name in names if not name.endswith((*WEIGHTS, ".json"))
             or not re.search(r"\.(fp16|bf16|non_ema|int8)\.|(^|/)openvino", name)]
    if any(name.endswith(".safetensors") for name in names):
        names = [name for name in names if not name.endswith(".onnx")]
    return names


def _is_safe(name: str) -> bool:
    """Whether a name of the hub's list stays in our folder, on Windows too."""
    parts = PurePosixPath(name).parts
    return (bool(parts) and not name.startswith(("/", ".")) and ".." not in parts
            and not re.search(r'[\\:*?"<>|\x00-\x1f]', name) and parts[-1] != MANIFEST)


def checked_source(mirror: str) -> str:
    """The address of the hub or of a mirror, written `hf-mirror.com` or with its https://.
    Raises UserError for what is no such address."""
    if not mirror:
        from huggingface_hub.constants import ENDPOINT
        return str(ENDPOINT)
    address = mirror if "://" in mirror else f"https://{mirror}"
    parts = urlsplit(address)
    # http without TLS only on this machine: what comes is loaded as a model
    is_local = parts.hostname in ("127.0.0.1", "localhost", "::1")
    if (not re.fullmatch(r"[\w.:\[\]-]+", parts.netloc)
            or not (parts.scheme == "https" or (is_local and parts.scheme == "http"))):
        raise UserError("hub.bad_mirror", mirror=mirror)
    return address.rstrip("/")


def _network_fault(error: Exception, repo: str, source: str, revision: str) -> UserError:
    """The UserError for an error of huggingface_hub, one for each way in which a hub refuses."""
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
            code = {404: "hub.not_found", 401: "hub.gated", 403: "hub.gated"}.get(
                status, "hub.status")
            return UserError(code, repo=repo, host=host, status=status,
                             page=f"https://huggingface.co/{repo}")
    return UserError("hub.unreachable", host=host, reason=str(error) or type(error).__name__)


def _file(repo: str, source: str, commit: str, sibling: Any, token: bool | None) -> File:
    """Size and hash of a file, from the hub's list, else from the headers of the file itself."""
    size, digest = sibling.size, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if size is None or not HASH.fullmatch(digest or ""):
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        url = hf_hub_url(repo, sibling.rfilename, revision=commit, endpoint=source)
        try:
            facts = get_hf_file_metadata(url, token=token, timeout=TIMEOUT_S)
        except network_errors() as error:
            raise _network_fault(error, repo, source, commit) from None
        size, digest = facts.size, facts.etag
    if size is None or not HASH.fullmatch(digest or ""):
        raise UserError("hub.no_hash", file=sibling.rfilename, host=urlsplit(source).netloc)
    return File(sibling.rfilename, int(size), str(digest))
