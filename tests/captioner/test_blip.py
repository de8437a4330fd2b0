"""BLIP and BLIP-2: against transformers' own one-at-a-time path; the pipeline around captioners."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from captioner import get
from captioner.base import Description
from captioner.config import CaptionConfig
from captioner.models.blip import Blip, GumbelNoise, seed_of, with_prompt
from captioner.pipeline import describe_all
from core.dataset.images import open_picture
from core.errors import UserError
from core.failures import ran_out
from core.jobs.control import Control
from tests.tiny import captioners as tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny.pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module", params=["blip", "blip2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = tiny.tiny_blip if request.param == "blip" else tiny.tiny_blip2
    return make(tmp_path_factory.mktemp(request.param))


def opened(folder: Path | str, **more: Any) -> Blip:
    given = {"max_tokens": 12, "min_tokens": 0, **more}
    blip = Blip(CaptionConfig(folder="x", models={"blip": str(folder)}, device="cpu", **given))
    blip.load()
    return blip


# --- against transformers ---

def one_at_a_time(folder: Path, files: Sequence[Path], prompt: str, **how: Any) -> list[str]:
    """As the model's page shows it."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    two = "Blip2" in json.loads((folder / "config.json").read_text())["architectures"][0]
    kind = (transformers.Blip2ForConditionalGeneration if two
            else transformers.BlipForConditionalGeneration)
    model = kind.from_pretrained(folder).eval()
    texts = []
    for path in files:
        inputs = processor(images=open_picture(path), return_tensors="pt",
                           **({"text": prompt} if prompt else {}))
        ids = model.generate(**inputs, **how)
        texts.append(" ".join(processor.decode(ids[0], skip_special_tokens=True).split()))
    return texts


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompt", ["", "a picture of"])
def test_batched_sentences_are_those_of_the_librarys_loop(folder: Path, files: list[Path],
                                                          beams: int, prompt: str) -> None:
    blip = opened(folder, beams=beams, prompt=prompt, min_tokens=3)
    ours = blip.sentences([blip.prepare(open_picture(path)) for path in files])
    theirs = one_at_a_time(folder, files, prompt, num_beams=beams, do_sample=False,
                           max_new_tokens=12, min_new_tokens=3)
    assert ours == [with_prompt(text, prompt) for text in theirs]
    assert len(set(ours)) > 2               # the pictures matter
    assert all(text.startswith(prompt) for text in ours)


def test_pixels_are_the_processors(folder: Path, files: list[Path]) -> None:
    blip = opened(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    for path in files:
        theirs = processor(images=open_picture(path), return_tensors="pt").pixel_values[0]
        assert torch.equal(torch.from_numpy(blip.prepare(open_picture(path))), theirs)


def test_sampling_does_not_depend_on_the_batch(folder: Path, files: list[Path]) -> None:
    blip = opened(folder, sample=True, top_p=0.95, temperature=1.3)
    prepared = [blip.prepare(open_picture(path)) for path in files]
    together = blip.sentences(prepared)
    assert together == [blip.sentences([picture])[0] for picture in prepared]
    assert together[::-1] == blip.sentences(prepared[::-1])
    again = opened(folder, sample=True, top_p=0.95, temperature=1.3, seed=7)
    assert together != again.sentences(prepared)


def test_gumbel_noise_draws_from_the_softmax() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -torch.inf]])
    noise = GumbelNoise([5])
    draws = torch.tensor([int(noise(torch.zeros(1, 1), logits).argmax()) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=4) / len(draws)
    torch.testing.assert_close(shares, logits.softmax(-1)[0], atol=0.03, rtol=0)
    assert shares[3] == 0


def test_top_p_leaves_only_the_likeliest(folder: Path, files: list[Path]) -> None:
    narrow = opened(folder, sample=True, top_p=1e-6)
    greedy = opened(folder, beams=1)
    prepared = [greedy.prepare(open_picture(path)) for path in files]
    assert narrow.sentences(prepared) == greedy.sentences(prepared)


def test_seeds_come_from_the_picture_and_the_config() -> None:
    one, two = np.zeros((3, 4, 4), np.float32), np.ones((3, 4, 4), np.float32)
    assert seed_of(one, 1) == seed_of(one.copy(), 1)
    assert len({seed_of(one, 1), seed_of(two, 1), seed_of(one, 2)}) == 3


@pytest.mark.parametrize(("text", "prompt", "expected"), [
    ("a cat  sleeps", "", "a cat sleeps"), ("a photo of a cat", "a photo of", "a photo of a cat"),
    ("a cat", "a photo of", "a photo of a cat"),
    ("Question: what? a cat", "Question: what?", "a cat"),
    ("a cat", "What is it?", "a cat"), ("图中是什么？ 一只猫", "图中是什么？", "一只猫")])
def test_prefixes_stay_and_questions_go(text: str, prompt: str, expected: str) -> None:
    assert with_prompt(text, prompt) == expected


def test_lengths_are_kept(folder: Path, files: list[Path]) -> None:
    blip = opened(folder, max_tokens=4, min_tokens=4, beams=1)
    words = [text.split() for text in blip.sentences([blip.prepare(open_picture(files[0]))])]
    assert 1 <= len(words[0]) <= 4


def test_identity_tells_weights_and_options(folder: Path) -> None:
    def name(**more: Any) -> str:
        return Blip(CaptionConfig(folder="x", models={"blip": str(folder)}, **more)).identity()
    assert name() == name(top_p=0.5)        # unused without sampling
    assert len({name(), name(beams=1), name(prompt="a"), name(max_tokens=9),
                name(sample=True), name(sample=True, seed=1), name(sample=True, top_p=0.5)}) == 7


# --- faults ---

def fault(folder: Path | str, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(folder, **more)
    assert "{" not in str(caught.value)
    return caught.value.code


def test_wrong_folders_are_told(folder: Path, tmp_path: Path) -> None:
    def broken(change: Any) -> str:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "m")
        change(tmp_path / "m")
        return fault(tmp_path / "m")
    weights, config = "model.safetensors", "config.json"
    assert fault("someone/some-blip") == "captioner.no_weights"
    assert fault(folder, min_tokens=9, max_tokens=8) == "blip.lengths"
    assert broken(lambda m: (m / config).unlink()) == "blip.no_config"
    assert broken(lambda m: (m / config).write_text("{}")) == "blip.bad_config"
    assert broken(lambda m: (m / config).write_text('{"model_type": "vit"}')) == "blip.other_model"
    assert broken(lambda m: (m / weights).rename(m / "pytorch_model.bin")) == "captioner.pickle"
    assert broken(lambda m: (m / weights).unlink()) == "captioner.no_weights_in"
    assert broken(lambda m: (m / weights).write_bytes(b"\0" * 64)) == "captioner.broken_weights"
    assert broken(lambda m: (m / "tokenizer.json").write_text("x")) == "captioner.broken_weights"


# --- the pipeline ---

class Counting:
    """A captioner that tells the shapes it was given; memory for `fits` pictures at once."""

    title = "Counting"

    def __init__(self, fits: int = 99, error: type[Exception] = MemoryError) -> None:
        self.fits, self.error = fits, error
        self.batches: list[int] = []
        self.threads: set[int] = set()

    def load(self) -> None: ...

    def prepare(self, image: Image.Image) -> Any:
        self.threads.add(threading.get_ident())
        return image.size

    def describe(self, batch: Sequence[Any]) -> list[Description]:
        if len(batch) > self.fits:
            raise self.error("CUDA out of memory")
        self.batches.append(len(batch))
        return [Description(sentence=str(size)) for size in batch]

    def identity(self) -> str:
        return "counting"


def told(captioner: Any, files: Sequence[Path], size: int, **more: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    describe_all(captioner, files, size, lambda p, d: found.setdefault(p.name, d.sentence),
                 more.pop("control", Control()), **more)
    return found


def test_pipeline_tells_all_in_order_and_decodes_in_threads(files: list[Path]) -> None:
    captioner = Counting()
    found = told(captioner, files, 3)
    assert list(found) == [path.name for path in files]
    assert found == {path.name: str(open_picture(path).size) for path in files}
    assert captioner.batches == [3, 3, 2]
    assert threading.get_ident() not in captioner.threads
    assert told(Counting(), [], 4) == {}


def test_unreadable_pictures_are_reported_and_the_others_go_on(files: list[Path],
                                                               tmp_path: Path) -> None:
    bad = [tmp_path / "torn.png", tmp_path / "gone.png"]
    bad[0].write_bytes(files[0].read_bytes()[:200])
    mixed = [files[0], bad[0], files[1], bad[1], files[2]]
    faults: dict[str, str] = {}
    found = told(Counting(), mixed, 2, on_fault=lambda p, f: faults.setdefault(p.name, f.code))
    assert list(found) == [path.name for path in files[:3]]
    assert set(faults) == {"torn.png", "gone.png"}
    with pytest.raises(UserError):
        told(Counting(), mixed, 2)
    assert told(Counting(), bad, 2, on_fault=lambda p, f: None) == {}


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_out_of_memory_halves_the_batch_and_goes_on(files: list[Path],
                                                    error: type[Exception]) -> None:
    captioner, halved = Counting(fits=2, error=error), []
    found = told(captioner, files, 8, on_halved=halved.append)
    assert list(found) == [path.name for path in files]
    assert halved == [4, 2]
    assert captioner.batches == [2, 2, 2, 2]
    with pytest.raises(UserError) as caught:
        told(Counting(fits=0, error=error), files, 4)
    assert caught.value.code == "captioner.out_of_memory"


def test_other_errors_are_not_taken_for_memory(files: list[Path]) -> None:
    with pytest.raises(TypeError, match="CUDA out"):
        told(Counting(fits=0, error=TypeError), files, 2)
    assert not ran_out(RuntimeError("shapes"))
    with pytest.raises(RuntimeError) as caught:     # torch's own words on the CPU
        torch.empty(2**46, dtype=torch.float64)
    assert ran_out(caught.value)


def test_stop_ends_after_the_batch_and_pause_waits(files: list[Path]) -> None:
    control = Control()
    found: list[str] = []

    def first_batch_then_stop(path: Path, _: Description) -> None:
        found.append(path.name)
        if len(found) == 2:
            control.ask("stop")
    describe_all(Counting(), files, 2, first_batch_then_stop, control)
    assert len(found) == 2
    paused = Control()
    paused.ask("pause")
    threading.Timer(0.3, paused.ask, ["go"]).start()
    assert len(told(Counting(), files, 4, control=paused)) == len(files)


def test_a_real_captioner_goes_through_the_pipeline(folder: Path, files: list[Path]) -> None:
    blip = opened(folder, beams=2)
    alone = {p.name: blip.sentences([blip.prepare(open_picture(p))])[0] for p in files}
    assert told(blip, files, 3) == alone


# --- the demo world ---

def names(sentence: str, subject: str) -> bool:
    """Word by word; a pine tree isn't just a tree."""
    words = f" {sentence.replace(',', ' ')} "
    return f" {subject} " in (words.replace(" pine tree ", " ") if subject == "tree" else words)


def test_demo_blip_names_pictures_it_never_saw() -> None:
    images, subjects = tiny.held_out()
    blip = opened("demo", max_tokens=24)
    said = blip.sentences([blip.prepare(image) for image in images])
    right = [names(text, subject) for text, subject in zip(said, subjects, strict=True)]
    assert np.mean(right) >= 0.6, np.mean(right)
    assert all(text.endswith(" style") for text in said)


def test_registry_knows_the_class() -> None:
    assert get("blip") is Blip
