"""What the UNets of SD 1, SD 2 and SDXL have in common: their layers' names in CompVis' code, and
how they are told apart. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from core.families.layer_names import Part, Rename, renames
from core.families.spec import Shapes, side, starts

_RESNET = (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
           ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
           ("conv_shortcut", "skip_connection"))
_UNET_ENDS = (("time_embedding.linear_1", "time_embed.0"),
              ("time_embedding.linear_2", "time_embed.2"),
              ("add_embedding.linear_1", "label_emb.0.0"),
              ("add_embedding.linear_2", "label_emb.0.2"),
              ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"))


def unet_renames(levels: int, layers: int, attention: Iterable[int]) -> tuple[Rename, ...]:
    """UNet2DConditionModel -> CompVis' UNetModel, of so many levels of so many layers. `attention`
    are the levels that have any; 0 is the finest."""
    pairs = [*_UNET_ENDS, ("mid_block.attentions.0", "middle_block.1"),
             *_resnet("mid_block.resnets.0", "middle_block.0"),
             *_resnet("mid_block.resnets.1", "middle_block.2")]
    for level in range(levels):
        first = 1 + level * (layers + 1)
        pairs += _blocks(f"down_blocks.{level}", "input_blocks", first, layers)
        pairs.append((f"down_blocks.{level}.downsamplers.0.conv",
                      f"input_blocks.{first + layers}.0.op"))
        # Up blocks begin at the coarsest level. An upsampler stands behind its block's resnet, and
        # behind its attention where there is one.
        first, place = level * (layers + 1), 2 if levels - 1 - level in set(attention) else 1
        pairs += _blocks(f"up_blocks.{level}", "output_blocks", first, layers + 1)
        pairs.append((f"up_blocks.{level}.upsamplers.0.conv",
                      f"output_blocks.{first + layers}.{place}.conv"))
    return renames(pairs)


def _blocks(ours: str, theirs: str, first: int, count: int) -> Iterator[tuple[str, str]]:
    for i in range(count):
        yield from _resnet(f"{ours}.resnets.{i}", f"{theirs}.{first + i}.0")
        yield f"{ours}.attentions.{i}", f"{theirs}.{first + i}.1"


def _resnet(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    return ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in _RESNET)


# That of SD 1 and SD 2: four levels of two layers, attention in all but the coarsest.
UNET = Part("unet", "lora_unet", native="diffusion_model", renames=unet_renames(4, 2, (0, 1, 2)))


def channels(shapes: Shapes) -> int:
    """The input channels of a file's UNet; 0: it is no UNet."""
    names = ("conv_in.weight",) if starts("down_blocks.")(shapes) else ("input_blocks.0.0.weight",)
    return max(side(shapes, name, 1) for name in names)


def added_width(shapes: Shapes) -> int:
    """The width of what a UNet reads beside the text's states, as SDXL reads the pooled text and
    the picture's sizes; 0: nothing."""
    return max(side(shapes, name, 1) for name in (
        "add_embedding.linear_1.weight", "label_emb.0.0.weight"))


def text_width(shapes: Shapes) -> int:
    """The width of the embeddings that the first cross attention reads; 0: there is none."""
    places = [*(f"down_blocks.{n}.attentions.0" for n in range(3)),
              *(f"input_blocks.{n}.1" for n in (1, 2, 4))]
    return next(filter(None, (side(
        shapes, f"{place}.transformer_blocks.0.attn2.to_k.weight", -1) for place in places)), 0)


def is_plain(shapes: Shapes, width: int) -> bool:
    """Whether a file's UNet draws from noise and text of this width alone."""
    return channels(shapes) == 4 and not added_width(shapes) and text_width(shapes) == width


def is_plain_config(config: Mapping[str, Any]) -> bool:
    """The same of a folder's unet/config.json. Any width of text will do, as small bases have."""
    return (config.get("addition_embed_type") != "text_time"
            and isinstance(config.get("cross_attention_dim"), int))
