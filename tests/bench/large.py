"""Full-size random SD 1.5 and SDXL on the CPU: loading, the step, the plan.

    python -m tests.bench.large [--family sdxl] [--part load] [--folder DIR] [--rounds 7]

Each measurement is a process of its own. Loading: one fp16 file (2 and 7 GB; kept in DIR) in its
own numbers, every page of it read once, by diffusers' from_single_file and by this project, also
quantised; memory is the process's peak above what it held before, as the kernel counts it
(Linux), file pages included.
Step and plan: the engine's own trainer at 64 px, batch 1; SDXL in bf16, so that it fits 16 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from core import families, paths
from core.config import TrainConfig
from core.dataset.examples import Example, Examples
from core.dataset.image_folder import Dataset, Picture
from core.families import detection
from core.families.base import ALL_PARTS
from core.families.loading import load_denoiser
from core.jobs.control import Control
from core.memory import plan, plan_inputs, traces
from core.training.trainer import Trainer
from core.weights.precision import Precision, choose
from tests.bench.plan import measure
from tests.bench.step import compare
from tests.tiny import ldm_layout

MB = 2**20
SIDE = 64                                   # px
NUMBERS = {"sd15": "fp32", "sdxl": "bf16"}
PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
WAYS = ("diffusers", "same", "int8", "nf4")


# --- one process each ---

def load(family: str, file: Path, way: str) -> dict[str, float]:
    read = _diffusers(family, file) if way == "diffusers" else _ours(family, file, way)
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")           # the peak counts from here
    began = time.process_time()
    kept = read()
    touch(kept.components if way == "diffusers" else {
        "": kept.denoiser, "vae": kept.vae, **kept.text})
    seconds = time.process_time() - began
    peak, after = _status("VmHWM"), _resident()
    del kept
    return {"seconds": seconds, "before": before, "peak": peak - before, "after": after - before,
            "file": file.stat().st_size / MB}


def touch(models: dict[str, Any]) -> None:
    """Reads a number of every page: weights of a mapped file are not there before."""
    for model in models.values():
        for tensor in model.parameters() if isinstance(model, torch.nn.Module) else ():
            tensor.detach().as_strided((tensor.numel(),), (1,))[::1024].sum()


def _ours(family: str, file: Path, way: Any) -> Callable[[], Any]:
    cpu = torch.device("cpu")
    own = Precision(cpu, torch.float16, torch.float32, torch.float16, quantization=way)
    one = families.get(family)
    return lambda: one.load(file, own, ALL_PARTS)


def _diffusers(family: str, file: Path) -> Callable[[], Any]:
    import diffusers
    cls = getattr(diffusers, PIPELINES[family])
    folder = file.with_suffix("")
    shutil.copytree(plan_inputs.base_of(family).source, folder, dirs_exist_ok=True)
    if family == "sdxl":
        shutil.copytree(folder / "tokenizer", folder / "tokenizer_2", dirs_exist_ok=True)
    index = {"_class_name": cls.__name__, **{
        name: ["diffusers" if kind in ("unet", "vae", "scheduler") else "transformers", made]
        for name, kind, made in _components(folder)}}
    (folder / "model_index.json").write_text(json.dumps(index))
    more = {"safety_checker": None} if family == "sd15" else {}
    return lambda: cls.from_single_file(str(file), config=str(folder), torch_dtype=torch.float16,
                                        local_files_only=True, **more)


def _components(folder: Path) -> Iterator[tuple[str, str, str]]:
    names = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "tokenizer": "CLIPTokenizer",
             "scheduler": "EulerDiscreteScheduler", "tokenizer_2": "CLIPTokenizer",
             "text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    for path in sorted(folder.iterdir()):
        if path.name in names:
            yield path.name, path.name, names[path.name]


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _resident() -> float:
    return _status("VmRSS")


def trainer_of(family: str, file: Path, **changes: Any) -> Trainer:
    config = TrainConfig.model_validate({
        "base_model": str(file), "max_resolution": f"{SIDE},{SIDE}", "device": "cpu",
        "precision": NUMBERS[family], "lora_rank": 8, "max_train_steps": 8, **changes})
    one, precision = families.get(family), choose(config.precision, "cpu")
    parts = one.load(file, precision, frozenset())
    parts.denoiser = load_denoiser(config, one, file, precision)
    bucket = (SIDE, SIDE)
    item = Example(Picture(Path("x.png"), "x", 1, bucket, False), bucket, ("x",))
    examples = Examples([item], Dataset((item.picture,), (), Path()), frozenset())
    channels, side = parts.denoiser.config.in_channels, SIDE // 8
    examples.latents = [torch.randn(channels, side, side)]
    base = detection.Base.of(plan_inputs.base_of(family).source, family)
    shapes = traces._embedding(base, "fp32", 1)
    text = {k: torch.randn(v.shape, dtype=precision.compute) for k, v in shapes.items()}
    examples.texts = {"x": text, "": text}
    return Trainer(config, one, parts, precision, examples, lambda event: None, Control())


def step(family: str, file: Path, rounds: int) -> dict[str, float]:
    engine, bare, ratio = compare(trainer_of(family, file), rounds)
    return {"engine": engine, "bare": bare, "ratio": ratio}


def planned(family: str, file: Path, changes: dict[str, Any]) -> dict[str, float]:
    trainer = trainer_of(family, file, **changes)
    made = plan.plan_run(trainer.config, detection.Base.of(file), plan.Machine("cpu", "CPU", 0, 0),
                         plan.Data(1, 1, 1, (SIDE, SIDE))).phase("train").mb
    return {"planned": made, "measured": measure(trainer)}


SETTINGS: tuple[dict[str, Any], ...] = ({}, {"gradient_checkpointing": True},
                                        {"base_precision": "nf4", "gradient_checkpointing": True})


# --- all of them ---

def apart(part: str, family: str, file: Path, *more: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.large", "--only", part, "--family", family, "--file",
         str(file), *more], stdout=subprocess.PIPE, check=True, text=True, cwd=paths.ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def tables(chosen: list[str], parts: list[str], folder: Path, rounds: int) -> Iterator[str]:
    files = {name: folder / f"{name}.safetensors" for name in chosen}
    for name, file in files.items():
        if not file.exists():
            ldm_layout.write_full_size(name, file)
    if "load" in parts:
        yield ("| base | way | CPU s | peak, MB | peak / file | held after, MB |\n"
               + "|---" * 6 + "|")
        for name, file in files.items():
            apart("load", name, file, "--way", "same")          # the file is in RAM from now on
            for way in WAYS:
                one = apart("load", name, file, "--way", way)
                yield (f"| {name} | {way} | {one['seconds']:.1f} | {one['peak']:.0f} "
                       f"| {one['peak'] / one['file']:.2f} | {one['after']:.0f} |")
    if "step" in parts:
        yield "\n| base | numbers | engine s/step | bare s/step | ratio |\n" + "|---" * 5 + "|"
        for name, file in files.items():
            one = apart("step", name, file, "--rounds", str(rounds))
            yield (f"| {name} | {NUMBERS[name]} | {one['engine']:.3f} | {one['bare']:.3f} "
                   f"| {one['ratio']:.3f} |")
    if "plan" in parts:
        yield "\n| base | setting | planned MB | measured MB | difference |\n" + "|---" * 5 + "|"
        for name, file in files.items():
            for n, setting in enumerate(SETTINGS):
                one = apart("plan", name, file, "--setting", str(n))
                shown = ", ".join(f"{k} {v}" for k, v in setting.items()) or "plain"
                yield (f"| {name} | {shown} | {one['planned']:.0f} | {one['measured']:.0f} "
                       f"| {one['planned'] / one['measured'] - 1:+.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=[*NUMBERS])
    parser.add_argument("--part", choices=["load", "step", "plan"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["load", "step", "plan"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", default="same", help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        found = {"load": lambda: load(args.family, args.file, args.way),
                 "step": lambda: step(args.family, args.file, args.rounds),
                 "plan": lambda: planned(args.family, args.file, SETTINGS[args.setting])}
        print(json.dumps(found[args.only]()))
        return
    with tempfile.TemporaryDirectory() as passing:
        for line in tables([args.family] if args.family else [*NUMBERS],
                           [args.part] if args.part else ["load", "step", "plan"],
                           args.folder or Path(passing), args.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
