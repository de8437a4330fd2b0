"""A sky among drawings of one style is found by the demo CLIP, which knows drawings only."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captioner.config import CaptionConfig
from captioner.outliers import find_outliers
from core import paths
from core.dataset import curation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in sorted((paths.DEMO / "pictures").glob("*.png")):
        shutil.copy(path, tmp_path)
    sky = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    Image.fromarray(sky).save(tmp_path / "sky.png")
    return tmp_path


def test_the_stranger_is_found_and_can_be_left_out(folder: Path) -> None:
    config = CaptionConfig(folder=str(folder), device="cpu")
    count, found = find_outliers(config, "style", lambda event: None)
    assert count == 21
    assert found
    assert found.level == "warning"
    assert found.subjects[0].name == "sky.png"
    curation.leave_out(folder, ["sky.png"])
    count, after = find_outliers(config, "style", lambda event: None)
    assert count == 20
    assert "sky.png" not in [one.name for one in (after.subjects if after else ())]


@pytest.mark.thorough
def test_the_command(folder: Path) -> None:
    done = subprocess.run([sys.executable, "launcher.py", "captions", "outliers", str(folder),
                           "--json"], cwd=paths.ROOT, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["compared"] == 21
    assert told["outliers"][0]["file"] == "sky.png"
