"""Pictures as a job: weights as columns, seeds as rows, stop between two, faults for bad files."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from core import draw, draw_config
from core.config import dump_yaml
from core.control import Control
from core.draw_config import DrawConfig
from core.events import Event, Sample
from core.faults import Fault


def settings(base: Path, tmp_path: Path, **more: object) -> DrawConfig:
    return DrawConfig.model_validate({"base": str(base), "prompt": "a cat", "steps": 2, "cfg": 1.0,
                                      "out": str(tmp_path / "out"), "device": "cpu", **more})


def test_one_picture_a_seed(base: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    result = draw.draw(settings(base, tmp_path, count=2, seed=5), told.append, Control())
    samples = [event for event in told if isinstance(event, Sample)]
    assert result["state"] == "done"
    assert [sample.seed for sample in samples] == [5, 6]
    assert result["files"] == [sample.path for sample in samples]
    for file in result["files"]:
        with Image.open(file) as image:
            assert "Seed: " in image.text["parameters"]


def test_a_stop_comes_between_two_pictures(base: Path, tmp_path: Path) -> None:
    control = Control()

    def emit(event: Event) -> None:
        if isinstance(event, Sample):
            control.ask("stop")
    result = draw.draw(settings(base, tmp_path, count=5), emit, control)
    assert (result["state"], len(result["files"])) == ("stopped", 1)


def test_the_config_comes_back_from_its_file(base: Path, tmp_path: Path) -> None:
    config = settings(base, tmp_path, weights=[0.0, 0.8], loras=["x:0.8"], size=[64, 32])
    (tmp_path / "config.yaml").write_text(dump_yaml(config), "utf-8")
    assert draw_config.load(tmp_path / "config.yaml") == config
    (tmp_path / "config.yaml").write_text("base: x\nsteps: many\n")
    with pytest.raises(Fault) as caught:
        draw_config.load(tmp_path / "config.yaml")
    assert caught.value.params["line"] == 2


def test_weights_are_columns(tmp_path: Path) -> None:
    from core.generate import Lora
    loras = [Lora(tmp_path / "a", 0.8), Lora(tmp_path / "b", 0.3)]
    config = DrawConfig(base="x", weights=[0.0, 1.0])
    columns = draw._columns(config, loras)
    assert [[one.weight for one in column] for column in columns] == [[0.0, 0.3], [1.0, 0.3]]
    assert draw._columns(config, []) == [[]]
    assert draw._columns(DrawConfig(base="x"), loras) == [loras]
