"""What the user left out, and where they set the crop, is what training sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from core import families
from core.config import TrainConfig
from core.dataset import curation
from core.dataset.examples import Encoder, Examples, find
from core.jobs.control import Control
from core.weights.precision import choose
from tests import tiny


def examples_of(base: Path, folder: Path) -> Examples:
    config = TrainConfig(base_model=str(base), train_data_dir=str(folder),
                         max_resolution="32,32", max_bucket_side=32)
    precision = choose("fp32", "cpu")
    family = families.get("sd15")
    found = find(config, folder, None, 32, 8, lambda event: None)
    Encoder(family, base, precision, config, lambda event: None, Control()).fill(found)
    return found


def test_left_out_and_focus_reach_training(base: Path, tmp_path: Path) -> None:
    folder = tiny.pictures(tmp_path / "p", count=3, size=(32, 32))
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 64:] = 255                                  # a white right third
    Image.fromarray(wide).save(folder / "wide.png")
    before = examples_of(base, folder)
    curation.leave_out(folder, ["000.png"])
    curation.set_focus(folder, {"wide.png": (1.0, 0.5)})
    after = examples_of(base, folder)
    assert [i.picture.path.name for i in before.items] == [
        "000.png", "001.png", "002.png", "wide.png"]
    assert [i.picture.path.name for i in after.items] == ["001.png", "002.png", "wide.png"]
    assert after.items[-1].focus == (1.0, 0.5)
    assert not np.allclose(before.latents[-1], after.latents[-1], atol=0.01)
    same = before.latents[1:3], after.latents[:2]
    assert all(np.array_equal(a, b) for a, b in zip(*same, strict=True))
