"""The weights of a model, one after the other: never is more of a file in memory than one of them
and what was read a moment ago.

Converters between names get shapes without numbers; what they do to each weight (cut, join, turn)
is remembered and done when the weight is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from core.faults import Fault
from core.reading import from_json

WINDOW = 2**26      # bytes; a mapped file counts as the process's memory, so it's mapped anew
Tensors = dict[str, Tensor]
File = tuple[Path, str]                     # and the prefix of the model's names in it


class Weights:
    """Raises Fault where a file has nothing under its prefix, OSError and SafetensorError where it
    can't be read."""

    def __init__(self, files: Iterable[File], convert: Callable[[Tensors], Tensors]) -> None:
        shapes: Tensors = {}
        self._files: dict[str, Path] = {}
        for path, prefix in files:
            found = _shapes(path, prefix)
            self._files |= dict.fromkeys(found, path)
            shapes |= found
        self._made = _Recipes(shapes)
        with self._made:
            self.shapes = convert(shapes)
        self._open: Any = None
        self._read, self._path = 0, Path()

    def __getitem__(self, name: str) -> Tensor:
        """Good until the next one is asked for: of a mapped file, or made from such."""
        return self._made.follow(self.shapes[name], self._tensor)

    def _tensor(self, name: str) -> Tensor:
        path = self._files[name]
        if self._open is None or path != self._path or self._read > WINDOW:
            self._open = safe_open(path, "pt")
            self._path, self._read = path, 0
        tensor: Tensor = self._open.get_tensor(name)
        self._read += tensor.numel() * tensor.element_size()
        return tensor


class _Recipes(TorchFunctionMode):
    """How tensors came from others; by identity, so that all are kept."""

    def __init__(self, named: Tensors) -> None:
        super().__init__()
        self._how: dict[int, Any] = {id(tensor): name for name, tensor in named.items()}
        self._kept = [*named.values()]

    def __torch_function__(self, func: Any, types: Any, args: Any = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        assert not re.fullmatch(r"__setitem__|\w*[a-z]_", name), f"converters copy: {name}"
        out = func(*args, **(kwargs or {}))
        several = isinstance(out, (tuple, list))
        for place, one in enumerate(out if several else (out,)):
            if isinstance(one, Tensor) and id(one) not in self._how:
                self._how[id(one)] = func, args, kwargs or {}, place if several else None
                self._kept.append(one)
        return out

    def follow(self, tensor: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        how = self._how[id(tensor)]
        if isinstance(how, str):
            return read(how)
        func, args, kwargs, place = how
        args, kwargs = tree_map_only(Tensor, lambda one: self.follow(one, read), (args, kwargs))
        out = func(*args, **kwargs)
        found: Tensor = out if place is None else out[place]
        return found


def _shapes(path: Path, prefix: str) -> Tensors:
    with safe_open(path, "pt") as file:     # mapped: no number is read here
        found = {name: torch.empty_like(file.get_tensor(name), device="meta")
                 for name in file.keys() if name.startswith(prefix)}        # noqa: SIM118
    if not found:
        raise Fault("families.part_missing", path=path, part=prefix.rstrip("."))
    return found


def files_in(folder: Path) -> list[Path]:
    """The files of a model that a library would read by itself; none: other names, or pickles."""
    for stem in ("diffusion_pytorch_model", "model"):
        single, index = (folder / f"{stem}.safetensors{end}" for end in ("", ".index.json"))
        if single.is_file():
            return [single]
        if index.is_file():
            shards = from_json(index.read_text("utf-8"))["weight_map"].values()
            return sorted({folder / Path(name).name for name in shards})
    return []
