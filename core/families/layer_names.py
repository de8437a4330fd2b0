"""How a family's layers are called: by diffusers, by kohya's files, by the original code.

Each family has one `Naming` table, in its spec.py. Needs no torch: names are pure text. Sources:
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
    """The names of one layer, and of all below it; `{}` stands for a number."""

    ours: tuple[str, ...]                  # diffusers'; several: rows of one matrix, in this order
    theirs: str                            # the original code's
    shares: tuple[int, ...] = ()           # rows of each of `ours`, relative; empty: equal ones
    swapped: bool = False                  # shift and scale stand the other way round

    @property
    def rows(self) -> tuple[int, ...]:
        return self.shares or (1,) * len(self.ours)


@dataclass(frozen=True, slots=True)
class Part:
    """How one part of a pipeline is called in a LoRA file."""

    name: str                              # diffusers': unet, transformer, text_encoder ...
    kohya: str                             # prefix of kohya's keys
    root: str = ""                         # outer module that files have and the model may lack
    native: str = ""                       # ComfyUI's prefix, before the original code's names
    renames: tuple[Rename, ...] = ()       # empty: the original code is diffusers' own
    kohya_native: bool = False             # kohya's names are the original code's, too

    def rooted(self, inner: str) -> str:
        """The name of a layer as files have it, below the outer module."""
        inside = inner.startswith(("encoder.", "embeddings.", "final_layer_norm"))
        return f"{self.root}.{inner}" if self.root and inside else inner

    def unrooted(self, inner: str) -> str:
        """The name without the outer module."""
        return inner.removeprefix(f"{self.root}.") if self.root else inner


Naming = tuple[Part, ...]                  # a family's parts, the denoiser first


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer lies in the original code: alone, or in some rows of a fused matrix."""

    name: str
    number: int = 0                        # of the slice of rows
    of: Rename | None = None               # None: the original code has the same name

    @property
    def fused(self) -> bool:
        return self.of is not None and (len(self.of.ours) > 1 or self.of.swapped)


def clip_part(name: str, kohya: str, native: str) -> Part:
    """A CLIP text encoder. Files name its `text_model`, which transformers 5 no longer has."""
    return Part(name, kohya, "text_model", f"text_encoders.{native}.transformer")


def dit_part(renames: tuple[Rename, ...]) -> Part:
    """A transformer whose layers kohya calls as the original code does."""
    return Part("transformer", "lora_unet", native="diffusion_model", renames=renames,
                kohya_native=True)


def renames(pairs: Iterable[tuple[str, str]], ours: str = "", theirs: str = ""
            ) -> tuple[Rename, ...]:
    """One `Rename` for each pair of names; `ours` and `theirs` are put before them."""
    return tuple(Rename((ours + a,), theirs + b) for a, b in pairs)


def fused(ours: str, theirs: str, letters: str = "qkv", shares: tuple[int, ...] = ()) -> Rename:
    """Matrices of attention that are one in the original code. `*` in `ours` stands for each
    letter."""
    return Rename(tuple(ours.replace("*", letter) for letter in letters), theirs, shares)


# --- diffusers <-> original code ---------------------------------------------------------------

def to_native(part: Part, inner: str) -> Place:
    """`down_blocks.1.attentions.0.proj_in` -> `input_blocks.4.1.proj_in`. A layer that the table
    lacks keeps its name."""
    if (match := _find(_tables(part.renames)[0], inner)) is None:
        return Place(inner)
    rename, number, numbers, rest = match
    return Place(".".join([rename.theirs.format(*numbers), *rest]), number, rename)


def from_native(part: Part, name: str) -> tuple[list[str], Rename | None]:
    """The layers that lie in a layer of the original code: several where it fuses them."""
    if (match := _find(_tables(part.renames)[1], name)) is None:
        return [name], None
    rename, _, numbers, rest = match
    return [".".join([ours.format(*numbers), *rest]) for ours in rename.ours], rename


# Shape of a path -> patterns of such paths, each with its `Rename` and the number of the slice.
_Table = dict[str, list[tuple[re.Pattern[str], Rename, int]]]


def _find(table: _Table, path: str) -> tuple[Rename, int, list[str], list[str]] | None:
    """Looks up the longest beginning of `path` that the table has. Returns its rename, its slice,
    the numbers in it and the words behind it."""
    words = path.split(".")
    for end in range(len(words), 0, -1):
        prefix = ".".join(words[:end])
        for pattern, rename, number in table.get(_shape(prefix), ()):
            if match := pattern.fullmatch(prefix):
                return rename, number, list(match.groups()), words[end:]
    return None


def _shape(path: str) -> str:
    """A path with `#` for each number: few patterns share one, so that few are tried."""
    return re.sub(r"(?<![^.])(\d+|\{\})(?![^.])", "#", path)


# `output_blocks.8.2.conv`, an upsampler behind attention, is read as `output_blocks.8.1.conv`, too.
_UPSAMPLER = re.compile(r"^(output_blocks\.\d+)\.2\.conv$")


@functools.cache
def _tables(renames: tuple[Rename, ...]) -> tuple[_Table, _Table]:
    """The tables by diffusers' names and by the original code's."""
    ours, theirs = _Table(), _Table()

    def add(table: _Table, path: str, rename: Rename, number: int) -> None:
        pattern = re.compile(re.escape(path).replace(r"\{\}", r"(\d+)"))
        table.setdefault(_shape(path), []).append((pattern, rename, number))

    for rename in renames:
        for number, path in enumerate(rename.ours):
            add(ours, path, rename, number)
        add(theirs, rename.theirs, rename, 0)
    for rename in renames:
        if match := _UPSAMPLER.match(rename.theirs):
            add(theirs, f"{match[1]}.1.conv", rename, 0)
    return ours, theirs


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
    """The words of a part that hold underscores, and of how many pieces the longest is made."""
    words = _WORDS | {word for rename in part.renames for path in (*rename.ours, rename.theirs)
                      for word in path.split(".") if "_" in word}
    return words, max(word.count("_") for word in words) + 1


def dotted(part: Part, name: str) -> str:
    """`mid_block_attentions_0_proj_in` -> `mid_block.attentions.0.proj_in`.

    The words that hold underscores are known; all other underscores were dots.
    """
    words, longest = _words(part)
    pieces, path = name.split("_"), list[str]()
    while pieces:
        size = next((n for n in range(min(longest, len(pieces)), 1, -1)
                     if "_".join(pieces[:n]) in words), 1)
        path.append("_".join(pieces[:size]))
        pieces = pieces[size:]
    return ".".join(path)
