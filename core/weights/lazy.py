"""The weights of a model, read one after the other: of a file hardly more than one of them is in
memory.

Converters between names get tensors on the meta device. What they do to each one (split, join,
transpose) is recorded, and done to the weight itself when it is asked for.
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
File = tuple[Path, str]                     # with the prefix of the model's names in it


class Weights:
    """The weights of one model by its names, from one file or several."""

    def __init__(self, files: Iterable[File], convert: Callable[[Tensors], Tensors]) -> None:
        """`convert` gets the names without their prefix. Raises UserError where a file has nothing
        under its prefix, is torn, or has a format of numbers that can't be read."""
        self._places: dict[str, tuple[TensorFile, str]] = {}
        for path, prefix in files:
            try:
                file = TensorFile(path)
            except UserError as error:
                raise UserError("families.unreadable", path=path, reason=str(error)) from error
            if not (names := file.names(prefix)):
                raise UserError("families.part_missing", path=path, part=prefix.rstrip("."))
            self._places |= {name.removeprefix(prefix): (file, name) for name in names}
        shapes = {bare: file.shape(name) for bare, (file, name) in self._places.items()}
        self._recorder = _Recorder(shapes)
        with self._recorder:
            self.shapes = convert(dict(shapes))

    def __getitem__(self, name: str) -> Tensor:
        """Reads a weight. It must not be written into: it may be mapped from the file."""
        def read(bare: str) -> Tensor:
            file, name_in_file = self._places[bare]
            return file[name_in_file]
        return self._recorder.replay(self.shapes[name], read)


def shapes_of(files: Iterable[File], convert: Callable[[Tensors], Tensors]) -> Tensors:
    """The tensors of files on the meta device, by the names that `convert` gives."""
    return Weights(files, convert).shapes


class _Recorder(TorchFunctionMode):
    """Records how tensors were computed from others, to do the same with other values later."""

    def __init__(self, named: Tensors) -> None:
        super().__init__()
        # By identity: a name, or a function with its arguments and the place in its result.
        self._how: dict[int, Any] = {id(tensor): name for name, tensor in named.items()}
        # An id may be given again once its tensor is gone, so that none may go.
        self._alive = [*named.values()]

    def __torch_function__(self, func: Any, types: Any, args: Any = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        assert not re.fullmatch(r"__setitem__|\w*[a-z]_", name), f"converters copy: {name}"
        result = func(*args, **(kwargs or {}))
        is_sequence = isinstance(result, (tuple, list))
        for place, tensor in enumerate(result if is_sequence else (result,)):
            if isinstance(tensor, Tensor) and id(tensor) not in self._how:
                self._how[id(tensor)] = func, args, kwargs or {}, place if is_sequence else None
                self._alive.append(tensor)
        return result

    def replay(self, tensor: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Computes a recorded tensor again, from what `read` gives for the names."""
        how = self._how[id(tensor)]
        if isinstance(how, str):
            return read(how)
        func, args, kwargs, place = how
        args, kwargs = tree_map_only(
            Tensor, lambda argument: self.replay(argument, read), (args, kwargs))
        result = func(*args, **kwargs)
        value: Tensor = result if place is None else result[place]
        return value


def files_in(folder: Path) -> list[Path]:
    """The .safetensors files of a model that diffusers or transformers would read from a folder.
    Empty where it has other names, or pickles."""
    for stem in ("diffusion_pytorch_model", "model"):
        single, index = (folder / f"{stem}.safetensors{end}" for end in ("", ".index.json"))
        if single.is_file():
            return [single]
        if index.is_file():
            shards = from_json(index.read_text("utf-8"))["weight_map"].values()
            return sorted({folder / Path(name).name for name in shards})
    return []
