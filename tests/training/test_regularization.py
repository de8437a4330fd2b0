from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core import families
from core.config import TrainConfig
from core.dataset import captions
from core.dataset.checks.image_stats import Stopped
from core.dataset.examples import Encoder, Examples, find
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Event, Phase
from core.training import regularization
from core.training.trainer import Trainer
from core.weights.precision import choose
from tests import tiny


def config_of(base: Path, tmp_path: Path, **more: object) -> TrainConfig:
    folder = tiny.pictures(tmp_path / "p", 3)
    return TrainConfig.model_validate({
        "base_model": str(base), "train_data_dir": str(folder), "trigger_word": "ink style",
        "lora_rank": 2, "batch_size": 4, "sample_inference_steps": 1, "sample_cfg": 1.0,
        "max_train_steps": 2} | more)


def added(config: TrainConfig, control: Control | None = None) -> tuple[Examples, list[Event]]:
    events: list[Event] = []
    family, precision = families.get("sd15"), choose("fp32", "cpu")
    parts = family.load(Path(config.base_model), precision, frozenset())
    examples = find(config, Path(config.train_data_dir), None, parts.native_size,
                    parts.bucket_step, events.append)
    regularization.add(config, examples, family, parts, precision, events.append,
                       control or Control())
    return examples, events


def test_the_base_draws_them_once_without_the_trigger(base: Path, tmp_path: Path) -> None:
    config = config_of(base, tmp_path, reg_from_base=4)
    examples, events = added(config)
    assert examples.trained() == [0, 1, 2]
    assert sorted(examples.regular) == [3, 4, 5, 6]
    own = [examples.items[i] for i in range(3)]
    for n, item in enumerate(examples.items[3:]):
        assert item.bucket == own[n % 3].bucket
        assert item.captions == (own[n % 3].picture.caption,)
        assert "ink style" not in item.captions[0]
        assert Image.open(item.picture.path).size == item.bucket
    assert [e.done for e in events if isinstance(e, Phase) and e.name == "regular"] == [1, 2, 3, 4]
    again, events = added(config)
    assert not [e for e in events if isinstance(e, Phase) and e.name == "regular"]
    assert [i.picture.path for i in again.items] == [i.picture.path for i in examples.items]
    gone = again.items[4].picture.path
    before = gone.read_bytes()
    gone.unlink()                           # as an interrupted run leaves it
    added(config)
    assert gone.read_bytes() == before


def test_a_stop_while_drawing_is_honoured(base: Path, tmp_path: Path) -> None:
    control = Control()
    control.ask("stop")
    with pytest.raises(Stopped):
        added(config_of(base, tmp_path, reg_from_base=4), control)


def test_a_folder_with_captions_of_its_own(base: Path, tmp_path: Path) -> None:
    other = tiny.pictures(tmp_path / "reg", 2)
    examples, _ = added(config_of(base, tmp_path, reg_data_dir=str(other)))
    assert [examples.items[i].captions[0] for i in sorted(examples.regular)] == [
        "red disc, flat, number 0", "green disc, flat, number 1"]
    assert examples.items[0].captions[0].startswith("ink style, ")


def test_drawing_needs_a_trigger(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trigger_word"):
        added(config_of(base, tmp_path, reg_from_base=1, trigger_word=""))


def test_their_weight_scales_their_gradient(base: Path, tmp_path: Path) -> None:
    """The gradient is linear in prior_loss_weight; at 0 only the pictures teach."""
    other = tiny.pictures(tmp_path / "reg", 2)

    def gradient(weight: float) -> torch.Tensor:
        config = config_of(base, tmp_path, reg_data_dir=str(other), prior_loss_weight=weight)
        examples, _ = added(config)
        family, precision = families.get("sd15"), choose("fp32", "cpu")
        source = Path(config.base_model)
        Encoder(family, source, precision, config, lambda e: None, Control()).fill(examples)
        parts = family.load(source, precision)
        trainer = Trainer(config, family, parts, precision, examples, lambda e: None, Control())
        trainer.accumulate([b for n in range(2) for b in trainer.sampler.update(n)])
        return torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])
    none, one, two = gradient(0.0), gradient(1.0), gradient(2.0)
    assert not torch.equal(none, one)
    torch.testing.assert_close(two - none, 2 * (one - none), rtol=1e-3, atol=1e-6)


@given(st.text(alphabet="ab ,猫", max_size=20), st.text(alphabet="ab ", min_size=1, max_size=5))
def test_without_undoes_with_trigger(caption: str, trigger: str) -> None:
    plain = captions.without_trigger(caption, trigger)
    if trigger.strip():
        assert not captions.phrase(trigger).search(plain)
        assert captions.without_trigger(captions.with_trigger(plain, trigger), trigger) == plain
    else:
        assert plain == caption


def test_without_trigger_joins_neatly() -> None:
    assert captions.without_trigger("a banana, duskprint style", "duskprint style") == "a banana"
    assert captions.without_trigger("Ohwx, a dog", "ohwx") == "a dog"
    assert captions.without_trigger("photo of  ohwx dog", "ohwx") == "photo of dog"
    assert captions.without_trigger("ohwxen", "ohwx") == "ohwxen"
