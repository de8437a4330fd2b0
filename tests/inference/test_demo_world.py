"""The built-in base and its LoRA: what a newcomer sees first must be right."""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from core import paths
from core.demo import run
from core.demo.classifier import Judge
from core.jobs.control import Control
from core.safetensors_header import read_header

BASE = paths.DEMO / "base"
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(BASE, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(paths.DEMO / "judge.safetensors")


def shots(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    images: list[Image.Image] = pipeline(
        prompts, num_inference_steps=20, guidance_scale=3.5, generator=generators,
        width=64, height=64).images
    return images


def in_git(files: Iterable[Path]) -> int:
    """Bytes, as git stores them."""
    return sum(len(zlib.compress(p.read_bytes(), 1)) for p in files)


def test_the_folder_is_small_half_precision_and_safe() -> None:
    files = [p for p in paths.DEMO.glob("**/*") if p.is_file()]
    captioners = [p for p in files if p.is_relative_to(paths.DEMO / "captioners")]
    assert in_git(set(files) - set(captioners)) < 25 * MEGABYTE
    assert 0 < in_git(captioners) < 5 * MEGABYTE
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".ckpt", ".pth")]
    for part in ("unet", "vae", "text_encoder"):
        (weights,) = (BASE / part).glob("*.safetensors")
        assert {t.dtype for t in read_header(weights).tensors.values()} == {"F16"}


def test_text_encoder_reads_in_old_and_new_tools() -> None:
    (weights,) = (BASE / "text_encoder").glob("*.safetensors")
    assert all(k.startswith("text_model.") for k in read_header(weights).tensors)


@pytest.mark.thorough
def test_subjects_are_drawn_as_asked(pipeline: StableDiffusionPipeline, judge: Judge) -> None:
    subjects = judge.subjects
    named = judge.name(shots(pipeline, [f"a {s}" for s in subjects], 100))
    right = np.mean([a == b for a, b in zip(named, subjects, strict=True)])
    assert right >= 0.8


def test_demo_subjects_are_unseen() -> None:
    texts = [p.read_text("utf-8") for p in (paths.DEMO / "pictures").glob("*.txt")]
    words = {w for text in texts for w in re.findall(r"\w+", text)}
    assert len(list((paths.DEMO / "pictures").glob("*.png"))) == 20
    assert not words & set(run.SUBJECTS)
    assert "duskprint" in words


@pytest.mark.thorough
@pytest.mark.timeout(1500)            # a whole training: minutes, more on a busy machine
def test_the_demo_teaches_a_style_and_keeps_the_subjects(tmp_path: Path) -> None:
    result = run.run_demo(tmp_path, lambda event: None, Control())
    assert result["proof"]["ok"]
    assert result["style_covered"] >= 0.7
    assert result["content_kept"] >= 0.8
    assert Image.open(result["sheet"]).width > 600
    assert json.loads(next(tmp_path.glob("*-summary.json")).read_text())["lora"] == result["lora"]


def test_pictures_of_the_builder_match_the_demo() -> None:
    sys.path.insert(0, str(paths.ROOT / "build"))
    try:
        import demo_pictures
    finally:
        sys.path.pop(0)
    assert demo_pictures.HELD_OUT == run.SUBJECTS
    assert not set(demo_pictures.LORA_SUBJECTS) & set(run.SUBJECTS)
    assert f"{demo_pictures.TRIGGER} style" == run.TRIGGER
