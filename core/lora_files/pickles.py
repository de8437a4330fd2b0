"""The one place where a pickle is read: on the user's word, into .safetensors, by torch's loader
that builds tensors and plain containers and runs nothing else (weights_only=True)."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from core import paths
from core.errors import UserError

_NESTED = ("state_dict", "string_to_param", "params_ema", "params", "model", "module")


def convert(source: Path, out: Path) -> Path:
    """All tensors of a .ckpt, .pt or .bin, under the names that the file gives them (those of an
    outer `state_dict` without it) -> the file, under the next free name. Gigabytes stay on disk.

    Raises UserError where the file holds anything but tensors and numbers, or no tensor at all."""
    content = _load(source)
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    tensors = _apart(dict(_tensors(content, "")))
    if not tensors:
        raise UserError("lora_convert.pickle_empty", file=source)
    return paths.create(out.expanduser().with_suffix(".safetensors"),
                        lambda path: save_file(tensors, path, {"format": "pt"}))


def _load(source: Path) -> Any:
    if not source.is_file():
        raise UserError("lora_file.missing", file=source, folder=Path.cwd())
    try:
        with warnings.catch_warnings():    # of old pickles, which are the reason to be here
            warnings.simplefilter("ignore")
            return torch.load(source, "cpu", weights_only=True, mmap=_is_zip(source))
    except pickle.UnpicklingError as error:
        raise UserError("lora_convert.pickle_unsafe", file=source, reason=_global(error)) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError,
            IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError("lora_file.unreadable", file=source, reason=reason) from None


def _is_zip(source: Path) -> bool:
    with open(source, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _global(error: Exception) -> str:
    """What the pickle wanted to call, out of torch's long text."""
    text = str(error)
    for mark in ("GLOBAL ", "Unsupported global: "):
        if mark in text:
            return text.split(mark, 1)[1].split()[0].strip("`'.,")
    return (text.splitlines() or [type(error).__name__])[-1][:200]


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or "emb_params", value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors wants each tensor whole and alone: views of one storage are copied."""
    storages: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        alone = storage._cdata not in storages
        storages.add(storage._cdata)
        found[name] = tensor if whole and alone and tensor.is_contiguous() else (
            tensor.clone(memory_format=torch.contiguous_format))
    return found
