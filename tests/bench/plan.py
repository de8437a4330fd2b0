"""Planned against measured tensor memory of a training step, on the CPU.

    python -m tests.bench.plan [--full] [--json FILE]

Measured: bytes of the real weights, adapter and optimizer state, and the peak of what torch's CPU
allocator hands out during one update (torch.profiler's memory events). Planned: core.memory.plan,
from meta tensors. With --full also a full-size random SD 1.5 UNet (up to 12 GB of memory).
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile

from core import families, paths
from core.config import TrainConfig, size_of
from core.dataset.examples import Example, Examples
from core.families import detection
from core.families.base import Parts
from core.families.loading import TOKENIZER, load_denoiser
from core.memory import plan
from core.training.trainer import Trainer
from core.weights import precision_rules
from core.weights.precision import choose, quantize_and_offload_

CONFIGS = paths.family_configs("sd15")

MB = 2**20


@dataclass(frozen=True)
class Row:
    model: str
    setting: str
    planned_mb: float
    measured_mb: float

    @property
    def error(self) -> float:
        return self.planned_mb / self.measured_mb - 1


def settings() -> Iterator[dict[str, Any]]:
    """Batch 1-8, several resolutions, rank 4-128, checkpointing, both number formats."""
    plain = {"batch_size": 1, "lora_rank": 8, "precision": "fp32"}
    changes: list[dict[str, Any]] = [
        {}, {"batch_size": 2}, {"batch_size": 4}, {"batch_size": 8}, {"lora_rank": 4},
        {"lora_rank": 32}, {"lora_rank": 128}, {"precision": "bf16"},
        {"precision": "bf16", "batch_size": 4}, {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "batch_size": 4},
        {"gradient_checkpointing": True, "precision": "bf16", "lora_rank": 64, "batch_size": 2},
        {"gradient_accumulation_steps": 2}, {"lora_dropout": 0.1, "batch_size": 2},
        {"target_modules": "all-linear", "lora_rank": 16},
        *({"base_precision": kept, "gradient_checkpointing": less, "batch_size": 2}
          for kept in ("int8", "fp8", "nf4") for less in (False, True)),
        {"base_precision": "int8", "precision": "bf16"},
        {"text_encoder_lr": 1e-4, "ema_decay": 0.99},
        {"text_encoder_lr": 1e-4, "pivotal_tokens": 2, "trigger_word": "x", "batch_size": 4,
         "precision": "bf16"},
        {"base_precision": "nf4", "target_modules": "all-linear", "batch_size": 4}]
    for change in changes:
        yield plain | change


def base_config(source: Path, side: str, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({
        "base_model": str(source), "max_resolution": side, "device": "cpu",
        "max_train_steps": 8, **changes})


def trainer_of(config: TrainConfig, source: Path, random: bool) -> Trainer:
    """The engine's own trainer over latents and embeddings of the right shapes."""
    family, precision = families.get("sd15"), choose(config.precision, "cpu")
    if random:
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "unet"))
        unet.requires_grad_(False).to(dtype=precision.weights, memory_format=torch.channels_last)
        parts = family.skeleton(source, precision, frozenset())
        parts.denoiser = unet
        quantize_and_offload_(unet, precision.device,
                              **precision_rules.base_settings(config, "cpu"))
    else:
        parts = family.load(source, precision, frozenset())
        parts.denoiser = load_denoiser(config, family, source, precision)
    return Trainer(config, family, parts, precision, _examples(config, parts),
                   lambda event: None, None)  # type: ignore[arg-type]


def _examples(config: TrainConfig, parts: Parts) -> Examples:
    from core.dataset.image_folder import Dataset, Picture
    bucket = size_of(config.max_resolution)
    assert bucket
    picture = Picture(Path("x.png"), "x", config.batch_size, bucket, False)
    found = Examples([Example(picture, bucket, ("x",))], Dataset((picture,), (), Path()),
                     frozenset())
    factor = parts.native_size // parts.denoiser.config.sample_size
    width = parts.denoiser.config.cross_attention_dim
    length = 77
    found.latents = [torch.randn(4, bucket[1] // factor, bucket[0] // factor)]
    found.texts = {"x": {"text": torch.randn(1, length, width, dtype=_compute(config))}}
    return found


def _compute(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def measure(trainer: Trainer) -> float:
    """Peak tensor memory of an update, MiB."""
    trainer.update(0)                                   # makes the optimizer's state
    lasting = {t.untyped_storage()._cdata: t.untyped_storage().nbytes()
               for t in _tensors(trainer)}
    return sum(lasting.values()) / MB + peak_of(lambda: trainer.update(1))


def _tensors(trainer: Trainer) -> Iterator[torch.Tensor]:
    yield from trainer.denoiser.parameters()
    yield from trainer.denoiser.buffers()
    for encoder in trainer.text.models.values() if trainer.text else ():
        yield from (*encoder.parameters(), *encoder.buffers())
    yield from trainer.ema.averages if trainer.ema else ()
    for state in trainer.optimizer.state.values():
        yield from (v for v in state.values() if isinstance(v, torch.Tensor))


def compare(model: str, source: Path, side: str, random: bool, change: dict[str, Any]) -> Row:
    config = base_config(source, side, **change)
    machine = plan.Machine("cpu", "CPU", 0, 0)
    bucket = size_of(side)
    planned = plan.plan_run(config, detection.Base.of(source), machine,
                            plan.Data(1, 1, config.batch_size, bucket)).phase("train").mb
    shown = ", ".join(f"{k} {v}" for k, v in change.items())
    row = Row(model, f"{side.split(',')[0]} px, {shown}", planned,
              measure(trainer_of(config, source, random)))
    gc.collect()
    return row


def other_phases(model: str, source: Path, side: int) -> Iterator[Row]:
    """Captions, caching and previews, by the family's own calls."""
    family, precision = families.get("sd15"), choose("fp32", "cpu")
    base, numbers = detection.Base.of(source), precision_rules.numbers_for("fp32", "cpu", (0, 0))
    parts = family.load(source, precision)
    ask = functools.partial(plan.ask, base=base, numbers=numbers, kind="cpu")
    size = {"width": side, "height": side}
    pixels, t = torch.rand(4, 3, side, side), torch.zeros(2, dtype=torch.int64)
    cond = family.encode_text(parts, ["a", "b"])
    latents = family.encode_image(parts, pixels[:2])
    with torch.no_grad():
        calls: dict[str, tuple[float, Callable[[], object]]] = {
            "8 captions": (ask("texts", batch=8)["peak"],
                           lambda: family.encode_text(parts, ["a cat"] * 8)),
            f"caching 4 pictures of {side} px": (
                ask("cache", batch=4, **size)["peak"],
                lambda: family.encode_image(parts, pixels.clone())),
            f"a preview of {side} px": (
                ask("draw", batch=2, rank=8, targets="attention", **size)["peak"],
                lambda: (family.predict(parts.denoiser, latents.clone(), t, cond),
                         parts.vae.decode(latents[:1], return_dict=False)))}
        for name, (planned, call) in calls.items():
            yield Row(model, f"{name}, without weights", planned / MB, peak_of(call))


def peak_of(call: Callable[[], object]) -> float:
    """MiB that torch hands out within a call, at the most."""
    call()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler
    assert profiler.profiler.kineto_results
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / MB


def shapes_of_sd15(folder: Path) -> Path:
    """A base folder without weights: enough for a plan."""
    import shutil
    shutil.copytree(CONFIGS, folder / "base")
    shutil.copytree(TOKENIZER, folder / "base" / "tokenizer")
    return folder / "base"


def rows(full: bool) -> Iterator[Row]:
    for side in ("64,64", "128,128"):
        for change in settings():
            yield compare("demo base", paths.DEMO / "base", side, False, change)
    yield from other_phases("demo base", paths.DEMO / "base", 64)
    if not full:
        return
    with tempfile.TemporaryDirectory() as folder:
        source = shapes_of_sd15(Path(folder))
        for side in ("64,64", "128,128", "256,256"):
            for change in settings():
                if side != "256,256" or change["batch_size"] <= 2:
                    yield compare("SD 1.5", source, side, True, change)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args()
    print("| model | setting | planned MB | measured MB | difference |\n|---|---|---|---|---|")
    worst, count, began = 0.0, 0, time.time()
    for row in rows(args.full):
        worst, count = max(worst, abs(row.error)), count + 1
        print(f"| {row.model} | {row.setting} | {row.planned_mb:.1f} | {row.measured_mb:.1f} "
              f"| {row.error:+.1%} |", flush=True)
    print(json.dumps({"settings": count, "worst": round(worst, 4),
                      "seconds": round(time.time() - began)}))


if __name__ == "__main__":
    main()
