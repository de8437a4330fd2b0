"""The whole way with the built-in captioners, and what a captioner may say of single pictures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from captioner import job, pipeline
from captioner.base import Description, Tag
from captioner.config import CaptionConfig
from core import paths
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Event, Note


def test_clip_and_blip_together_name_the_demo_pictures(tmp_path: Path) -> None:
    """The dusk prints, in inks that neither saw: BLIP names 60 % of them, CLIP all."""
    subjects = {}
    for path in sorted((paths.DEMO / "pictures").glob("*.png"))[:8]:
        shutil.copy(path, tmp_path)
        subjects[path.name] = path.stem.split("-", 1)[1].replace("-", " ")
    events: list[Event] = []
    config = CaptionConfig(folder=str(tmp_path), captioner="clip+blip", trigger_word="duskprint",
                           device="cpu")
    result = job.caption(config, events.append, Control())
    assert result["captioned"] == 8
    assert "captioner.demo_only" in [e.key for e in events if isinstance(e, Note)]
    texts = {name: (tmp_path / name).with_suffix(".txt").read_text("utf-8") for name in subjects}
    assert all(text.startswith("duskprint") for text in texts.values())
    named = [subjects[name] in text for name, text in texts.items()]
    assert sum(named) >= 7, texts
    assert job.caption(config, events.append, Control())["kept"] == 8


class Choosy:
    """Refuses dark pictures, and says what it was told of the others."""

    title: ClassVar[str] = "Choosy"
    of_one_picture: ClassVar[frozenset[str]] = frozenset({"endpoint.refused"})

    def __init__(self, config: CaptionConfig) -> None:
        self.calls: list[int] = []

    def load(self) -> None: ...

    def prepare(self, image: Image.Image) -> tuple[int, str]:
        return sum(image.getpixel((0, 0))), image.info[pipeline.CONTEXT]["caption"]

    def describe(self, batch: Sequence[Any]) -> list[Description]:
        self.calls.append(len(batch))
        if any(light < 100 for light, _ in batch):
            raise UserError("endpoint.refused", answer="too dark")
        return [Description(sentence=f"was {known}") for _, known in batch]

    def identity(self) -> str:
        return "choosy"


def pictures(folder: Path, greys: Sequence[int]) -> list[Path]:
    files = []
    for i, grey in enumerate(greys):
        files.append(folder / f"{i}.png")
        Image.new("RGB", (8, 8), (grey,) * 3).save(files[-1])
    return files


def test_a_refused_picture_does_not_end_the_job(tmp_path: Path) -> None:
    files = pictures(tmp_path, [200, 0, 220, 240])
    said: dict[str, str] = {}
    refused: list[tuple[str, str]] = []
    captioner = Choosy(CaptionConfig(folder=str(tmp_path)))
    pipeline.describe_all(
        captioner, files, 4, lambda path, d: said.__setitem__(path.stem, d.sentence), Control(),
        on_fault=lambda path, fault: refused.append((path.stem, fault.code)),
        about=lambda path: {"caption": f"number {path.stem}"})
    assert said == {"0": "was number 0", "2": "was number 2", "3": "was number 3"}
    assert refused == [("1", "endpoint.refused")]
    assert captioner.calls == [4, 1, 1, 1, 1]


def test_together_with_one_that_answers_by_picture(tmp_path: Path) -> None:
    """A picture is told when both have described it; a fault of one is the picture's alone."""
    class Single(Choosy):
        def describe(self, batch: Sequence[Any]) -> list[Description]:
            return [Description(tags=(Tag(f"light {light}", 1.0),)) for light, _ in batch]

    class Each(Choosy):
        def each(self, batch: Sequence[Any]) -> Iterator[tuple[int, Description | UserError]]:
            for place in reversed(range(len(batch))):
                light, _ = batch[place]
                yield place, (Description(f"grey of {light}") if light > 100
                              else UserError("endpoint.refused", answer="too dark"))

    config = CaptionConfig(folder=str(tmp_path))
    together = job.Together([Each(config), Single(config)])
    said: list[tuple[str, str, str]] = []
    refused: list[str] = []
    pipeline.describe_all(
        together, pictures(tmp_path, [200, 0, 220]), 3, lambda path, d: said.append(
            (path.stem, d.sentence, d.tags[0].name)), Control(),
        on_fault=lambda path, fault: refused.append(path.stem),
        about=lambda path: {"caption": ""})
    assert said == [("2", "grey of 660", "light 660"), ("0", "grey of 600", "light 600")]
    assert refused == ["1"]
    with pytest.raises(UserError, match="too dark"):
        together.describe([((0, ""), (0, ""))])
    assert [d.sentence for d in together.describe([((300, ""),) * 2, ((400, ""),) * 2])] == [
        "grey of 300", "grey of 400"]


def test_other_faults_do(tmp_path: Path) -> None:
    captioner = Choosy(CaptionConfig(folder=str(tmp_path)))
    captioner.of_one_picture = frozenset()              # type: ignore[misc]
    with pytest.raises(UserError, match="too dark"):
        pipeline.describe_all(captioner, pictures(tmp_path, [0, 200]), 2, lambda p, d: None,
                              Control(), on_fault=lambda p, f: None,
                              about=lambda path: {"caption": ""})
