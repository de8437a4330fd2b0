"""Rows of the keys about the adapter: what is trained, how large, from where, on which base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft.tuners.loha import LoHaLayer
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from core.adapters import lora
from core.errors import UserError
from core.families.loading import load_denoiser
from core.training.trainer import Trainer
from core.weights.quantization import Frozen
from tests import tiny
from tests.keys.lab import CARD, Lab, moves, near, of_one, row, started

MID = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def layers(trainer: Trainer) -> dict[str, Any]:
    return dict(lora.layers(trainer.denoiser))


def ranks(trainer: Trainer) -> dict[str, int]:
    return {name: layer.r[lora.ADAPTER] for name, layer in layers(trainer).items()}


def recorded(trainer: Trainer, half: str, samples: int) -> Iterator[Tensor]:
    """What goes into A or B of the middle's layer, call by call."""
    found: list[Tensor] = []
    inner = layers(trainer)[MID]
    handle = getattr(inner, half)[lora.ADAPTER].register_forward_pre_hook(
        lambda module, given: found.append(given[0].detach().clone()))
    for n in range(samples):
        torch.manual_seed(n)
        trainer.accumulate(of_one(trainer.config.batch_size))
    handle.remove()
    yield from found


@row("lora_rank")
def _(lab: Lab) -> None:
    for rank in (2, 8):
        trainer = lab.trainer(lora_rank=rank)
        inner = layers(trainer)[MID]
        assert inner.lora_A[lora.ADAPTER].weight.shape == (rank, 64)
        assert inner.lora_B[lora.ADAPTER].weight.shape == (64, rank)
        assert inner.scaling[lora.ADAPTER] == 1
    assert lab.plan(lora_rank=64).parameters == 8 * lab.plan(lora_rank=8).parameters


@row("lora_alpha")
def _(lab: Lab) -> None:
    """alpha / rank, in the network and in the product of the file's tensors."""
    for alpha, scale in ((None, 1.0), (1.0, 0.25), (8.0, 2.0)):
        inner = layers(lab.trainer(lora_alpha=alpha))[MID]
        assert inner.scaling[lora.ADAPTER] == scale
        inner.lora_B[lora.ADAPTER].weight.data += 1.0
        x = torch.ones(1, 64)
        added = inner.lora_B[lora.ADAPTER](inner.lora_A[lora.ADAPTER](x))
        torch.testing.assert_close(inner(x) - inner.base_layer(x), scale * added,
                                   rtol=1e-4, atol=1e-5)


@row("lora_dropout")
def _(lab: Lab) -> None:
    for share in (0.0, 0.25):
        trainer = lab.trainer(lora_dropout=share, batch_size=4)
        inputs = torch.cat([x.flatten() for x in recorded(trainer, "lora_A", 4)])
        assert near(float((inputs == 0).float().mean()), share, len(inputs))
    text = lab.trainer(lora_dropout=0.25, text_encoder_lr=1e-3).text
    assert text is not None
    assert {layer.lora_dropout[lora.ADAPTER].p for model in text.models.values()
            for _, layer in lora.layers(model)} == {0.25}


@row("rank_dropout")
def _(lab: Lab) -> None:
    """Whole ranks of a sample, at every place alike."""
    trainer = lab.trainer(rank_dropout=0.25, batch_size=16)
    inner = torch.cat([x.reshape(16, -1, 4) for x in recorded(trainer, "lora_B", 24)])
    away = (inner == 0).all(1)
    assert torch.equal(away, (inner == 0).any(1))
    assert near(float(away.float().mean()), 0.25, away.numel())
    plain = torch.cat(list(recorded(lab.trainer(batch_size=4), "lora_B", 2)))
    assert (plain != 0).all()


@row("module_dropout")
def _(lab: Lab) -> None:
    """Whole layers of a step."""
    calls = len(list(recorded(lab.trainer(module_dropout=0.25), "lora_A", 160)))
    assert near(1 - calls / 160, 0.25, 160)
    assert len(list(recorded(lab.trainer(), "lora_A", 5))) == 5


@row("target_modules")
def _(lab: Lab) -> None:
    for wanted, ends in ((["to_q", "v_proj"], {"to_q", "to_v"}),
                         ("attention", {"to_q", "to_k", "to_v", "0"}),
                         ("attention+ff", {"to_q", "to_k", "to_v", "0", "proj", "2"})):
        found = layers(lab.trainer(target_modules=wanted))
        assert {name.rpartition(".")[2] for name in found} == ends


@row("init_lora_weights")
def _(lab: Lab) -> None:
    """The run begins with the file's own products."""
    file = tiny.tiny_lora(lab.folder / "begin.safetensors", rank=4)
    trainer = lab.trainer(init_lora_weights=str(file), target_modules=["to_q", "to_out.0"])
    tensors = load_file(file)
    for name in ("to_q", "to_out.0"):
        inner = layers(trainer)[MID.replace("to_q", name)]
        key = f"lora_unet_{tiny.MIDDLE}_{name.replace('.', '_')}"
        torch.testing.assert_close(
            inner.lora_B[lora.ADAPTER].weight @ inner.lora_A[lora.ADAPTER].weight,
            tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"])
    assert not layers(lab.trainer())[MID].lora_B[lora.ADAPTER].weight.any()


@row("base_loras")
def _(lab: Lab) -> None:
    """The file's product times its weight is added to the layer's own output; it isn't trained."""
    file = tiny.tiny_lora(lab.folder / "beneath.safetensors")
    tensors, key = load_file(file), f"lora_unet_{tiny.MIDDLE}_to_q"
    product = tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    plain = layers(lab.trainer())[MID](x).detach()
    for weight in (1.0, 0.5):
        trainer = lab.trainer(base_loras=[f"{file}:{weight}"])
        torch.testing.assert_close(layers(trainer)[MID](x).detach(),
                                   plain + weight * x @ product.T, rtol=1e-3, atol=1e-3)
        assert len(trainer.parameters) == len(lab.trainer().parameters)


@row("init_lora_resize")
def _(lab: Lab) -> None:
    file = tiny.tiny_lora(lab.folder / "begin-6.safetensors", rank=6)
    options = {"init_lora_weights": str(file), "target_modules": ["to_q", "to_out.0"]}
    with pytest.raises(UserError):
        lab.trainer(**options)
    inner = layers(lab.trainer(**options, init_lora_resize=True))[MID]
    key = f"lora_unet_{tiny.MIDDLE}_to_q"
    whole = load_file(file)[f"{key}.lora_up.weight"] @ load_file(file)[f"{key}.lora_down.weight"]
    made = inner.lora_B[lora.ADAPTER].weight @ inner.lora_A[lora.ADAPTER].weight
    left, values, right = torch.linalg.svd(whole)
    torch.testing.assert_close(made, left[:, :4] * values[:4] @ right[:4], rtol=1e-3, atol=1e-2)


@row("adapter")
def _(lab: Lab) -> None:
    kinds = {kind: layers(lab.trainer(adapter=kind))[MID] for kind in ("lora", "loha", "dora")}
    assert isinstance(kinds["lora"], LoraLayer)
    assert isinstance(kinds["loha"], LoHaLayer)
    assert lora.ADAPTER in kinds["dora"].lora_magnitude_vector
    assert lora.ADAPTER not in kinds["lora"].lora_magnitude_vector
    assert layers(lab.trainer(adapter="rslora"))[MID].scaling[lora.ADAPTER] == 4 / 4**0.5


@row("lokr_factor")
def _(lab: Lab) -> None:
    for factor, side in ((-1, 8), (4, 4), (2, 2)):
        inner = layers(lab.trainer(adapter="lokr", lokr_factor=factor))[MID]
        assert inner.lokr_w1[lora.ADAPTER].shape == (side, side)


@row("conv_rank")
def _(lab: Lab) -> None:
    found = ranks(lab.trainer(conv_rank=2))
    wide = {rank for name, rank in found.items() if ".conv" in name}
    assert wide == {2}
    assert not any("shortcut" in name or "proj_" in name for name in found)     # 1 x 1
    assert found[MID] == 4
    assert not any(".conv" in name for name in layers(lab.trainer()))


@row("conv_alpha")
def _(lab: Lab) -> None:
    for alpha, scale in ((None, 1.0), (1.0, 0.5)):
        found = layers(lab.trainer(conv_rank=2, conv_alpha=alpha))
        assert {layer.scaling[lora.ADAPTER] for name, layer in found.items()
                if ".conv" in name} == {scale}
        assert found[MID].scaling[lora.ADAPTER] == 1


@row("block_ranks")
def _(lab: Lab) -> None:
    found = ranks(lab.trainer(block_ranks={"mid_block": 2, "up_blocks": 0, "attn2": 3}))
    assert {rank for name, rank in found.items() if "attn2" in name} == {3}
    assert found[MID] == 2
    assert not any("up_blocks" in name and "attn1" in name for name in found)
    assert {rank for name, rank in found.items()
            if "down_blocks" in name and "attn1" in name} == {4}


@row("block_rates")
def _(lab: Lab) -> None:
    """AdamW's first step is the rate: a block's share shows in how far its weights go."""
    found = moves(started(lab.trainer(block_rates={"mid_block": 0.5, "up_blocks": 0.0})))
    for name, way in found.items():
        share = 0.5 if "mid_block" in name else 0.0 if "up_blocks" in name else 1.0
        assert way == pytest.approx(1e-3 * share, rel=1e-2, abs=1e-9), name


@row("lora_plus_ratio")
def _(lab: Lab) -> None:
    for ratio in (1.0, 8.0):
        found = moves(started(lab.trainer(lora_plus_ratio=ratio)))
        for name, way in found.items():
            assert way == pytest.approx(1e-3 * (ratio if "lora_B" in name else 1), rel=1e-2), name


# --- the base ---

@row("base_precision")
def _(lab: Lab) -> None:
    family, precision, _ = lab.parts()
    held = {}
    for kind in ("same", "int8", "nf4"):
        model = load_denoiser(lab.config(base_precision=kind), family, lab.base, precision)
        kinds = {layer.quantization for layer in model.modules() if isinstance(layer, Frozen)}
        assert kinds == (set() if kind == "same" else {kind})
        held[kind] = lab.plan(base_precision=kind).phase("train").parts["denoiser"]
    assert held["nf4"] < held["int8"] < held["same"]


@row("offload")
def _(lab: Lab) -> None:
    plans = [lab.plan(offload=share) for share in (0.0, 0.5, 1.0)]
    on_card = [one.phase("train").parts["denoiser"] for one in plans]
    waiting = [one.ram.get("waiting", 0.0) for one in plans]
    assert on_card[0] > on_card[1] > on_card[2]
    assert 0 == waiting[0] < waiting[1] < waiting[2]
    family, precision, _ = lab.parts()
    notes: list[Any] = []
    load_denoiser(lab.config(offload=0.5), family, lab.base, precision, notes.append)
    assert [note.key for note in notes] == ["precision.offload_useless"]    # told on a CPU


@row("gradient_checkpointing")
def _(lab: Lab) -> None:
    """Blocks are computed again on the way back; the plan holds less."""
    calls = []
    for on in (False, True):
        trainer, seen = lab.trainer(gradient_checkpointing=on), list[int]()
        block = trainer.denoiser.up_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        trainer.accumulate(of_one(1))
        calls.append(len(seen))
    assert calls == [1, 2]
    options = {"batch_size": 8, "target_modules": "attention"}
    assert (lab.plan(CARD, **options, gradient_checkpointing=True).phase("train").mb
            < lab.plan(CARD, **options).phase("train").mb)
