"""The one place where a pickle is read: where the user asks for it, into .safetensors, by torch's
loader that builds tensors and plain containers and runs nothing else (weights_only=True)."""

from __future__ import annotations

import pickle
import re
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
    """Writes all tensors of a .ckpt, .pt or .bin under the next free name. -> the new file.

    Names are those of the file, without an outer `state_dict`. Raises UserError where the file
    holds anything but tensors and numbers, or no tensor at all."""
    if not source.is_file():
        raise UserError("lora_file.missing", file=source, folder=Path.cwd())
    try:
        with open(source, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
        # torch warns of old pickles, which are the reason to be here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # mapped: gigabytes stay on disk; torch can map its zip archives alone
            content = torch.load(source, "cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        # the function that the pickle wanted to call stands within a long text
        text = str(error)
        call = re.search(r"GLOBAL \s*(\S+)", text) or re.search(
            r"Unsupported global: \s*(\S+)", text)
        reason = call[1].strip("`'.,") if call else (
            text.splitlines() or [type(error).__name__])[-1][:200]
        raise UserError("lora_convert.pickle_unsafe", file=source, reason=reason) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError,
            IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError("lora_file.unreadable", file=source, reason=reason) from None
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break

    # safetensors wants each tensor whole and alone: views of one storage are copied
    tensors = {}
    storages: set[int] = set()
    for name, tensor in _tensors(content, ""):
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        alone = storage._cdata not in storages
        storages.add(storage._cdata)
        tensors[name] = tensor if whole and alone and tensor.is_contiguous() else (
            tensor.clone(memory_format=torch.contiguous_format))
    if not tensors:
        raise UserError("lora_convert.pickle_empty", file=source)
    return paths.create(paths.expanded(out).with_suffix(".safetensors"),
                        lambda path: save_file(tensors, path, {"format": "pt"}))


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts, by their keys joined with dots."""
    if isinstance(value, Tensor):
        yield name or "emb_params", value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))
