"""The files beside a single-file base: its VAE, its text encoders, its tokenizer.

They are looked for where people and ComfyUI put them: in the base's folder, in one named like the
base, and in `vae`, `text_encoders`, `clip` and `tokenizers` in or beside the base's folder. Files
are told apart by what they hold. Where two fit and differ, the user is asked; `Chosen` is the
answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import i18n, paths
from core.config import GenerateConfig, TrainConfig, resolve
from core.errors import Fix, UserError
from core.families.components import precision_copies, tokenizer_kinds, vae_hashes
from core.families.components.tokenizer_kinds import FILES, Kind
from core.families.detection import identify
from core.hashes import fingerprint, short_hash
from core.jobs.events import Event, Note
from core.safetensors_header import read_header

FOLDERS = ("vae", "text_encoders", "clip", "tokenizers", "tokenizer")
LEAST_SIZE, MOST_SIZE = 0.35, 2.5           # of latents; half and twice what flat pictures have
LOOKED_AT = 32                              # pictures
SHIPPED = "shipped"                         # the value of `tokenizer` that means the app's own
WORDS = ("embed_tokens.weight", "shared.weight")        # (words, width) of a text encoder


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the user named; everything else is looked for."""

    vae: Path | None = None
    text_encoders: tuple[Path, ...] = ()
    tokenizer: Path | None = None           # its folder


NONE = Chosen()


@dataclass(frozen=True, slots=True)
class Taken:
    """A companion that a base is used with. No path: the base does without."""

    part: str                               # vae, text_encoder, tokenizer ...
    path: Path | None
    digest: str = ""
    short: str = ""                         # of VAEs: what kohya's trainer calls ss_vae_hash
    odd: str = ""                           # the model that it was made for, where it is another


def chosen(config: TrainConfig | GenerateConfig, beside: Path | None = None) -> Chosen:
    """What a config names. Raises UserError where it isn't there."""
    vae = _named("vae", config.vae, beside)
    encoders = [_named("text_encoders", path, beside) for path in config.text_encoders]
    tokenizer = (Path(SHIPPED) if config.tokenizer == SHIPPED
                 else _named("tokenizer", config.tokenizer, beside))
    if tokenizer is not None and tokenizer.is_file():
        tokenizer = tokenizer.parent
    return Chosen(vae, tuple(path for path in encoders if path), tokenizer)


def _named(key: str, value: str, beside: Path | None) -> Path | None:
    if not value:
        return None
    path = resolve(value, beside)
    if not path.exists() or (path.is_dir() and key != "tokenizer"):
        raise UserError("families.companion_not_there", key=key, path=path)
    return path


def folders(source: Path) -> list[Path]:
    """Those that exist, the nearest first."""
    near = [source.parent / source.stem, source.parent]
    wanted = [*near, *(folder / name for folder in (*near, source.parent.parent)
                       for name in FOLDERS), paths.data_dir() / "tokenizers"]
    return [folder for folder in dict.fromkeys(wanted) if folder.is_dir()]


# --- weights ---

def find_file(source: Path, what: str, config: Mapping[str, Any], known: Chosen) -> Path | None:
    """The .safetensors file that is `what` (a word of core/families/detection.py) and has the
    sizes of the model's config. Raises UserError where several could be it, or none but another
    model's."""
    vae = what.startswith("vae")
    fitting = [path for folder in folders(source) for path in sorted(folder.glob("*.safetensors"))
               if path != source and _is(path, what) and _has_sizes(path, config)]
    found = _different([path for path in fitting if not identify(path).numbers] or fitting)
    wanted = vae_hashes.model_of(config) if vae else ""
    if wanted and found:
        models = {path: vae_hashes.model_in(path) for path in found}
        if own := [path for path, model in models.items() if model == wanted]:
            return own[0]
        if not (found := [path for path, model in models.items() if not model]):
            path, model = next(iter(models.items()))
            raise UserError("families.companion_foreign", path=source, file=path,
                            made_for=vae_hashes.TITLES[model], wanted=vae_hashes.TITLES[wanted],
                            fixes=[_taking("vae", path, str(path))])
    found = precision_copies.finest(found) if len(found) > 1 else found
    if len(found) > 1:
        key = "vae" if vae else "text_encoders"
        raise UserError("families.companion_unclear", path=source, key=key, count=len(found),
                        part=i18n.tr(f"families.is_{what}"), files=", ".join(map(str, found)),
                        fixes=[_taking(key, path, str(path) if vae else [
                        *map(str, known.text_encoders), str(path)]) for path in found])
    return found[0] if found else None


def named(known: Chosen, part: str, what: str) -> Path | None:
    """The file that the user named for a part."""
    if part == "vae":
        return known.vae
    return next((path for path in known.text_encoders if what and _is(path, what)), None)


def check_used(known: Chosen, taken: Iterable[Taken], title: str) -> None:
    """Raises UserError for a named file that a base has no use for."""
    used = {one.path: one.part for one in taken}
    if known.tokenizer is not None and not any(
            part.startswith("tokenizer") for part in used.values()):
        raise UserError("families.tokenizer_unused", title=title)
    if known.vae is not None and not identify(known.vae).what.startswith("vae"):
        used.pop(known.vae, None)
    for path in (known.vae, *known.text_encoders):
        if path is not None and (path not in used or (
                path != known.vae and not used[path].startswith("text"))):
            raise UserError("families.companion_unused", path=path, found=identify(path).said(),
                            title=title)


def _taking(key: str, path: Path, value: str | list[str]) -> Fix:
    return Fix("fixes.take_file", {key: value}, {"file": path.name, "folder": path.parent.name})


def _different(found: Iterable[Path]) -> list[Path]:
    """One of each content."""
    return list({fingerprint([(path, "")]): path
                 for path in reversed([*dict.fromkeys(found)])}.values())[::-1]


def _is(path: Path, what: str) -> bool:
    try:
        return identify(path).what == what
    except UserError:
        return False


def _has_sizes(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether a text encoder knows as many words in the same width, and a VAE has as many
    channels; files tell no more of what their names don't."""
    told = config.get("text_config", config)
    rows, width = told.get("vocab_size"), told.get("hidden_size", told.get("d_model"))
    channels = config.get("latent_channels", config.get("z_dim"))
    shapes = {name: info.shape for name, info in read_header(path).tensors.items()}
    tables = [shape for name, shape in shapes.items() if name.endswith(WORDS)]
    latents = [shapes[name][1] for name in ("decoder.conv_in.weight", "decoder.conv1.weight")
               if len(shapes.get(name, ())) > 1]
    return (all(shape == (rows, width) for shape in tables if rows)
            and all(count == channels for count in latents if channels))


def missing(source: Path, what: str) -> UserError:
    return UserError("families.companion_missing", path=source, folder=source.parent,
                     part=i18n.tr(f"families.is_{what}"))


# --- tokenizers ---

def find_tokenizer(source: Path, name: str, kind: Kind, rows: int, known: Chosen) -> Path:
    """The folder of the tokenizer of such a kind whose numbers an encoder of so many rows holds:
    the one that the user named, that of a base's own folder (`name`), else the app's own where no
    other lies beside the base. Raises UserError where none is there, and where several differ."""
    own = source / name if known.tokenizer is None else known.tokenizer
    if own != Path(SHIPPED) and own.is_dir():
        return _checked(own, _read(own), rows)
    if known.tokenizer is not None and kind.folder is None:
        raise UserError("families.tokenizer_not_shipped", title=kind.title)
    found, others = list[tuple[Path, dict[str, int]]](), list[Path]()
    unreadable: UserError | None = None
    if kind.folder is not None:
        known_words = dict(_read(kind.folder))
        found.append((kind.folder, known_words | {
            word: len(known_words) + n for n, word in enumerate(kind.more)}))
    for folder in () if known.tokenizer is not None else _tokenizers(source):
        try:
            read = _read(folder)
        except UserError as fault:              # another model's may be, of those beside this base
            unreadable = unreadable or fault
            continue
        if not kind.fits(read, rows):
            others.append(folder)
        elif not any(read == one for _, one in found):
            found.append((folder, read))
    if len(found) > 1:
        raise UserError("families.tokenizer_unclear", path=source, title=kind.title,
                        files=", ".join(str(folder) for folder, _ in found), fixes=[
                        _taking("tokenizer", folder, SHIPPED if folder == kind.folder
                                else str(folder)) for folder, _ in found])
    if found:
        return _checked(*found[0], rows)
    if unreadable is not None and not others:
        raise unreadable
    raise UserError("families.tokenizer_other" if others else "families.tokenizer_missing",
                    path=source, title=kind.title, folder=source.parent, found=", ".join(
                    map(str, others)), shared=paths.data_dir() / "tokenizers")


def _read(folder: Path) -> dict[str, int]:
    try:
        return tokenizer_kinds.words_in(folder)
    except (OSError, ValueError) as error:
        raise UserError("families.tokenizer_unreadable", path=folder, reason=error) from error


def _checked(folder: Path, read: Mapping[str, int], rows: int) -> Path:
    """Raises UserError for numbers that the encoder has no row for."""
    highest = max(read.values(), default=0)
    if highest >= rows:
        raise UserError("families.tokenizer_too_large", path=folder, words=highest + 1, rows=rows)
    return folder


def _tokenizers(source: Path) -> Iterator[Path]:
    for folder in folders(source):
        for one in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
            if any((one / name).is_file() for name in FILES):
                yield one


# --- what is told of them ---

def taken_file(part: str, path: Path, config: Mapping[str, Any]) -> Taken:
    if part == "vae":
        made, wanted = vae_hashes.model_in(path), vae_hashes.model_of(config)
        odd = vae_hashes.TITLES[made] if made and wanted not in ("", made) else ""
        return Taken(part, path, vae_hashes.sha256(path), short_hash(path), odd)
    return Taken(part, path, fingerprint([(path, "")]))


def taken_tokenizer(part: str, folder: Path) -> Taken:
    return Taken(part, folder, tokenizer_kinds.digest(tokenizer_kinds.words_in(folder)))


def announce(family: Any, source: Path, emit: Callable[[Event], None]) -> list[Taken]:
    """Tells which files a base is used with; families of one's own needn't know. Raises UserError
    as loading them would, before anything is computed."""
    found: list[Taken] = family.beside(source) if hasattr(family, "beside") else []
    if files := [f"{one.path.name} ({one.part}, {one.digest[:10]})" for one in found if one.path]:
        emit(Note(key="families.companions_taken", params={
            "base": source.name, "files": ", ".join(files)}))
    for one in found:
        if one.path and one.odd:
            emit(Note(key="families.companion_odd", params={
                "base": source.name, "file": one.path.name, "made_for": one.odd}))
        elif one.path is None:
            emit(Note(key="families.companion_without", params={
                "base": source.name, "part": one.part}))
    return found


def tell_scale(found: Iterable[Taken], latents: Sequence[Tensor], masked: bool,
               emit: Callable[[Event], None]) -> None:
    """Says where pictures' latents (..., C, h, w) are far smaller or larger than 1, the size that
    bases learn with: the VAE's scale is then another model's. SD 3's VAE in Flux gives 0.24, Flux's
    in SD 3 gives 4. `masked`: the last channel is a mask."""
    vae = next((one.path for one in found if one.part == "vae" and one.path), None)
    if vae is None or not latents:
        return
    looked_at = [one[..., :-1, :, :] if masked else one for one in latents[:LOOKED_AT]]
    squares = torch.stack([one.float().square().mean() for one in looked_at])
    size = squares.mean().sqrt().item()
    if not LEAST_SIZE <= size <= MOST_SIZE:
        emit(Note(key="families.latents_scale", params={"size": f"{size:.2f}", "file": vae.name}))


def summary(found: Iterable[Taken]) -> dict[str, dict[str, str]]:
    """For a run's summary: part -> path and digest."""
    return {one.part: {"path": str(one.path), "digest": one.digest} for one in found if one.path}


def metadata(found: Iterable[Taken]) -> dict[str, str]:
    """For a LoRA file: kohya's keys of the VAE, ours of the others."""
    told: dict[str, str] = {}
    for one in found:
        if one.path is None:
            continue
        if one.part == "vae":
            told |= {"ss_vae_name": one.path.name, "ss_vae_hash": one.short,
                     "ss_new_vae_hash": one.digest}
        else:
            told |= {f"darkroom.{one.part}_name": one.path.name,
                     f"darkroom.{one.part}_hash": one.digest}
    return told
