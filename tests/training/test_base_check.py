"""The base shows by its errors whether it is what it is taken for. On the demo base, whose right
objective (v, zero terminal SNR) is known, and on tiny random ones, which know nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from core import families, paths
from core.cli.progress import summary
from core.config import GenerateConfig, TrainConfig
from core.config.draw import DrawConfig
from core.errors import UserError
from core.inference.draw import draw
from core.inference.generate import PipelineSession, SampleRequest
from core.jobs.control import Control
from core.jobs.events import Event, Note
from core.safetensors_header import read_header
from core.training.run import train
from tests import tiny
from tests.tiny import families as tiny_families

# Bases that load as files do: one that says nothing of what it predicts, and is taken for noise's.
UNMARKED = '''
from dataclasses import replace
from core import paths
from core.families.base import ALL_PARTS
from core.families.sd15.model import StableDiffusion1

DEMO = paths.DEMO / "base"

class Unmarked(StableDiffusion1):
    def load(self, source, precision, only=ALL_PARTS):
        parts = super().load(DEMO, precision, only)
        parts.source, parts.objective = source, "epsilon"
        return parts
    def skeleton(self, source, precision, only=ALL_PARTS):
        return super().skeleton(DEMO, precision, only)
    def beside(self, source):
        return super().beside(DEMO)
    def weight_files(self, source, part):
        return super().weight_files(DEMO, part)
'''


@pytest.fixture(scope="session")
def own_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that the demo base draws itself: what it knows best."""
    folder = tmp_path_factory.mktemp("own")
    studio = PipelineSession(paths.DEMO / "base", GenerateConfig(base=str(paths.DEMO / "base")),
                             lambda _: None)
    studio.load()
    for i, subject in enumerate(("an apple", "a red car", "a cat", "a house", "a star")):
        studio.draw(SampleRequest(subject, "", i, 12, 2.0, (64, 64))).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(subject, "utf-8")
    return folder


def checked(config: TrainConfig) -> tuple[dict[str, Any], list[Note]]:
    """A real run that is stopped by the first word of its base -> what was found, the notes."""
    notes: list[Note] = []
    control = Control()

    def listen(event: Event) -> None:
        if isinstance(event, Note) and event.key.startswith("base_check."):
            notes.append(event)
            control.ask("stop")
    result = train(config, listen, control)
    assert result["state"] == "stopped"
    return result["base"], notes


def config(pictures: Path, out: Path, **more: Any) -> TrainConfig:
    return TrainConfig(**{"base_model": "demo", "train_data_dir": str(pictures), "device": "cpu",
                          "output_dir": str(out), "max_train_steps": 2, "lora_rank": 2} | more)


def test_the_right_base_fits(own_pictures: Path, tmp_path: Path) -> None:
    found, [note] = checked(config(own_pictures, tmp_path))
    assert found["verdict"] == "fits"
    assert found["prediction"] == "v_prediction"
    assert found["error"] < 0.3 < 1 < found["other_error"]
    assert note.key == "base_check.fits"
    assert f"{found['error']:.2f}" in "".join(summary({"base": found}))


def test_the_wrong_prediction_is_worse_than_guessing(own_pictures: Path, tmp_path: Path) -> None:
    found, [note] = checked(config(own_pictures, tmp_path, prediction_type="epsilon"))
    assert found["verdict"] == "wrong"
    assert found["error"] > 1
    assert note.key == "base_check.predicts_other"
    assert note.params["other"] == "v_prediction"


def test_a_style_that_the_base_never_saw_is_a_caution(tmp_path: Path) -> None:
    base = shutil.copytree(paths.DEMO / "base", tmp_path / "base")
    found, [note] = checked(config(paths.DEMO / "pictures", tmp_path / "out",
                                   base_model=str(base)))
    assert found["verdict"] == "near"
    assert note.key == "base_check.near"


def test_the_built_in_base_is_right_whatever_the_pictures_are(tmp_path: Path) -> None:
    """It ships with the program: the demo, and a first try on pictures of one's own, alarm
    nobody."""
    for pictures in (paths.DEMO / "pictures", tiny.pictures(tmp_path / "p")):
        found, [note] = checked(config(pictures, tmp_path / "out"))
        assert found["error"] > 0.8
        assert (found["verdict"], note.key) == ("new", "base_check.new")
        assert "".join(summary({"base": found}))


def test_a_prediction_that_is_no_better_is_not_advised(tmp_path: Path) -> None:
    """Heaps of loud ellipses, which are beyond the demo base either way."""
    base, dice = shutil.copytree(paths.DEMO / "base", tmp_path / "base"), Random(0)
    folder = tmp_path / "p"
    folder.mkdir()
    for i in range(5):
        picture = Image.new("RGB", (96, 96))
        for _ in range(60):
            x, y, w, h = (dice.randrange(96) for _ in range(4))
            ImageDraw.Draw(picture).ellipse((x, y, x + w // 3, y + h // 3),
                                            tuple(dice.randbytes(3)))
        picture.save(folder / f"{i}.png")
    found, [note] = checked(config(folder, tmp_path / "out", base_model=str(base)))
    assert min(found["error"], found["other_error"]) > 1
    assert note.key == "base_check.wrong_parts"


def test_a_wrong_vae_is_seen(own_pictures: Path, tmp_path: Path) -> None:
    """Of the same shapes: latents that the base never learned."""
    base = shutil.copytree(paths.DEMO / "base", tmp_path / "base")
    vae = AutoencoderKL.from_pretrained(base / "vae")
    torch.manual_seed(0)
    for weight in vae.encoder.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.1)
    vae.save_pretrained(base / "vae")
    found, _ = checked(config(own_pictures, tmp_path / "out", base_model=str(base)))
    assert found["verdict"] != "fits"
    assert found["error"] > 0.8


@pytest.mark.parametrize("family", ["sd3", "zimage"])
def test_a_flow_that_knows_nothing_is_worse_than_guessing(family: str, tmp_path: Path) -> None:
    base = tiny_families.base(family, tmp_path / "base")
    found, [note] = checked(config(tiny.pictures(tmp_path / "p"), tmp_path / "out",
                                   base_model=str(base), target_modules="attention"))
    assert found["prediction"] == "flow"
    assert "other_error" not in found
    assert (found["verdict"] == "wrong") == (found["error"] > 1) == (
        note.key == "base_check.wrong_parts")


def test_an_unmarked_file_is_taken_for_what_fits(own_pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "unmarked.py").write_text(UNMARKED, "utf-8")
    file = tiny.tiny_lora(tmp_path / "base.safetensors")
    options = {"base_model": str(file), "family": f"{tmp_path / 'unmarked.py'}:Unmarked"}
    found, notes = checked(config(own_pictures, tmp_path / "out", **options))
    assert [note.key for note in notes] == ["base_check.taken_for_other", "base_check.fits"]
    assert found["verdict"] == "fits"
    assert found["prediction"] == "v_prediction"
    # the user's word counts more: the run goes on as told, and is warned
    found, [note] = checked(config(own_pictures, tmp_path / "out", prediction_type="epsilon",
                                   **options))
    assert found["prediction"] == "epsilon"
    assert note.key == "base_check.predicts_other"


def drawn(tmp_path: Path, **more: Any) -> tuple[bytes, list[str]]:
    """One small picture, and the keys of what is told."""
    told: list[str] = []
    options = {"prompt": "an apple", "steps": 2, "cfg": 1.5, "size": "64,64", "device": "cpu",
               "out": str(tmp_path / "drawn")} | more
    files = draw(DrawConfig(**options), lambda event: told.append(event.key) if isinstance(
        event, Note) else None, Control())["files"]
    with Image.open(files[0]) as picture:
        return picture.tobytes(), told


def test_a_base_is_drawn_as_its_loras_were_trained_on_it(own_pictures: Path, tmp_path: Path
                                                         ) -> None:
    (tmp_path / "unmarked.py").write_text(UNMARKED, "utf-8")
    base = str(tiny.tiny_lora(tmp_path / "base.safetensors"))
    family = f"{tmp_path / 'unmarked.py'}:Unmarked"
    file = train(config(own_pictures, tmp_path / "out", base_model=base, family=family),
                 lambda event: None, Control())["lora"]
    by_itself, _ = drawn(tmp_path, base=base, family=family)
    right, told = drawn(tmp_path, base=base, family=family, prediction_type="v_prediction")
    assert by_itself != right
    assert "generate.prediction" not in told
    picture, told = drawn(tmp_path, base=base, family=family, loras=[f"{file}:0"])
    assert picture == right
    assert "generate.prediction" in told
    # what the user says counts more, and what that means for the LoRA is told
    picture, told = drawn(tmp_path, base=base, family=family, loras=[f"{file}:0"],
                          prediction_type="epsilon")
    assert picture == by_itself
    assert "generate.other_prediction" in told


@pytest.mark.parametrize(("prediction", "told"), [
    ("epsilon", "stable-diffusion-v2-512/lora"),
    ("v_prediction", "stable-diffusion-v2-768-v/lora")])
def test_what_was_learned_is_what_the_file_says(prediction: str, told: str, tmp_path: Path
                                                ) -> None:
    base = tiny_families.base("sd2", tmp_path / "base")
    file = train(config(tiny.pictures(tmp_path / "p", count=2), tmp_path / "out",
                        base_model=str(base), prediction_type=prediction),
                 lambda event: None, Control())["lora"]
    metadata = read_header(Path(file)).metadata
    assert metadata["modelspec.architecture"] == told
    assert metadata["modelspec.prediction_type"] == prediction[0].replace("e", "epsilon")


def test_another_base_is_drawn_as_it_is(tmp_path: Path) -> None:
    pictures = tiny.pictures(tmp_path / "p", count=2)
    bases = [str(tiny.tiny_base(tmp_path / kind, kind)) for kind in ("epsilon", "v_prediction")]
    file = tmp_path / "epsilon" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: one * 1.01 for name, one in load_file(file).items()}, file, {"format": "pt"})
    file = train(config(pictures, tmp_path / "out", base_model=bases[1], zero_terminal_snr=True),
                 lambda event: None, Control())["lora"]
    plain, _ = drawn(tmp_path, base=bases[0])
    picture, told = drawn(tmp_path, base=bases[0], loras=[f"{file}:0"])
    assert picture == plain
    assert "generate.other_prediction" in told
    plain, _ = drawn(tmp_path, base=bases[1])
    picture, told = drawn(tmp_path, base=bases[1], loras=[f"{file}:0"])
    assert picture != plain
    assert "generate.zero_snr" in told


def test_regularisation_pictures_of_the_wrong_prediction_are_not_learned(
        own_pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "unmarked.py").write_text(UNMARKED, "utf-8")
    apple = tmp_path / "apple"
    apple.mkdir()
    for name in ("0.png", "0.txt"):
        shutil.copy(own_pictures / name, apple)
    options = {"base_model": str(tiny.tiny_lora(tmp_path / "base.safetensors")),
               "family": f"{tmp_path / 'unmarked.py'}:Unmarked", "trigger_word": "an apple",
               "reg_from_base": 1, "sample_inference_steps": 2, "max_resolution": 64}
    with pytest.raises(UserError) as caught:
        train(config(apple, tmp_path / "out", **options), lambda event: None, Control())
    assert caught.value.code == "base_check.regular_of_other"
    before = set(paths.cache_dir().glob("regular/*"))
    found, _ = checked(config(apple, tmp_path / "out", **options).with_changes(
        **caught.value.fixes[0].changes))
    assert found["verdict"] == "fits"
    assert len(set(paths.cache_dir().glob("regular/*")) - before) == 1      # drawn anew


def test_five_forward_passes(own_pictures: Path, tmp_path: Path,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    family = type(families.get("sd15"))
    predict = family.predict

    def counted(*inputs: Any) -> Any:
        if not inputs[2].is_meta:           # the noisy latents; plans ask on the meta device
            passes.append(len(inputs[2]))
        return predict(*inputs)
    monkeypatch.setattr(family, "predict", counted)
    checked(config(own_pictures, tmp_path))
    assert passes == [1] * 5


def test_a_lora_that_the_run_begins_with_is_off(base: Path, tmp_path: Path) -> None:
    names = ["attn1.to_q", "attn1.to_out.0"]
    start = tiny.tiny_lora(tmp_path / "start.safetensors")
    pictures = tiny.pictures(tmp_path / "p")
    options = {"base_model": str(base), "target_modules": [
        f"mid_block.attentions.0.transformer_blocks.0.{name}" for name in names]}
    plain, _ = checked(config(pictures, tmp_path / "a", **options))
    begun, _ = checked(config(pictures, tmp_path / "b", init_lora_weights=str(start), **options))
    assert begun == plain


def test_a_check_that_memory_does_not_suffice_for_is_left_out(
        base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own steps have ways to go on with less."""
    family = type(families.get("sd15"))
    predict, left = family.predict, [1]

    def short(*inputs: Any) -> Any:
        if left and not inputs[2].is_meta and left.pop():     # the plan asks before
            raise MemoryError
        return predict(*inputs)
    monkeypatch.setattr(family, "predict", short)
    result = train(config(tiny.pictures(tmp_path / "p"), tmp_path / "out", base_model=str(base),
                          max_train_steps=1), lambda _: None, Control())
    assert result["state"] == "done"
    assert result["base"] is None
    assert not left
