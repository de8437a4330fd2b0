"""Finds a captioner's weights on this machine, and the faults where they are missing. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core import paths
from core.errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find(captioner: str, name: str, repository: str = "") -> Path:
    """The folder for `name`: "demo", a folder, or a hub repository that has been fetched.

    Raises UserError("captioner.no_weights") with the command that fetches them.
    """
    if name == "demo":
        return paths.DEMO / "captioners" / captioner
    folder = paths.expanded(name)
    if folder.is_dir():
        return folder.absolute()
    repository = repository or name
    # Here, as the hub's library takes long to import.
    from core.base_models import hub
    local = hub.local(repository, ("*.safetensors",))
    if local is None:
        raise UserError("captioner.no_weights", model=name,
                        command=f"darkroom models get {repository}")
    return local


def safetensors_of(captioner: str, folder: Path, preferred: Sequence[str]) -> Path:
    """The weights in the folder: the first of `preferred` that is there, else the first file.

    Raises UserError where there is none, or only a pickle, which could run code.
    """
    files = sorted(folder.glob("*.safetensors"))
    if chosen := [folder / name for name in preferred if folder / name in files] + files:
        return chosen[0]
    for path in sorted(folder.glob("*")):
        if path.suffix in PICKLES:
            raise UserError("captioner.pickle", file=path)
    raise UserError("captioner.no_weights_in", folder=folder, captioner=captioner.upper())


def broken(captioner: str, model: str, folder: Path, error: Exception) -> UserError:
    """The fault of files that make no model: damaged, of another kind, of another size."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError("captioner.broken_weights", captioner=captioner.upper(), model=model,
                     folder=folder, reason=reason[:300])
