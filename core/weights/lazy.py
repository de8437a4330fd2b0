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

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from core.errors import UserError
from core.serialization import from_json
from core.weights.tensor_file import TensorFile

Tensors = dict[str, Tensor]
File = tuple[Path, str]                     # and the prefix of the model's names in it


class Weights:
    """Raises UserError where a file has nothing under its prefix, is torn, or has numbers of a kind
    that isn't read."""

    def __init__(self, files: Iterable[File], convert: Callable[[Tensors], Tensors]) -> None:
        """`convert` gets the names without their prefix."""
        self._places: dict[str, tuple[TensorFile, str]] = {}
        for path, prefix in files:
            file = _opened(path)
            if not (names := file.names(prefix)):
                raise UserError("families.part_missing", path=path, part=prefix.rstrip("."))
            self._places |= {name.removeprefix(prefix): (file, name) for name in names}
        shapes = {bare: file.shape(name) for bare, (file, name) in self._places.items()}
        self._made = _Recipes(shapes)
        with self._made:
            self.shapes = convert(dict(shapes))

    def __getitem__(self, name: str) -> Tensor:
        """Not to be written into: of a mapped file, or made from such."""
        return self._made.follow(self.shapes[name], self._tensor)

    def _tensor(self, name: str) -> Tensor:
        file, full = self._places[name]
        return file[full]


def shapes_of(files: Iterable[File], convert: Callable[[Tensors], Tensors]) -> Tensors:
    """On the meta device, by the names that `convert` gives."""
    return Weights(files, convert).shapes


def _opened(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except UserError as fault:
        raise UserError("families.unreadable", path=path, reason=str(fault)) from fault


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
