"""The files beside a single-file base: its VAE, its text encoders, its tokenizer.

They are looked for where people and ComfyUI put them: in the base's folder, in one named like the
base, and in `vae`, `text_encoders`, `clip` and `tokenizers` in or beside the base's folder. Files
are told apart by what they hold. Where two fit and differ, the user is asked; `ComponentFiles`
holds the answer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import i18n, paths
from core.config import GenerateConfig, TrainConfig, resolve
from core.errors import Fix, UserError
from core.families.components import precision_copies, tokenizer_kinds, vae_hashes
from core.families.components.tokenizer_kinds import FILES, TokenizerKind
from core.families.detection import identify
from core.hashes import fingerprint, short_hash
from core.jobs.events import Event, Note
from core.safetensors_header import read_header

FOLDERS = ("vae", "text_encoders", "clip", "tokenizers", "tokenizer")
# Size (root mean square) of scaled latents: half of what flat pictures have, and twice it.
LEAST_SIZE, MOST_SIZE = 0.35, 2.5
MEASURED_PICTURES = 32
SHIPPED = "shipped"                         # the value of `tokenizer` that means the app's own
# Tensors (vocabulary size, width) of a text encoder.
EMBEDDINGS = ("embed_tokens.weight", "shared.weight")


@dataclass(frozen=True, slots=True)
class ComponentFiles:
    """The files that the user named in the config. Everything else is looked for."""

    vae: Path | None = None
    text_encoders: tuple[Path, ...] = ()
    tokenizer: Path | None = None           # its folder


NO_FILES = ComponentFiles()


@dataclass(frozen=True, slots=True)
class UsedComponent:
    """A VAE, text encoder or tokenizer from another place that a base is used with."""

    part: str                               # vae, text_encoder, tokenizer ...
    path: Path | None                       # None: the base does without
    digest: str = ""
    short_hash: str = ""                    # of VAEs: what kohya's trainer calls ss_vae_hash
    other_model: str = ""                   # title of the model that it was made for, if another


def files_from_config(config: TrainConfig | GenerateConfig) -> ComponentFiles:
    """The files that a config names. Raises UserError where one isn't there."""
    def existing(key: str, value: str) -> Path | None:
        if not value:
            return None
        path = resolve(value, None)
        if not os.path.exists(path) or (path.is_dir() and key != "tokenizer"):
            raise UserError("families.companion_not_there", key=key, path=path)
        return path

    vae = existing("vae", config.vae)
    encoders = [existing("text_encoders", path) for path in config.text_encoders]
    tokenizer = (Path(SHIPPED) if config.tokenizer == SHIPPED
                 else existing("tokenizer", config.tokenizer))
    if tokenizer is not None and tokenizer.is_file():
        tokenizer = tokenizer.parent
    return ComponentFiles(vae, tuple(path for path in encoders if path), tokenizer)


def folders(source: Path) -> list[Path]:
    """The existing folders in which a base's components are looked for, the nearest first."""
    near = [source.parent / source.stem, source.parent]
    candidates = [*near, *(folder / name for folder in (*near, source.parent.parent)
                           for name in FOLDERS), paths.data_dir() / "tokenizers"]
    return [folder for folder in dict.fromkeys(candidates) if folder.is_dir()]


# --- weights ---

def find_file(source: Path, what: str, config: Mapping[str, Any], named_files: ComponentFiles
              ) -> Path | None:
    """The .safetensors file beside a base that is a `what` (`Found.what`) and has the sizes of the
    model's config.

    Raises UserError where several different files fit, and where the only VAE was made for another
    model.
    """
    is_vae = what.startswith("vae")
    fitting = [path for folder in folders(source) for path in sorted(folder.glob("*.safetensors"))
               if path != source and _is(path, what) and _has_sizes(path, config)]
    readable = [path for path in fitting if not identify(path).unread_format] or fitting
    # One of each content, the nearest: people have copies of a file in several folders.
    by_content = {fingerprint([(path, "")]): path for path in reversed([*dict.fromkeys(readable)])}
    files = list(by_content.values())[::-1]
    # Some models' VAEs have the same sizes. Published files are known by their hash: the model's
    # own comes first, then unknown files; another model's is never taken.
    model = vae_hashes.model_of(config) if is_vae else ""
    if model and files:
        models = {path: vae_hashes.model_in(path) for path in files}
        if model in models.values():
            return next(path for path in files if models[path] == model)
        if not (files := [path for path in files if not models[path]]):
            path, other = next(iter(models.items()))
            raise UserError("families.companion_foreign", path=source, file=path,
                            made_for=vae_hashes.TITLES[other], wanted=vae_hashes.TITLES[model],
                            fixes=[_fix_naming("vae", path, str(path))])
    if len(files) > 1:
        files = precision_copies.finest(files)
    if len(files) > 1:
        key = "vae" if is_vae else "text_encoders"
        raise UserError("families.companion_unclear", path=source, key=key, count=len(files),
                        part=i18n.tr(f"families.is_{what}"), files=", ".join(map(str, files)),
                        fixes=[_fix_naming(key, path, str(path) if is_vae else [
                        *map(str, named_files.text_encoders), str(path)]) for path in files])
    return files[0] if files else None


def named(named_files: ComponentFiles, part: str, what: str) -> Path | None:
    """The file that the user named for a part; of the text encoders the one that is a `what`."""
    if part == "vae":
        return named_files.vae
    return next((path for path in named_files.text_encoders if what and _is(path, what)), None)


def check_used(named_files: ComponentFiles, used: Iterable[UsedComponent], title: str) -> None:
    """Raises UserError for a named file that a base has no use for. `title` is the family's."""
    parts = {component.path: component.part for component in used}
    if named_files.tokenizer is not None and not any(
            part.startswith("tokenizer") for part in parts.values()):
        raise UserError("families.tokenizer_unused", title=title)
    # `used` has the named VAE whatever it is.
    if named_files.vae is not None and not identify(named_files.vae).what.startswith("vae"):
        parts.pop(named_files.vae, None)
    for path in filter(None, (named_files.vae, *named_files.text_encoders)):
        if path not in parts or (path != named_files.vae and not parts[path].startswith("text")):
            raise UserError("families.companion_unused", path=path, title=title,
                            found=identify(path).description())


def _fix_naming(key: str, path: Path, value: str | list[str]) -> Fix:
    """A button that names `path` in the config."""
    return Fix("fixes.take_file", {key: value}, {"file": path.name, "folder": path.parent.name})


def _is(path: Path, what: str) -> bool:
    with contextlib.suppress(UserError):
        return identify(path).what == what
    return False


def _has_sizes(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether a text encoder's vocabulary and width, or a VAE's channels, are those of a config.
    The names of the tensors tell all other sizes."""
    text_config = config.get("text_config", config)
    rows = text_config.get("vocab_size")
    width = text_config.get("hidden_size", text_config.get("d_model"))
    channels = config.get("latent_channels", config.get("z_dim"))
    shapes = {name: info.shape for name, info in read_header(path).tensors.items()}
    embeddings = [shape for name, shape in shapes.items() if name.endswith(EMBEDDINGS)]
    latents = [shapes[name][1] for name in ("decoder.conv_in.weight", "decoder.conv1.weight")
               if len(shapes.get(name, ())) > 1]
    return (all(shape == (rows, width) for shape in embeddings if rows)
            and all(count == channels for count in latents if channels))


# --- tokenizers ---

def find_tokenizer(source: Path, name: str, kind: TokenizerKind, rows: int,
                   named_files: ComponentFiles) -> Path:
    """The folder of a tokenizer of this kind, for an encoder with so many `rows` of embeddings.

    The one that the user named comes first, then the base's own folder (`name`). Otherwise all
    that lie beside the base are compared with the app's own, which is taken where no other fits.
    Raises UserError where none fits, and where several fit and differ.
    """
    first = source / name if named_files.tokenizer is None else named_files.tokenizer
    if first != Path(SHIPPED) and first.is_dir():
        return _checked(first, _read(first), rows)
    if named_files.tokenizer is not None and kind.folder is None:
        raise UserError("families.tokenizer_not_shipped", title=kind.title)
    fitting, others = list[tuple[Path, dict[str, int]]](), list[Path]()
    unreadable: UserError | None = None
    # The app's files of a kind may be those of its nearest relative: its own tokens are added.
    if kind.folder is not None:
        words = dict(_read(kind.folder))
        added = {word: len(words) + n for n, word in enumerate(kind.more)}
        fitting.append((kind.folder, words | added))
    # "shipped" is the only name that comes here: then nothing else is looked at.
    searched = folders(source) if named_files.tokenizer is None else []
    candidates = [folder for parent in searched
                  for folder in (parent, *sorted(p for p in parent.iterdir() if p.is_dir()))
                  if any((folder / file).is_file() for file in FILES)]
    for folder in candidates:
        # What can't be read may be another base's: it only counts where nothing else is there.
        try:
            words = _read(folder)
        except UserError as error:
            unreadable = unreadable or error
            continue
        if not kind.fits(words, rows):
            others.append(folder)
        elif not any(words == known for _, known in fitting):
            fitting.append((folder, words))
    if len(fitting) > 1:
        raise UserError("families.tokenizer_unclear", path=source, title=kind.title,
                        files=", ".join(str(folder) for folder, _ in fitting), fixes=[
                        _fix_naming("tokenizer", folder, SHIPPED if folder == kind.folder
                                    else str(folder)) for folder, _ in fitting])
    if fitting:
        return _checked(*fitting[0], rows)
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


def _checked(folder: Path, words: Mapping[str, int], rows: int) -> Path:
    """Raises UserError for a token that the encoder has no row for."""
    highest = max(words.values(), default=0)
    if highest >= rows:
        raise UserError("families.tokenizer_too_large", path=folder, words=highest + 1, rows=rows)
    return folder


# --- notes and metadata ---

def used_file(part: str, path: Path, config: Mapping[str, Any]) -> UsedComponent:
    """The record of a VAE or text encoder; `config` is that of the base's model."""
    if part != "vae":
        return UsedComponent(part, path, fingerprint([(path, "")]))
    model, expected = vae_hashes.model_in(path), vae_hashes.model_of(config)
    other = vae_hashes.TITLES[model] if model and expected not in ("", model) else ""
    return UsedComponent(part, path, vae_hashes.sha256(path), short_hash(path), other)


def used_tokenizer(part: str, folder: Path) -> UsedComponent:
    return UsedComponent(part, folder, tokenizer_kinds.digest(tokenizer_kinds.words_in(folder)))


def announce(family: Any, source: Path, emit: Callable[[Event], None]) -> list[UsedComponent]:
    """Notes which files a base is used with, and returns them.

    A plugin's family needn't have `beside`. Raises UserError as loading the base would, before
    anything is computed.
    """
    used: list[UsedComponent] = family.beside(source) if hasattr(family, "beside") else []
    def note(key: str, **params: str) -> None:
        emit(Note(key=key, params={"base": source.name, **params}))

    if files := [f"{component.path.name} ({component.part}, {component.digest[:10]})"
                 for component in used if component.path]:
        note("families.companions_taken", files=", ".join(files))
    for component in used:
        if component.path is None:
            note("families.companion_without", part=component.part)
        elif component.other_model:
            note("families.companion_odd", file=component.path.name,
                 made_for=component.other_model)
    return used


def tell_scale(used: Iterable[UsedComponent], latents: Sequence[Tensor], masked: bool,
               emit: Callable[[Event], None]) -> None:
    """Notes where pictures' latents (..., C, h, w) are far from 1, the size that bases learn with:
    the VAE's scale is then another model's. `masked`: the last channel is a mask.

    SD 3's VAE in Flux gives 0.24, Flux's in SD 3 gives 4.
    """
    vae = next((component.path for component in used
                if component.part == "vae" and component.path), None)
    if vae is None or not latents:
        return
    measured = [picture[..., :-1, :, :] if masked else picture
                for picture in latents[:MEASURED_PICTURES]]
    squares = torch.stack([picture.float().square().mean() for picture in measured])
    if not LEAST_SIZE <= (size := squares.mean().sqrt().item()) <= MOST_SIZE:
        emit(Note(key="families.latents_scale", params={"size": f"{size:.2f}", "file": vae.name}))


def summary(used: Iterable[UsedComponent]) -> dict[str, dict[str, str]]:
    """For a run's summary: part -> path and digest."""
    return {component.part: {"path": str(component.path), "digest": component.digest}
            for component in used if component.path}


def metadata(used: Iterable[UsedComponent]) -> dict[str, str]:
    """For a LoRA file: kohya's keys for the VAE, our own for the other components."""
    entries: dict[str, str] = {}
    for component in used:
        if component.path is None:
            continue
        part, name = component.part, component.path.name
        entries |= ({"ss_vae_name": name, "ss_vae_hash": component.short_hash,
                     "ss_new_vae_hash": component.digest} if part == "vae" else
                    {f"darkroom.{part}_name": name, f"darkroom.{part}_hash": component.digest})
    return entries
