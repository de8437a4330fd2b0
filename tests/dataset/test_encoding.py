"""What goes into latents and embeddings, and what the cache tells apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core.dataset import curation
from core.dataset.examples import Encoder, Examples
from core.dataset.text_embeddings import trimmed
from core.jobs.control import Control
from core.training import regularization
from tests import tiny
from tests.keys.lab import Lab


def filled(lab: Lab, found: Examples, **changes: Any) -> Examples:
    config = lab.config(**changes)
    family, precision, _ = lab.parts(config.precision)
    Encoder(family, lab.base, precision, config, lambda event: None, Control()).fill(found)
    return found


def test_a_mask_is_cut_where_its_picture_is(lab: Lab) -> None:
    """White on the left half of a wide picture, which is cut about its left or right end."""
    folder = tiny.pictures(lab.folder / "wide-masked", 1, (96, 32))
    half = Image.new("L", (96, 32), 0)
    half.paste(255, (0, 0, 48, 32))
    half.save(folder / "000.mask.png")
    for point, white in ((0.0, 0.75), (1.0, 0.25)):         # of the 32 px kept of 48
        curation.set_focus(folder, {"000.png": (point, 0.5)})
        latents, = lab.examples(train_data_dir=str(folder), masked_loss=True,
                                max_bucket_side=32).latents
        assert float(latents[-1].mean()) == pytest.approx(white, abs=0.01)


def test_a_point_set_by_hand_counts_before_the_subject(lab: Lab) -> None:
    folder = lab.folder / "by-hand"
    folder.mkdir()
    image = Image.new("RGB", (256, 32), "white")
    image.paste((200, 30, 30), (216, 4, 248, 28))
    image.save(folder / "a.png")
    options = {"train_data_dir": str(folder), "max_bucket_side": 32, "crop_about": "subject"}
    assert lab.found(**options).items[0].frame().left_top[0] > 0
    curation.set_focus(folder, {"a.png": (0.0, 0.5)})
    assert lab.found(**options).items[0].frame().left_top[0] == 0


def test_held_out_and_regular_pictures_stay_so_when_others_go(lab: Lab) -> None:
    folder = tiny.pictures(lab.folder / "going", 6)
    options = {"train_data_dir": str(folder), "validation_split": 0.4}
    found = lab.found(**options)
    found.regular = frozenset(sorted(set(range(6)) - found.held_out)[-1:])

    def names(numbers: frozenset[int]) -> set[str]:
        return {found.items[i].picture.path.name for i in numbers}
    held, regular = names(found.held_out), names(found.regular)
    gone = next(item.picture.path for i, item in enumerate(found.items)
                if i not in found.held_out | found.regular)
    gone.unlink()
    filled(lab, found, **options)
    assert len(found.items) == len(found.latents) == 5
    assert (names(found.held_out), names(found.regular)) == (held, regular)


def test_texts_are_kept_without_their_padding() -> None:
    one = {"text": torch.arange(10.0).view(1, 5, 2), "mask": torch.tensor([[1, 1, 1, 0, 0]]),
           "pooled": torch.ones(1, 4)}
    kept = trimmed(one)
    assert torch.equal(kept["text"], one["text"][:, :3])
    assert kept["mask"].tolist() == [[1, 1, 1]]
    assert torch.equal(kept["pooled"], one["pooled"])
    empty = trimmed(one | {"mask": torch.zeros(1, 5, dtype=torch.int64)})
    assert empty["text"].shape == (1, 1, 2)                 # no network takes none at all


def test_a_second_run_takes_the_same_latents_from_the_disk(lab: Lab) -> None:
    """Both views, each as its own."""
    first, second = (lab.examples(flip=True).latents for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(*one) for one in second)


def test_other_numbers_are_encoded_again(lab: Lab) -> None:
    exact, rounded = (lab.examples(precision=name) for name in ("fp32", "bf16"))
    assert {one["text"].dtype for one in exact.texts.values()} == {torch.float32}
    assert {one["text"].dtype for one in rounded.texts.values()} == {torch.bfloat16}
    for a, b in zip(exact.latents, rounded.latents, strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05)


def test_drawn_pictures_have_no_trigger_in_their_prompts(lab: Lab) -> None:
    """The captions of the pictures that train, in turn; each in its bucket, by its own seed."""
    folder = tiny.pictures(lab.folder / "drawn-from", 3, (96, 32))
    for path in folder.glob("*.txt"):       # the trigger may stand in the files themselves
        path.write_text(f"ink, {path.read_text('utf-8')}", "utf-8")
    options = {"train_data_dir": str(folder), "trigger_word": "ink", "reg_from_base": 5,
               "validation_split": 0.3, "sample_inference_steps": 7, "sample_cfg": 2.0}
    config, found = lab.config(**options), lab.found(**options)
    shots = regularization.shots(config, found)
    plain = [found.items[i].captions[0].removeprefix("ink, ") for i in found.trained()]
    assert len(plain) == 2
    assert [shot.prompt for shot in shots] == (plain * 3)[:5]
    assert [shot.seed for shot in shots] == [42, 43, 44, 45, 46]
    assert {shot.size for shot in shots} == {found.items[0].bucket} == {(48, 16)}
    assert {(shot.steps, shot.cfg) for shot in shots} == {(7, 2.0)}


@pytest.mark.parametrize("kind", ["P", "LA", "I;16"])
def test_pictures_of_other_modes_are_encoded_as_they_look(lab: Lab, kind: str) -> None:
    folder, plain = (lab.folder / f"{name}-{kind[0]}" for name in ("mode", "rgb"))
    grey = Image.linear_gradient("L").resize((32, 32))
    deep = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    made = deep if kind == "I;16" else grey.convert(kind)
    for place, image in ((folder, made), (plain, grey.convert("RGB"))):
        Path(place).mkdir()
        image.save(place / "a.png")
    found, wanted = (lab.examples(train_data_dir=str(place)).latents[0]
                     for place in (folder, plain))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
