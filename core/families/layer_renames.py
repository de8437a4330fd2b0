"""Which layers the original code of each network calls otherwise than diffusers, or fuses.

Needs no torch: names are pure text. Sources: diffusers' module paths; the UNet of CompVis
(input_blocks ...), the Flux of Black Forest Labs (double_blocks ...), the others'
single files.
"""

from __future__ import annotations

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


def flux_renames() -> tuple[Rename, ...]:
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


def flux2_renames() -> tuple[Rename, ...]:
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


def chroma_renames() -> tuple[Rename, ...]:
    """Flux with one network for all modulations."""
    return (*flux_renames(),
            *(Rename((f"distilled_guidance_layer.layers.{{}}.linear_{n}",),
                     f"distilled_guidance_layer.layers.{{}}.{name}_layer")
              for n, name in ((1, "in"), (2, "out"))))


def sd3_renames() -> tuple[Rename, ...]:
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


def zimage_renames() -> tuple[Rename, ...]:
    found: list[Rename] = []
    for block in ("layers.{}", "noise_refiner.{}", "context_refiner.{}"):
        inner = f"{block}.attention"
        found += [Rename(tuple(f"{inner}.to_{x}" for x in "qkv"), f"{inner}.qkv"),
                  Rename((f"{inner}.to_out.0",), f"{inner}.out"),
                  Rename((f"{inner}.norm_q",), f"{inner}.q_norm"),
                  Rename((f"{inner}.norm_k",), f"{inner}.k_norm")]
    return (*found, Rename(("all_x_embedder.2-1",), "x_embedder"),
            Rename(("all_final_layer.2-1",), "final_layer"))


def krea2_renames() -> tuple[Rename, ...]:
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


def lumina2_renames() -> tuple[Rename, ...]:
    """Three heads of queries share one of keys and values."""
    found: list[Rename] = []
    for block in ("layers.{}", "noise_refiner.{}", "context_refiner.{}"):
        ours, theirs = f"{block}.attn", f"{block}.attention"
        norms = ((("norm1", "attention_norm1"),) if block.startswith("context") else
                 (("norm1.norm", "attention_norm1"), ("norm1.linear", "adaLN_modulation.1")))
        inner = (*norms, ("norm2", "attention_norm2"),
                 *((f"feed_forward.linear_{n}", f"feed_forward.w{n}") for n in (1, 2, 3)))
        found += [Rename(tuple(f"{ours}.to_{x}" for x in "qkv"), f"{theirs}.qkv", (3, 1, 1)),
                  Rename((f"{ours}.to_out.0",), f"{theirs}.out"),
                  Rename((f"{ours}.norm_q",), f"{theirs}.q_norm"),
                  Rename((f"{ours}.norm_k",), f"{theirs}.k_norm"),
                  *(Rename((f"{block}.{a}",), f"{block}.{b}") for a, b in inner)]
    ends = (("time_caption_embed.caption_embedder", "cap_embedder"),
            ("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
            ("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
            ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
            ("norm_out.linear_2", "final_layer.linear"))
    return (*found, *(Rename((a,), b) for a, b in ends))


def sana_renames() -> tuple[Rename, ...]:
    ours, theirs = "transformer_blocks.{}", "blocks.{}"
    own = (("attn1.to_out.0", "attn.proj"), ("attn1.norm_q", "attn.q_norm"),
           ("attn1.norm_k", "attn.k_norm"), ("attn2.to_q", "cross_attn.q_linear"),
           ("attn2.to_out.0", "cross_attn.proj"), ("attn2.norm_q", "cross_attn.q_norm"),
           ("attn2.norm_k", "cross_attn.k_norm"), ("ff.conv_inverted", "mlp.inverted_conv.conv"),
           ("ff.conv_depth", "mlp.depth_conv.conv"), ("ff.conv_point", "mlp.point_conv.conv"))
    ends = ((ours, theirs), ("patch_embed.proj", "x_embedder.proj"),
            ("time_embed.emb.timestep_embedder.linear_1", "t_embedder.mlp.0"),
            ("time_embed.emb.timestep_embedder.linear_2", "t_embedder.mlp.2"),
            ("time_embed.linear", "t_block.1"),
            ("caption_projection.linear_1", "y_embedder.y_proj.fc1"),
            ("caption_projection.linear_2", "y_embedder.y_proj.fc2"),
            ("caption_norm", "attention_y_norm"), ("proj_out", "final_layer.linear"))
    return (Rename(tuple(f"{ours}.attn1.to_{x}" for x in "qkv"), f"{theirs}.attn.qkv"),
            Rename(tuple(f"{ours}.attn2.to_{x}" for x in "kv"), f"{theirs}.cross_attn.kv_linear"),
            *(Rename((f"{ours}.{a}",), f"{theirs}.{b}") for a, b in own),
            *(Rename((a,), b) for a, b in ends))
