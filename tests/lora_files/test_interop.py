"""A LoRA of ours in other programs, for real: diffusers and stable-diffusion.cpp on a full-size
Stable Diffusion 1.5 with random weights.
Slow: pytest -n 0 -s -m slow tests/lora_files/test_interop.py

stable-diffusion.cpp comes with `inferna` in an environment of its own, made once; it needs a Python
of 3.12 or newer, looked for in PATH, pyenv's folders, or named by DARKROOM_PYTHON312.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from core import families, paths
from core.adapters import from_file, layers, lora
from core.config import TrainConfig
from core.families.sd15.spec import NAMING as SD1
from core.inference import generate
from core.lora_files import formats
from core.lora_files.layers import Lora
from tests import tiny
from tests.tiny import ldm_layout

CONFIGS = paths.family_configs("sd15")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600), pytest.mark.xdist_group("interop")]

INFERNA = "inferna==0.7.0"
PROMPT, SEED, SIZE, STEPS = "a red disc on white paper", 11, 64, 2
WEIGHTS = (0.4, 0.8, 1.2)
SPEC = families.get("sd15").spec
# What is trained, with numbers as large as a strong LoRA's: adapter, spread of its weights, keys.
KINDS: dict[str, tuple[float, dict[str, Any]]] = {
    "lora": (0.05, {}), "locon": (0.05, {"conv_rank": 4}), "dora": (0.05, {}),
    "loha": (0.15, {"conv_rank": 4}), "lokr": (0.1, {"conv_rank": 4}), "oft": (0.02, {})}


# --- the base, and files by our own saving code ------------------------------------------------

@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Of full size; weights are those that the file's fp16 can say."""
    found = ldm_layout.full_size()
    for model in found.values():
        model.half().float().eval()
    return found


@pytest.fixture(scope="module")
def single(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("interop") / "sd15.safetensors"
    ldm_layout.write(path, models)
    yield path
    path.unlink()                           # 2 GB


def drawn(kind: str, models: dict[str, Any], text: bool) -> Lora:
    """An adapter as `lora.attach` makes it, with random numbers for trained ones, by the code that
    a run saves with."""
    spread, changes = KINDS[kind]
    config = TrainConfig.model_validate({
        "lora_rank": 8, "lora_alpha": 4.0, "target_modules": "all-linear",
        "adapter": "lora" if kind == "locon" else kind, **changes})
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "unet"))
        encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder"))
    found = Lora({}, SD1, {"ss_base_model_version": "sd_v1"})
    targets = config.with_changes(target_modules=list(SPEC.text_targets))
    plain = replace(SPEC, lora_aliases={}, lora_presets={})
    generator = torch.Generator().manual_seed(3)
    for name, model, chosen, spec in (("unet", unet, config, SPEC),
                                      ("text_encoder", encoder, targets, plain))[:1 + text]:
        lora.attach(model, chosen, spec)
        state = {key: torch.randn(value.shape, generator=generator) * spread
                 for key, value in lora.parameters(model).items()}
        for key in state:
            if "magnitude" in key:          # DoRA's: the base's own lengths, a tenth off
                layer = models["unet"].get_submodule(key.partition(".lora_magnitude")[0])
                own = layers.lengths(layer.weight)
                state[key] = own * (1 + 2 * state[key].view_as(own))
        tensors = from_file.tensors(model, state, torch.float16, name)
        found.layers |= formats.from_tensors(tensors, "sd15").layers
    return found


@dataclass(frozen=True, slots=True)
class File:
    path: Path
    lora: Lora
    keys: int                               # tensors, alphas among them


@pytest.fixture(scope="module")
def files(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, File]:
    folder, found = tmp_path_factory.mktemp("loras"), {}
    for kind in KINDS:
        made = drawn(kind, models, text=kind == "lora")
        for to in ("kohya", "comfyui", "diffusers") if kind == "lora" else ("kohya",):
            path = formats.save(made, to, folder / f"{kind}-{to}.safetensors")
            found[f"{kind}-{to}"] = File(path, made, len(generate.read_header(path).tensors))
    return found


# --- diffusers ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pipeline(models: dict[str, Any], single: Path) -> Any:
    """After the file is written: adapters change what its tensors are called."""
    return StableDiffusionPipeline(
        unet=models["unet"], vae=models["vae"], text_encoder=models["text"],
        tokenizer=CLIPTokenizer.from_pretrained(tiny.TOKENIZER), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            timestep_spacing="trailing", steps_offset=1))


@torch.no_grad()
def by_diffusers(pipeline: Any) -> np.ndarray:
    """(H, W, 3), 0 to 255; the noise is the generator's first, as stable-diffusion.cpp's."""
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(PROMPT, width=SIZE, height=SIZE, num_inference_steps=STEPS,
                     guidance_scale=1.0, generator=torch.Generator().manual_seed(SEED),
                     output_type="np").images[0]
    return np.asarray(image, np.float64) * 255


@pytest.fixture(scope="module")
def reference(pipeline: Any, files: dict[str, File], running: Running
              ) -> dict[tuple[str, float], np.ndarray]:
    """(file, weight) -> picture. Files that diffusers has a reader for go through its own."""
    found = {("", 0.0): by_diffusers(pipeline)}
    for name, file in files.items():
        kind, _, to = name.partition("-")
        if to == "comfyui":                 # the same layers in other words
            continue
        if kind in ("lora", "locon"):       # kohya's keys by its own converter
            pipeline.load_lora_weights(file.path.parent, weight_name=file.path.name,
                                       adapter_name=name)
        else:
            generate.load_adapter(pipeline, file.path, name, "sd15")
        assert lora.count(pipeline.components.values(), name) == len(file.lora.layers)
        for weight in WEIGHTS if name == "lora-kohya" else (0.8,):
            lora.use(pipeline.components.values(), {name: weight})
            found[name, weight] = by_diffusers(pipeline)
        lora.use(pipeline.components.values(), {})
    return found


def effect(pictures: dict[tuple[str, float], np.ndarray], name: str, weight: float) -> np.ndarray:
    return pictures[name, weight] - pictures["", 0.0]


def size(change: np.ndarray) -> float:
    return float(np.sqrt((change**2).mean()))


def alike(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def grows(pictures: dict[tuple[str, float], np.ndarray]) -> list[float]:
    """How far each weight's picture is from the base's; a flat picture would prove nothing."""
    base = pictures["", 0.0]
    assert base.std() > 20
    assert ((base <= 0) | (base >= 255)).mean() < 0.2
    sizes = [size(effect(pictures, "lora-kohya", weight)) for weight in WEIGHTS]
    assert 2 < sizes[0] < sizes[1] < sizes[2]
    return sizes


def test_diffusers_draws_with_every_format_alike(reference: dict[Any, np.ndarray]) -> None:
    """kohya's and diffusers' file are the same numbers but for alpha, which is rounded into fp16
    once more: up to one level of 255."""
    print("\ndiffusers: change by weight", [f"{one:.2f}" for one in grows(reference)])
    a, b = (effect(reference, f"lora-{to}", 0.8) for to in ("kohya", "diffusers"))
    print(f"diffusers: kohya against diffusers format {alike(a, b):.6f}, {np.abs(a - b).max():.3f}")
    assert alike(a, b) > 0.9999
    assert size(a - b) < 0.02 * size(a)
    for kind in KINDS:
        assert size(effect(reference, f"{kind}-kohya", 0.8)) > 2, kind


# --- stable-diffusion.cpp ----------------------------------------------------------------------

def _pythons() -> Iterator[str]:
    if named := os.environ.get("DARKROOM_PYTHON312"):
        yield named
    yield sys.executable
    yield from filter(None, (shutil.which(f"python3.{minor}") for minor in (12, 13, 14)))
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    yield from (str(one) for one in sorted(root.glob("3.1[2-9].*/bin/python")))


def _new_enough(python: str) -> bool:
    asked = "import sys, venv; sys.exit(sys.version_info < (3, 12))"
    return subprocess.run([python, "-c", asked], capture_output=True).returncode == 0


def _environment() -> tuple[str, str]:
    """The Python of an environment with stable-diffusion.cpp, made once in the cache folder; or
    the reason why there is none."""
    folder = platformdirs.user_cache_path("darkroom-tests") / INFERNA.replace("==", "-")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = [str(python), "-c", "import inferna.sd, numpy"]
    if python.exists() and subprocess.run(ready, capture_output=True).returncode == 0:
        return str(python), ""
    maker = next(filter(_new_enough, _pythons()), None)
    if maker is None:
        return "", "its wheel needs Python 3.12 or newer: name one in DARKROOM_PYTHON312"
    for command in ([maker, "-m", "venv", "--clear", str(folder)],
                    [str(python), "-m", "pip", "install", "-q", INFERNA, "numpy"], ready):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return "", f"{INFERNA} can't be had here: {done.stderr.strip()[-300:]}"
    return str(python), ""


@dataclass(frozen=True, slots=True)
class Drawn:
    pictures: dict[tuple[str, float], np.ndarray]
    lines: dict[tuple[str, float], list[str]]      # what the program said of each

    def applied(self, shot: tuple[str, float]) -> tuple[int, int]:
        """Tensors that found a place, part by part, and all that the file has."""
        counts = [re.search(r"\((\d+) / (\d+)\) LoRA tensors have been applied", line)
                  for line in self.lines[shot]]
        found = [(int(one[1]), int(one[2])) for one in counts if one]
        return sum(one for one, _ in found), max((all_ for _, all_ in found), default=0)


@dataclass(frozen=True, slots=True)
class Running:
    """It draws beside diffusers."""

    job: Path
    shots: list[tuple[str, float, str]]
    process: subprocess.Popen[bytes] | None
    reason: str = ""                        # why there is no process


@pytest.fixture(scope="module")
def running(single: Path, files: dict[str, File], pipeline: Any,
            tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    pipeline.scheduler.set_timesteps(STEPS)
    shots = [("", 0.0, "IMMEDIATELY"), *(("lora-kohya", w, "IMMEDIATELY") for w in WEIGHTS),
             *((name, 0.8, "IMMEDIATELY") for name in files if name != "lora-kohya"),
             ("lora-kohya", 0.8, "AT_RUNTIME")]
    job = tmp_path_factory.mktemp("sdcpp") / "job.json"
    job.write_text(json.dumps({
        "model": str(single), "threads": 1, "prompt": PROMPT, "size": SIZE, "seed": SEED,
        "sigmas": pipeline.scheduler.sigmas.tolist(), "shots": [
            {"loras": [[str(files[name].path), weight]] if name else [], "mode": mode}
            for name, weight, mode in shots]}), "utf-8")
    python, reason = _environment()
    if reason:
        yield Running(job, shots, None, reason)
        return
    script = (Path(__file__).parents[1] / "sdcpp_draw.py")
    with job.with_suffix(".out").open("wb") as said, subprocess.Popen(
            [python, str(script), str(job)], stdout=said, stderr=said) as process:
        yield Running(job, shots, process)
        process.kill()


@pytest.fixture(scope="module")
def drawn_there(running: Running) -> Drawn:
    if running.process is None:
        pytest.skip(running.reason)
    job, shots = running.job, running.shots
    assert running.process.wait() == 0, job.with_suffix(".out").read_text("utf-8")[-2000:]
    told = json.loads(job.with_suffix(".log.json").read_text("utf-8"))
    assert told["family"] == "SD 1.x"
    names = [(name if mode == "IMMEDIATELY" else f"{name}-at-runtime", weight)
             for name, weight, mode in shots]
    lines: dict[tuple[str, float], list[str]] = {}
    for level, text in told["lines"]:
        if level == -1:
            lines[names[int(text)]] = []
        elif lines:
            lines[list(lines)[-1]].append(text)
    with np.load(job.with_suffix(".npz")) as arrays:
        return Drawn({name: arrays[str(n)].astype(np.float64) for n, name in enumerate(names)},
                     lines)


READ_THERE = ("lora-kohya", "locon-kohya", "loha-kohya", "lokr-kohya")
# It has no code for `dora_scale` and `oft_blocks`, nor for others' names of text encoders.
LEFT_OUT_THERE = ("dora-kohya", "oft-kohya", "lora-comfyui", "lora-diffusers")


def test_stable_diffusion_cpp_draws_the_same(drawn_there: Drawn,
                                             reference: dict[Any, np.ndarray]) -> None:
    """Tolerances: it computes with fp16 weights and activations, diffusers here in fp32, and
    pictures have 255 levels."""
    there = drawn_there.pictures
    same = alike(there["", 0.0], reference["", 0.0])
    print(f"\nsd.cpp: base picture {same:.6f}, change by weight",
          [f"{one:.2f}" for one in grows(there)])
    assert same > 0.999
    shots = [("lora-kohya", weight) for weight in WEIGHTS] + [
        (name, 0.8) for name in (*READ_THERE[1:], "lora-kohya-at-runtime")]
    for name, weight in shots:
        ours, theirs = (effect(pictures, one, weight) for pictures, one in (
            (reference, f"{name.partition('-')[0]}-kohya"), (there, name)))
        print(f"sd.cpp: {name} at {weight}: change {size(theirs):.2f}, by diffusers "
              f"{size(ours):.2f}, correlation {alike(ours, theirs):.5f}")
        assert alike(ours, theirs) > 0.98, name
        assert 0.95 < size(theirs) / size(ours) < 1.05, name


def test_stable_diffusion_cpp_takes_every_key(drawn_there: Drawn, files: dict[str, File]) -> None:
    for name in READ_THERE:
        lines = drawn_there.lines[name, 0.8]
        assert not [one for one in lines if "unused" in one or "incompatible" in one
                    or "Only (" in one], name
        applied, total = drawn_there.applied((name, 0.8))
        assert applied == total == files[name].keys, name


def test_what_stable_diffusion_cpp_leaves_out_is_what_the_docs_say(
        drawn_there: Drawn, files: dict[str, File]) -> None:
    """It tells a count, no more. When it learns them, docs/interop.md has to say so."""
    for name in LEFT_OUT_THERE:
        applied, total = drawn_there.applied((name, 0.8))[0], files[name].keys
        print(f"\nsd.cpp: {name}: {applied} of {total} tensors")
        assert applied < total, name
