from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from core import families, paths
from core.adapters import lora
from core.config import TrainConfig
from core.dataset.examples import Encoder, find
from core.errors import UserError
from core.families import detection
from core.families.loading import load_denoiser
from core.jobs.control import Control
from core.jobs.events import Event
from core.memory import plan
from core.memory.meta_tensors import DeviceEmulation, traced
from core.training.run import train
from core.training.trainer import Trainer
from core.weights.precision import choose, quantize_and_offload_
from core.weights.quantization import (
    BLOCK,
    NF4,
    Frozen,
    Quantization,
    fill_,
    freeze_,
    quantize_,
    repeated_layers,
)
from tests import tiny
from tests.bench import plan as bench

KINDS: tuple[Quantization, ...] = ("int8", "fp8", "nf4")
CPU = torch.device("cpu")
DEMO = paths.DEMO / "base"
# Of float16, the table of the paper's appendix E.
PUBLISHED = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
             0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)


def layer_of(conv: bool, spread: float = 1.0) -> Any:
    torch.manual_seed(3)
    layer: Any = nn.Conv2d(32, 48, 3, 2, 1) if conv else nn.Linear(192, 128)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-spread, spread, len(layer.weight)).view(
            -1, *[1] * (layer.weight.ndim - 1)))
    layer.requires_grad_(False)
    return layer.to(memory_format=torch.channels_last) if conv else layer


def frozen(layer: Any, kind: Quantization) -> Any:
    return freeze_(copy.deepcopy(layer), kind, CPU)


def unet() -> Any:
    torch.manual_seed(5)
    return tiny.tiny_unet().requires_grad_(False).eval()


def test_nf4_levels_are_the_papers() -> None:
    assert pytest.approx(PUBLISHED, abs=1e-6) == tuple(NF4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conv", [False, True])
def test_error_is_within_the_stated_bound(kind: Quantization, conv: bool) -> None:
    layer = layer_of(conv)
    kept = frozen(layer, kind).weight
    assert kept.shape == layer.weight.shape
    assert kept.stride() == layer.weight.stride()
    rows, back = (w.permute(0, 2, 3, 1) if conv else w for w in (layer.weight, kept))
    size = BLOCK if kind == "nf4" else rows[0].numel()
    rows, back = rows.reshape(-1, size), back.reshape(-1, size)
    top = rows.abs().amax(1, keepdim=True)
    bound = {"int8": top / 254, "fp8": top / 28, "nf4": 0.152 * top + 3e-8}[kind]
    error = (rows - back).abs()
    assert (error <= bound * 1.0001).all()
    assert error.max() > 0                                      # it is quantised at all
    assert (error.norm() / rows.norm()) < {"int8": 0.01, "fp8": 0.04, "nf4": 0.11}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_odd_weights_survive(kind: Quantization) -> None:
    """All zero, tiny, huge and one outlier: no division by zero, no NaN."""
    weight = torch.zeros(64, 64)
    weight[1], weight[2], weight[3, 5] = 1e-12, 3e4, 7.0
    layer = nn.Linear(64, 64)
    layer.weight.data = weight
    back = frozen(layer.requires_grad_(False), kind).weight
    assert back.isfinite().all()
    assert (back[0] == 0).all()
    torch.testing.assert_close(back[2], weight[2], rtol=1e-3, atol=0)
    torch.testing.assert_close(back[3, 5], weight[3, 5], rtol=1e-3, atol=0)


def test_fp8_reads_alike_with_and_without_the_hardware() -> None:
    """Every e4m3 number, subnormal ones included."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(torch.int8)        # 127: NaN
    from core.weights.quantization import _read_fp8
    scales = torch.tensor(0.37)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        slow, fast = (_read_fp8(codes, scales, dtype, native) for native in (False, True))
        assert torch.equal(slow, fast)


def test_nf4_reads_alike_by_both_look_ups() -> None:
    layer = frozen(layer_of(False), "nf4")
    wide, narrow = layer.read(torch.float32), layer.read(torch.float64)
    assert torch.equal(wide, narrow.float())


@pytest.mark.parametrize("kind", [*KINDS, "same"])
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_what_a_plain_layer_of_its_weight_does(kind: Quantization, conv: bool,
                                                        dtype: torch.dtype) -> None:
    layer = layer_of(conv, 0.3)
    ours = frozen(layer, kind)
    layer.weight.data = ours.weight.clone(memory_format=torch.preserve_format)
    shape = (2, 32, 9, 7) if conv else (2, 5, 192)
    x = torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last) if conv else x

    def run(module: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = module(inputs)
        out.float().sin().sum().backward()
        assert inputs.grad is not None
        return out.detach(), inputs.grad
    (out, grad), (expected, expected_grad) = run(ours), run(layer)
    assert out.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(out, expected)
        assert torch.equal(grad, expected_grad)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_same_works_with_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint
    block = nn.Sequential(frozen(layer_of(False), "nf4"), nn.SiLU(), nn.Linear(128, 4))
    x = torch.randn(3, 192)
    grads = []
    for wrapped in (block, lambda v: checkpoint(block, v, use_reentrant=False)):
        inputs = x.clone().requires_grad_()
        wrapped(inputs).sum().backward()
        grads.append(inputs.grad)
    assert torch.equal(grads[0], grads[1])


def test_backward_keeps_no_weight() -> None:
    """Ten layers: what lives between the passes is less than one weight in full."""
    layers = nn.Sequential(*[frozen(nn.Linear(512, 512).requires_grad_(False), "int8")
                             for _ in range(10)])
    x = torch.randn(1, 512, requires_grad=True)
    with traced(DeviceEmulation("cpu", torch.float32), [layers]) as tally:
        out = layers(x)
        between = tally.live
        out.sum().backward()
    weight = 512 * 512 * 4
    assert between < weight / 8
    assert weight < tally.peak < 1.5 * weight


# --- models ---

def test_which_layers_stay() -> None:
    model = unet()
    plain = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    quantize_(model, "int8")
    stayed = {n for n, m in plain.items() if not isinstance(m, Frozen)}
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"} <= stayed
    for name, layer in plain.items():
        inside = name.startswith(("down_blocks.", "mid_block.", "up_blocks."))
        assert (name not in stayed) == (inside and layer.weight.numel() >= 4096), name
    assert quantize_(model, "int8") == 0                        # what is done isn't done twice


class Unlike(nn.Linear):
    """Does more than its weight, so it stays as it is."""


@pytest.mark.parametrize(("model", "why"), [
    (nn.Linear(64, 64), "repeated blocks"), (nn.Sequential(nn.ReLU()), "repeated blocks"),
    (nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(63, 65)])}), "4095 weights"),
    (nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(67, 67)])}), "multiple of 64"),
    (nn.ModuleDict({"blocks": nn.ModuleList([Unlike(64, 64)])}), "Unlike")])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_quantise_is_said(model: nn.Module, why: str, kind: Quantization) -> None:
    """It would go on in full, in memory that isn't there."""
    with pytest.raises(UserError, match=why) as caught:
        quantize_(model.requires_grad_(False), kind)
    assert caught.value.code == "precision.nothing_quantised"
    assert caught.value.fixes[0].changes == {"base_precision": "same"}
    assert quantize_(model, "same") == 0


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("fp8", 8), ("nf4", 4.25)])
def test_weights_take_their_bits(kind: Quantization, bits: float) -> None:
    model = families.get("sd15").load(DEMO, choose("fp32", "cpu"), frozenset({"denoiser"})).denoiser
    weights = sum(layer.weight.numel() for layer in repeated_layers(model))
    assert weights > 0.95 * sum(p.numel() for p in model.parameters())
    quantize_(model, kind)
    held = sum(t.numel() * t.element_size() for layer in repeated_layers(model)
               for t in (layer.codes, layer.scales) if t is not None)
    assert held * 8 / weights == pytest.approx(bits, rel=0.02)


def test_meta_tensors_give_the_real_shapes() -> None:
    real = unet()
    with torch.device("meta"):
        empty = tiny.tiny_unet().requires_grad_(False)
    for kind in KINDS:
        shapes = []
        for model in (copy.deepcopy(real), copy.deepcopy(empty)):
            quantize_(model, kind)
            shapes.append({n: (b.shape, b.dtype) for n, b in model.named_buffers()})
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_filling_an_empty_model_is_quantising_a_full_one(kind: Quantization) -> None:
    real = unet().to(memory_format=torch.channels_last)
    weights = {k: v.clone() for k, v in real.state_dict().items()}
    with torch.device("meta"):
        empty = tiny.tiny_unet().requires_grad_(False).to(memory_format=torch.channels_last)
    for model in (real, empty):
        quantize_(model, kind)
    fill_(empty, weights.items(), torch.float32, CPU)
    mine, theirs = empty.state_dict(), real.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 32)
    assert torch.equal(real(x, t, text).sample, empty(x, t, text).sample)


def test_adapters_fit_every_kind_of_frozen_layer() -> None:
    """peft builds an adapter from the base layer's shape, type, dtype and device."""
    model = unet()
    config = TrainConfig(target_modules="all-linear", lora_rank=3)
    quantize_(model, "nf4")
    parameters = lora.attach(model, config, families.get("sd15").spec)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters)
    plain = lora.attach(unet(), config, families.get("sd15").spec)
    assert [p.shape for p in parameters] == [p.shape for p in plain]
    assert all(torch.equal(a, b) for a, b in zip(parameters, plain, strict=True))
    assert not any(isinstance(m, Frozen) for _, layer in lora.layers(model)
                   for m in (*layer.lora_A.values(), *layer.lora_B.values()))


# --- runs ---

def demo_losses(kind: Quantization, updates: int = 12) -> tuple[list[float], Trainer]:
    """Loss of one fixed batch, each time an update has been made on it."""
    config = TrainConfig.model_validate({
        "base_model": str(DEMO), "train_data_dir": str(paths.DEMO / "pictures"), "device": "cpu",
        "base_precision": kind, "batch_size": 4, "lora_rank": 8, "learning_rate": 3e-3,
        "cache_to_disk": False, "max_train_steps": updates})
    family, precision = families.get("sd15"), choose("fp32", "cpu")
    parts = family.load(DEMO, precision)
    examples = find(config, Path(config.train_data_dir), None, parts.native_size,
                    parts.bucket_step, lambda event: None)
    Encoder(family, DEMO, precision, config, lambda event: None, Control()).fill(examples)
    parts.denoiser = load_denoiser(config, family, DEMO, precision)
    trainer = Trainer(config, family, parts, precision, examples, lambda event: None, Control())
    batch = trainer.sampler.update(0)
    losses = []
    for _ in range(updates):
        losses.append(float(trainer.accumulate(batch)))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
    return losses, trainer


@pytest.mark.thorough
def test_lora_on_a_quantised_base_learns_as_on_a_plain_one() -> None:
    """The first loss tells how far the quantised base is off (2 % of the loss for 8 bits, 10 %
    for 4); the fall over 12 updates is the plain base's within a fifth."""
    plain, _ = demo_losses("same")
    fall = plain[0] - plain[-1]
    assert fall > 0.1 * plain[0]
    for kind, off in (("int8", 0.02), ("fp8", 0.02), ("nf4", 0.1)):
        losses, _ = demo_losses(kind)
        assert losses[0] == pytest.approx(plain[0], rel=off)
        assert losses[0] - losses[-1] == pytest.approx(fall, rel=0.2)


def test_run_ends_with_a_proven_file_that_names_no_quantised_weight(base: Path, tmp_path: Path
                                                                    ) -> None:
    """Previews and the proof draw through the quantised modules; the file is any LoRA file."""
    pictures = tiny.pictures(tmp_path / "pictures")
    files = {}
    for kind in ("same", "nf4"):
        events: list[Event] = []
        config = TrainConfig.model_validate({
            "base_model": str(base), "train_data_dir": str(pictures), "lora_rank": 4,
            "output_dir": str(tmp_path / kind), "output_name": "ink", "batch_size": 2,
            "max_train_steps": 2, "learning_rate": 1e-2, "base_precision": kind,
            "sample_prompts": ["red disc"], "sample_every": 2, "sample_inference_steps": 2})
        result = train(config, events.append, Control())
        assert result["proof"]["ok"], result["proof"]
        assert len(result["samples"]) == 2
        files[kind] = load_file(result["lora"])
    assert files["same"].keys() == files["nf4"].keys()
    assert any(not torch.equal(files["same"][k], files["nf4"][k]) for k in files["same"])


# --- the plan ---

@pytest.mark.parametrize("change", [
    {"base_precision": "int8"}, {"base_precision": "fp8", "gradient_checkpointing": True},
    {"base_precision": "nf4", "gradient_checkpointing": True}])
def test_plan_knows_the_quantised_step(change: dict[str, Any]) -> None:
    setting = {"batch_size": 2, "lora_rank": 8, "precision": "fp32"} | change
    row = bench.compare("demo", DEMO, "64,64", False, setting)
    assert abs(row.error) < 0.05, row


def test_plan_counts_the_kept_base() -> None:
    machine = plan.Machine("cpu", "CPU", 16_000, 16_000)
    found = {kind: plan.plan_run(TrainConfig(base_precision=kind), detection.Base.of(DEMO), machine)
             for kind in ("same", "nf4")}
    full = found["same"].phase("train").parts["denoiser"]
    assert found["nf4"].phase("train").parts["denoiser"] < full / 6
    assert found["nf4"].phase("verify").parts["denoiser"] < full / 6
    assert found["nf4"].needs_mb < found["same"].needs_mb
    assert found["nf4"].parameters == found["same"].parameters
    assert found["nf4"].base_parameters == found["same"].base_parameters


def test_a_card_holds_less_of_a_base_that_waits_in_ram() -> None:
    card = plan.Machine("cuda", "RTX", 8000, 7000, (8, 9))
    made = {share: plan.plan_run(TrainConfig(offload=share), detection.Base.of(DEMO), card)
            for share in (0.0, 0.5, 1.0)}
    held = [made[s].phase("train").parts["denoiser"] for s in (0.0, 0.5, 1.0)]
    assert held[0] > held[1] > held[2]
    assert made[1.0].ram["waiting"] == pytest.approx(held[0] - held[2], rel=0.01)
    assert made[0.5].ram["waiting"] == pytest.approx(made[1.0].ram["waiting"] / 2, rel=0.2)
    totals = [made[s].phase("train").mb for s in (0.0, 0.5, 1.0)]
    assert totals[0] > totals[1] > totals[2]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_reads_what_the_cpu_reads(kind: Quantization) -> None:
    layer = layer_of(False)
    here, there = frozen(layer, kind), frozen(layer, kind).cuda()
    there.native = True
    torch.testing.assert_close(there.read(torch.float32).cpu(), here.read(torch.float32))
    x = torch.randn(4, 192)
    expected = F.linear(x, here.weight, layer.bias)
    torch.testing.assert_close(there(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_gpu_gets_only_the_codes() -> None:
    model = unet()
    quantize_and_offload_(model, torch.device("cuda:0"), "nf4")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
