"""How a family's layers are called: by diffusers, by kohya's files, by the original code.

One `Naming` table a family, in its spec.py. Needs no torch: names are pure text. Sources:
diffusers' module paths; the UNet of CompVis (input_blocks ...), the Flux of Black Forest Labs
(double_blocks ...), the others' single files; the prefixes of kohya and ComfyUI.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rename:
    """One layer, or all below it, in the original code's words; `{}` stands for a number."""

    ours: tuple[str, ...]                  # several: rows of one fused matrix, in this order
    theirs: str
    shares: tuple[int, ...] = ()           # rows of each of `ours`, relative; empty: equal ones
    swapped: bool = False                  # shift and scale stand the other way round

    @property
    def rows(self) -> tuple[int, ...]:
        return self.shares or (1,) * len(self.ours)


@dataclass(frozen=True, slots=True)
class Part:
    """How one part of a pipeline is called in a LoRA file."""

    name: str                              # diffusers: unet, transformer, text_encoder ...
    kohya: str                             # prefix of the kohya key
    root: str = ""                         # outer module that files name and the model may lack
    native: str = ""                       # ComfyUI's prefix, before the original code's names
    renames: tuple[Rename, ...] = ()       # empty: the original code is diffusers' own
    kohya_native: bool = False             # kohya's names are the original code's, too

    def rooted(self, inner: str) -> str:
        """A layer below the outer module, as files have it."""
        inside = inner.startswith(("encoder.", "embeddings.", "final_layer_norm"))
        return f"{self.root}.{inner}" if self.root and inside else inner

    def unrooted(self, inner: str) -> str:
        return inner.removeprefix(f"{self.root}.") if self.root else inner


Naming = tuple[Part, ...]                  # a family's parts, the denoiser first


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer lies in the original code: alone, or in rows of a fused matrix."""

    name: str
    number: int = 0                        # of the slice
    of: Rename | None = None               # None: the original code calls it the same

    @property
    def fused(self) -> bool:
        return self.of is not None and (len(self.of.ours) > 1 or self.of.swapped)


def clip_part(name: str, kohya: str, native: str) -> Part:
    """transformers 5 has no text_model; files have."""
    return Part(name, kohya, "text_model", f"text_encoders.{native}.transformer")


# --- diffusers <-> original code ---------------------------------------------------------------

def to_native(part: Part, inner: str) -> Place:
    """`down_blocks.1.attentions.0.proj_in` -> `input_blocks.4.1.proj_in`. A layer that the table
    lacks keeps its name."""
    found = _find(_forward(part.renames), inner)
    if found is None:
        return Place(inner)
    rename, number, numbers, rest = found
    return Place(".".join([rename.theirs.format(*numbers), *rest]), number, rename)


def from_native(part: Part, name: str) -> tuple[list[str], Rename | None]:
    """The layers that the original code calls so: several where it fuses them."""
    found = _find(_backward(part.renames), name)
    if found is None:
        return [name], None
    rename, _, numbers, rest = found
    return [".".join([one.format(*numbers), *rest]) for one in rename.ours], rename


_Entry = tuple[re.Pattern[str], Rename, int]


def _find(table: dict[str, list[_Entry]], path: str
          ) -> tuple[Rename, int, list[str], list[str]] | None:
    """The entry of the longest beginning of `path` that the table has."""
    words = path.split(".")
    for end in range(len(words), 0, -1):
        prefix = ".".join(words[:end])
        for pattern, rename, number in table.get(_shape(prefix), ()):
            if match := pattern.fullmatch(prefix):
                return rename, number, list(match.groups()), words[end:]
    return None


def _shape(path: str) -> str:
    return re.sub(r"(?<![^.])(\d+|\{\})(?![^.])", "#", path)


@functools.cache
def _forward(renames: tuple[Rename, ...]) -> dict[str, list[_Entry]]:
    return _index((one, rename, number) for rename in renames
                  for number, one in enumerate(rename.ours))


@functools.cache
def _backward(renames: tuple[Rename, ...]) -> dict[str, list[_Entry]]:
    index = _index((rename.theirs, rename, 0) for rename in renames)
    for rename in renames:                 # both places of an upsampler are read
        if (other := _UPSAMPLER.sub(r"\1.1.conv", rename.theirs)) != rename.theirs:
            index[_shape(other)].append((re.compile(re.escape(other)), rename, 0))
    return index


_UPSAMPLER = re.compile(r"^(output_blocks\.\d+)\.2\.conv$")


def _index(entries: Iterable[tuple[str, Rename, int]]) -> dict[str, list[_Entry]]:
    table: dict[str, list[_Entry]] = {}
    for text, rename, number in entries:
        pattern = re.compile(re.escape(text).replace(r"\{\}", r"(\d+)"))
        table.setdefault(_shape(text), []).append((pattern, rename, number))
    return table


# --- kohya's underscores -----------------------------------------------------------------------

# Words of module paths that hold underscores themselves; a table's own words join them.
_WORDS = frozenset((
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "to_q", "to_k", "to_v",
    "to_out", "proj_in", "proj_out", "time_emb_proj", "conv_shortcut", "conv_in", "conv_out",
    "conv_norm_out", "time_embedding", "add_embedding", "linear_1", "linear_2", "text_model",
    "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "layer_norm1",
    "layer_norm2", "final_layer_norm", "token_embedding", "position_embedding",
    "position_embeddings", "wi_0", "wi_1", "layer_norm", "final_layer",
    "single_transformer_blocks", "norm1_context", "ff_context", "add_q_proj", "add_k_proj",
    "add_v_proj", "to_add_out", "norm_q", "norm_k", "norm_added_q", "norm_added_k", "norm_out",
    "x_embedder", "context_embedder", "time_text_embed", "timestep_embedder", "text_embedder",
    "guidance_embedder", "proj_mlp", "adaLN_modulation", "patch_embed", "input_blocks",
    "middle_block", "output_blocks", "joint_blocks", "x_block", "context_block", "t_embedder",
    "y_embedder", "noise_refiner", "context_refiner", "feed_forward", "cap_embedder",
    "img_in", "txt_in", "img_mlp", "txt_mlp", "img_mod", "txt_mod",
    "ffn_norm1", "ffn_norm2", "in_proj"))


@functools.cache
def _words(part: Part) -> tuple[frozenset[str], int]:
    named = {word for rename in part.renames for path in (*rename.ours, rename.theirs)
             for word in path.split(".") if "_" in word}
    words = _WORDS | named
    return frozenset(words), max(word.count("_") for word in words) + 1


def dotted(part: Part, name: str) -> str:
    """`mid_block_attentions_0_proj_in` -> `mid_block.attentions.0.proj_in`: the words that hold
    underscores are known, all other underscores were dots."""
    words, longest = _words(part)
    tokens, path = name.split("_"), []
    at = 0
    while at < len(tokens):
        size = next((n for n in range(longest, 1, -1)
                     if "_".join(tokens[at:at + n]) in words and at + n <= len(tokens)), 1)
        path.append("_".join(tokens[at:at + size]))
        at += size
    return ".".join(path)
