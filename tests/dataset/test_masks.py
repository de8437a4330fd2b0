from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import TrainConfig
from core.dataset import image_folder, masks
from core.jobs.events import Note
from tests import tiny
from tests.dataset.test_examples import prepared
from tests.training.test_trainer import trainer_of


def half(path: Path, size: tuple[int, int] = (48, 48)) -> Path:
    """White on the left, black on the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size, 0)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    image.save(path)
    return path


@pytest.mark.parametrize("name", ["000.mask.png", "000-masklabel.png", "masks/000.png",
                                  "mask/000.webp"])
def test_masks_are_found_and_are_no_pictures(tmp_path: Path, name: str) -> None:
    folder = tiny.pictures(tmp_path / "p", 2)
    made = half(folder / name)
    assert masks.find(folder / "000.png", folder) == made
    assert masks.find(folder / "001.png", folder) is None
    assert [p.path.name for p in image_folder.scan(folder).pictures] == ["000.png", "001.png"]


def test_one_masks_folder_serves_the_folders_below(tmp_path: Path) -> None:
    tiny.pictures(tmp_path / "10_ink", 1)
    made = half(tmp_path / "masks/10_ink/000.png")
    assert masks.find(tmp_path / "10_ink/000.png", tmp_path) == made


def test_a_mask_is_cut_as_its_picture_whatever_its_own_size(tmp_path: Path) -> None:
    """A wide picture loses its sides; a mask at half its size loses the same."""
    focus = (0.25, 0.5)
    whole = masks.fit(half(tmp_path / "a.png", (128, 32)), (128, 32), (32, 32), focus)
    small = masks.fit(half(tmp_path / "b.png", (64, 16)), (128, 32), (32, 32), focus)
    assert whole.shape == (32, 32)
    assert (whole == 255).all()             # about x = 32 of 128: the white half alone
    assert (small > 250).all()
    right = masks.fit(tmp_path / "a.png", (128, 32), (32, 32), (0.75, 0.5))
    assert (right == 0).all()
    assert (masks.fit(None, (128, 32), (32, 32), None) == 255).all()


def config_of(base: Path, folder: Path, **more: object) -> TrainConfig:
    return TrainConfig.model_validate({
        "base_model": str(base), "train_data_dir": str(folder), "masked_loss": True,
        "lora_rank": 2, "batch_size": 2, "max_train_steps": 2, "output_dir": "x"} | more)


def test_masks_lie_with_the_latents_and_are_mirrored_with_them(base: Path, tmp_path: Path) -> None:
    folder = tiny.pictures(tmp_path / "p", 2)
    half(folder / "000.mask.png")
    picture = Image.open(folder / "001.png").convert("RGBA")
    picture.putalpha(Image.open(folder / "000.mask.png").rotate(90))    # white below
    picture.save(folder / "001.png")
    config = config_of(base, folder, flip=True)
    for _ in range(2):                      # made, then read from the cache
        examples, events = prepared(config)
        assert [n.params for n in events if isinstance(n, Note) and n.key == "engine.masks"] == [
            {"masks": 2, "pictures": 2}]
        first, mirrored = examples.latents[0][:, -1]
        assert examples.latents[0].shape == (2, 5, 8, 8)
        assert (first[:, :3] == 1).all()
        assert (first[:, 5:] == 0).all()
        torch.testing.assert_close(mirrored, first.flip(1))
        below = examples.latents[1][0, -1]
        assert (below[5:] == 1).all()
        assert (below[:3] == 0).all()
    plain, _ = prepared(config.with_changes(masked_loss=False))
    assert torch.equal(plain.latents[0], examples.latents[0][:, :-1])
    black = Image.fromarray(255 - np.asarray(Image.open(folder / "000.mask.png")))
    black.save(folder / "000.mask.png")
    changed, _ = prepared(config)
    assert (changed.latents[0][0, -1][:, :3] == 0).all()


def test_the_step_learns_from_what_is_white(base: Path, tmp_path: Path) -> None:
    """All black with weight 0: no gradient; all white: the unmasked one."""
    folder = tiny.pictures(tmp_path / "p", 2)
    gradients = {}
    for value in (0, 255, None):
        for name in ("000", "001"):
            path = folder / f"{name}.mask.png"
            if value is None:
                path.unlink()
            else:
                Image.new("L", (48, 48), value).save(path)
        trainer = trainer_of(config_of(base, folder, masked_loss=value is not None))
        trainer.accumulate(trainer.sampler.update(0))
        gradients[value] = torch.cat([p.grad.flatten() for p in trainer.parameters
                                      if p.grad is not None])
    assert (gradients[0] == 0).all()
    assert torch.equal(gradients[255], gradients[None])
    assert gradients[None].norm() > 0
