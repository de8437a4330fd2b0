"""How a family's layers are called: by diffusers, by kohya's files, by the original code.

One `Naming` table a family. Needs no torch: names are pure text. Sources: diffusers' module paths;
the UNet of CompVis (input_blocks ...), the Flux of Black Forest Labs (double_blocks ...); the
prefixes of kohya and ComfyUI.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
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


# --- tables ------------------------------------------------------------------------------------

_RESNET = (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
           ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
           ("conv_shortcut", "skip_connection"))
_UNET_ENDS = (("time_embedding.linear_1", "time_embed.0"),
              ("time_embedding.linear_2", "time_embed.2"),
              ("add_embedding.linear_1", "label_emb.0.0"),
              ("add_embedding.linear_2", "label_emb.0.2"),
              ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"))


def unet_renames(levels: int, layers: int, attention: Iterable[int]) -> tuple[Rename, ...]:
    """UNet2DConditionModel -> CompVis' UNetModel. `attention`: the levels (0 is the finest) that
    have any, by which an upsampler's place is counted."""
    pairs = [*_UNET_ENDS, ("mid_block.attentions.0", "middle_block.1"),
             *_resnet("mid_block.resnets.0", "middle_block.0"),
             *_resnet("mid_block.resnets.1", "middle_block.2")]
    for level in range(levels):
        first = 1 + level * (layers + 1)
        pairs += _blocks(f"down_blocks.{level}", "input_blocks", first, layers)
        pairs.append((f"down_blocks.{level}.downsamplers.0.conv",
                      f"input_blocks.{first + layers}.0.op"))
        first, behind = level * (layers + 1), 2 if levels - 1 - level in set(attention) else 1
        pairs += _blocks(f"up_blocks.{level}", "output_blocks", first, layers + 1)
        pairs.append((f"up_blocks.{level}.upsamplers.0.conv",
                      f"output_blocks.{first + layers}.{behind}.conv"))
    return tuple(Rename((ours,), theirs) for ours, theirs in pairs)


def _blocks(ours: str, theirs: str, first: int, count: int) -> Iterator[tuple[str, str]]:
    for i in range(count):
        yield from _resnet(f"{ours}.resnets.{i}", f"{theirs}.{first + i}.0")
        yield f"{ours}.attentions.{i}", f"{theirs}.{first + i}.1"


def _resnet(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    return ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in _RESNET)


def _flux_renames() -> tuple[Rename, ...]:
    double, single, block = "double_blocks.{}", "single_blocks.{}", "transformer_blocks.{}"
    alone = "single_transformer_blocks.{}"
    own = (("attn.to_out.0", "img_attn.proj"), ("attn.to_add_out", "txt_attn.proj"),
           ("attn.norm_q", "img_attn.norm.query_norm"), ("attn.norm_k", "img_attn.norm.key_norm"),
           ("attn.norm_added_q", "txt_attn.norm.query_norm"),
           ("attn.norm_added_k", "txt_attn.norm.key_norm"),
           ("ff.net.0.proj", "img_mlp.0"), ("ff.net.2", "img_mlp.2"),
           ("ff_context.net.0.proj", "txt_mlp.0"), ("ff_context.net.2", "txt_mlp.2"),
           ("norm1.linear", "img_mod.lin"), ("norm1_context.linear", "txt_mod.lin"))
    ends = (("x_embedder", "img_in"), ("context_embedder", "txt_in"),
            ("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
            ("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
            ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
            ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
            ("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
            ("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
            (f"{alone}.proj_out", f"{single}.linear2"),
            (f"{alone}.norm.linear", f"{single}.modulation.lin"),
            (f"{alone}.attn.norm_q", f"{single}.norm.query_norm"),
            (f"{alone}.attn.norm_k", f"{single}.norm.key_norm"),
            ("proj_out", "final_layer.linear"))
    fused = (
        Rename(tuple(f"{block}.attn.to_{x}" for x in "qkv"), f"{double}.img_attn.qkv"),
        Rename(tuple(f"{block}.attn.add_{x}_proj" for x in "qkv"), f"{double}.txt_attn.qkv"),
        Rename((*(f"{alone}.attn.to_{x}" for x in "qkv"), f"{alone}.proj_mlp"),
               f"{single}.linear1", (1, 1, 1, 4)))
    return (*fused, *(Rename((f"{block}.{a}",), f"{double}.{b}") for a, b in own),
            *(Rename((a,), b) for a, b in ends),
            Rename(("norm_out.linear",), "final_layer.adaLN_modulation.1", swapped=True))


def _flux2_renames() -> tuple[Rename, ...]:
    double, single, block = "double_blocks.{}", "single_blocks.{}", "transformer_blocks.{}"
    alone = "single_transformer_blocks.{}"
    fused = (Rename(tuple(f"{block}.attn.to_{x}" for x in "qkv"), f"{double}.img_attn.qkv"),
             Rename(tuple(f"{block}.attn.add_{x}_proj" for x in "qkv"), f"{double}.txt_attn.qkv"))
    own = (("attn.to_out.0", "img_attn.proj"), ("attn.to_add_out", "txt_attn.proj"),
           ("attn.norm_q", "img_attn.norm.query_norm"), ("attn.norm_k", "img_attn.norm.key_norm"),
           ("attn.norm_added_q", "txt_attn.norm.query_norm"),
           ("attn.norm_added_k", "txt_attn.norm.key_norm"),
           ("ff.linear_in", "img_mlp.0"), ("ff.linear_out", "img_mlp.2"),
           ("ff_context.linear_in", "txt_mlp.0"), ("ff_context.linear_out", "txt_mlp.2"))
    lone = (("attn.to_qkv_mlp_proj", "linear1"), ("attn.to_out", "linear2"),
            ("attn.norm_q", "norm.query_norm"), ("attn.norm_k", "norm.key_norm"))
    ends = (("x_embedder", "img_in"), ("context_embedder", "txt_in"),
            ("proj_out", "final_layer.linear"),
            ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
            ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
            *((f"{name}.linear", f"{name}.lin") for name in (
                "double_stream_modulation_img", "double_stream_modulation_txt",
                "single_stream_modulation")))
    return (*fused, *(Rename((f"{block}.{a}",), f"{double}.{b}") for a, b in own),
            *(Rename((f"{alone}.{a}",), f"{single}.{b}") for a, b in lone),
            *(Rename((a,), b) for a, b in ends),
            Rename(("norm_out.linear",), "final_layer.adaLN_modulation.1", swapped=True))


def _sd3_renames() -> tuple[Rename, ...]:
    joint, block = "joint_blocks.{}", "transformer_blocks.{}"
    fused = tuple(
        Rename(tuple(f"{block}.{name.format(x)}" for x in "qkv"), f"{joint}.{theirs}.qkv")
        for name, theirs in (("attn.to_{}", "x_block.attn"), ("attn2.to_{}", "x_block.attn2"),
                             ("attn.add_{}_proj", "context_block.attn")))
    own = (("attn.to_out.0", "x_block.attn.proj"), ("attn2.to_out.0", "x_block.attn2.proj"),
           ("attn.to_add_out", "context_block.attn.proj"),
           ("attn.norm_q", "x_block.attn.ln_q"), ("attn.norm_k", "x_block.attn.ln_k"),
           ("attn2.norm_q", "x_block.attn2.ln_q"), ("attn2.norm_k", "x_block.attn2.ln_k"),
           ("attn.norm_added_q", "context_block.attn.ln_q"),
           ("attn.norm_added_k", "context_block.attn.ln_k"),
           ("ff.net.0.proj", "x_block.mlp.fc1"), ("ff.net.2", "x_block.mlp.fc2"),
           ("ff_context.net.0.proj", "context_block.mlp.fc1"),
           ("ff_context.net.2", "context_block.mlp.fc2"),
           ("norm1.linear", "x_block.adaLN_modulation.1"),
           ("norm1_context.linear", "context_block.adaLN_modulation.1"))
    ends = (("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
            ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
            ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
            ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
            ("pos_embed.proj", "x_embedder.proj"), ("proj_out", "final_layer.linear"))
    return (*fused, *(Rename((f"{block}.{a}",), f"{joint}.{b}") for a, b in own),
            *(Rename((a,), b) for a, b in ends),
            Rename(("norm_out.linear",), "final_layer.adaLN_modulation.1", swapped=True))


def _zimage_renames() -> tuple[Rename, ...]:
    found: list[Rename] = []
    for block in ("layers.{}", "noise_refiner.{}", "context_refiner.{}"):
        inner = f"{block}.attention"
        found += [Rename(tuple(f"{inner}.to_{x}" for x in "qkv"), f"{inner}.qkv"),
                  Rename((f"{inner}.to_out.0",), f"{inner}.out"),
                  Rename((f"{inner}.norm_q",), f"{inner}.q_norm"),
                  Rename((f"{inner}.norm_k",), f"{inner}.k_norm")]
    return (*found, Rename(("all_x_embedder.2-1",), "x_embedder"),
            Rename(("all_final_layer.2-1",), "final_layer"))


def _krea2_renames() -> tuple[Rename, ...]:
    blocks = (("transformer_blocks.{}", "blocks.{}"),
              *((f"text_fusion.{one}.{{}}", f"txtfusion.{one}.{{}}")
                for one in ("layerwise_blocks", "refiner_blocks")))
    own = (("attn.to_q", "attn.wq"), ("attn.to_k", "attn.wk"), ("attn.to_v", "attn.wv"),
           ("attn.to_out.0", "attn.wo"), ("attn.to_gate", "attn.gate"), ("ff", "mlp"),
           ("attn.norm_q", "attn.qknorm.qnorm"), ("attn.norm_k", "attn.qknorm.knorm"),
           ("norm1", "prenorm"), ("norm2", "postnorm"))
    ends = (("img_in", "first"), ("time_embed.linear_1", "tmlp.0"),
            ("time_embed.linear_2", "tmlp.2"), ("time_mod_proj", "tproj.1"),
            ("txt_in.norm", "txtmlp.0"), ("txt_in.linear_1", "txtmlp.1"),
            ("txt_in.linear_2", "txtmlp.3"), ("text_fusion.projector", "txtfusion.projector"),
            ("final_layer.linear", "last.linear"), ("final_layer.norm", "last.norm"))
    return (*(Rename((f"{ours}.{a}",), f"{theirs}.{b}") for ours, theirs in blocks
              for a, b in own), *(Rename((a,), b) for a, b in ends))


def _clip(name: str, kohya: str, native: str) -> Part:
    """transformers 5 has no text_model; files have."""
    return Part(name, kohya, "text_model", f"text_encoders.{native}.transformer")


SD1: Naming = (
    Part("unet", "lora_unet", native="diffusion_model", renames=unet_renames(4, 2, (0, 1, 2))),
    _clip("text_encoder", "lora_te", "clip_l"),
)
SD2: Naming = (SD1[0], _clip("text_encoder", "lora_te", "clip_h"))
SDXL: Naming = (
    Part("unet", "lora_unet", native="diffusion_model", renames=unet_renames(3, 2, (1, 2)),
         kohya_native=True),
    _clip("text_encoder", "lora_te1", "clip_l"), _clip("text_encoder_2", "lora_te2", "clip_g"),
)
FLUX: Naming = (
    Part("transformer", "lora_unet", native="diffusion_model", renames=_flux_renames(),
         kohya_native=True),
    _clip("text_encoder", "lora_te1", "clip_l"),
    Part("text_encoder_2", "lora_te3", native="text_encoders.t5xxl.transformer"),
)
SD3: Naming = (
    Part("transformer", "lora_unet", native="diffusion_model", renames=_sd3_renames(),
         kohya_native=True),
    _clip("text_encoder", "lora_te1", "clip_l"), _clip("text_encoder_2", "lora_te2", "clip_g"),
    Part("text_encoder_3", "lora_te3", native="text_encoders.t5xxl.transformer"),
)
ZIMAGE: Naming = (
    Part("transformer", "lora_unet", native="diffusion_model", renames=_zimage_renames(),
         kohya_native=True),
)
QWEN: Naming = (Part("transformer", "lora_unet", native="diffusion_model"),)
FLUX2: Naming = (
    Part("transformer", "lora_unet", native="diffusion_model", renames=_flux2_renames(),
         kohya_native=True),
)
KREA2: Naming = (
    Part("transformer", "lora_unet", native="diffusion_model", renames=_krea2_renames(),
         kohya_native=True),
)
NAMINGS: dict[str, Naming] = {"sd15": SD1, "sd2": SD2, "sdxl": SDXL, "sd3": SD3, "flux": FLUX,
                             "zimage": ZIMAGE, "qwen": QWEN, "flux2": FLUX2,
                             "krea2": KREA2}


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
    "img_in", "txt_in", "img_mlp", "txt_mlp", "img_mod", "txt_mod"))


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
