"""What is said before a run starts: settings that can't act, and a course that can't end well."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import TrainConfig
from core.memory import course
from core.workspace import presets

# Each key with a value of its own, and what must stand beside it so that it acts.
PAIRS: dict[str, tuple[Any, dict[str, Any]]] = {
    "keep_tokens": (1, {"shuffle_tags": True}),
    "lr_cycles": (3, {"lr_scheduler": "cosine_with_restarts"}),
    "lr_power": (2, {"lr_scheduler": "polynomial"}),
    "lr_decay_share": (0.5, {"lr_scheduler": "warmup_stable_decay"}),
    "conv_alpha": (2, {"conv_rank": 4}),
    "multires_noise_discount": (0.5, {"multires_noise_iterations": 6}),
    "huber_c": (0.3, {"loss_type": "smooth_l1"}), "huber_schedule": ("constant",
                                                                     {"loss_type": "huber"}),
    "unmasked_weight": (0.1, {"masked_loss": True}), "reg_share": (0.3, {"reg_data_dir": "x"}),
    "prior_loss_weight": (0.5, {"reg_from_base": 4}),
    "text_encoder_rank": (4, {"text_encoder_lr": 1e-5}),
    "text_encoder_stop": (5, {"pivotal_tokens": 2}), "pivotal_lr": (1e-2, {"pivotal_tokens": 2}),
    "pivotal_init": ("cat", {"pivotal_tokens": 2}), "init_lora_resize": (
        True, {"init_lora_weights": "x"}),
    "validation_steps": (5, {"validation_split": 0.2}), "sample_every": (
        5, {"sample_prompts": ["a"]}),
    "sample_size": ("64,64", {"sample_prompts": ["a"]}),
    "sample_weight": (1.0, {"sample_prompts": ["a"]}), "sample_cfg": (5, {"reg_from_base": 4}),
    "sample_inference_steps": (5, {"reg_from_base": 4}),
    "sample_sampler": ("euler", {"sample_prompts": ["a"]}),
    "base_loras_in_previews": (True, {"base_loras": ["x"]})}
MANY = ["inkring style, a red apple, on a table"] * 20


def said(captions: list[str] | None = None, **changes: Any) -> dict[str, dict[str, Any]]:
    texts = MANY if captions is None else captions
    config = TrainConfig.model_validate({"epochs": 100} | changes)
    return {reason.key.removeprefix("advisor."): dict(reason.params)
            for reason in course.remarks(config, [1] * len(texts), texts)}


def test_each_key_has_a_pair() -> None:
    assert PAIRS.keys() == {key for keys in course.NEEDS.values() for key in keys}
    for needs in course.NEEDS:
        assert {one.partition(":")[0] for one in needs.split(" / ")} <= set(
            TrainConfig.model_fields)


@pytest.mark.parametrize("key", PAIRS)
def test_a_setting_that_cant_act_is_told(key: str) -> None:
    value, beside = PAIRS[key]
    assert said(**{key: value})["idle"]["key"] == key
    assert said(**beside).get("idle", {}).get("key") is None
    assert said(**{key: value}, **beside) == {}


def test_nothing_is_said_of_what_is_usual() -> None:
    assert said() == {}
    for preset in presets.list_presets():
        config = TrainConfig.model_validate({"base_model": "x", **preset.set})
        assert [reason.params for reason in course.remarks(config, [1] * 20, MANY)
                if reason.key == "advisor.idle"] == [], preset.slug


@pytest.mark.parametrize(("changes", "key", "params"), [
    ({"lr_warmup_steps": 100, "max_train_steps": 60}, "long_warmup",
     {"warmup": 100, "total": 60, "share": 59, "usual": 3}),
    ({"lr_warmup_steps": 60, "max_train_steps": 100}, "long_warmup", {"share": 100, "usual": 5}),
    ({"lr_scheduler": "cosine_with_restarts", "lr_cycles": 12, "max_train_steps": 20},
     "short_cycles", {"cycles": 12, "total": 20}),
    ({"save_steps": 500, "max_train_steps": 100}, "after_the_end",
     {"keys": "save_steps: 500", "total": 100}),
    ({"validation_split": 0.2, "validation_steps": 11, "text_encoder_lr": 1e-5,
      "text_encoder_stop": 11, "save_steps": 10, "max_train_steps": 10}, "after_the_end",
     {"keys": "validation_steps: 11, text_encoder_stop: 11"}),
    ({"save_steps": 2001, "epochs": 100}, "after_the_end", {"total": 2000}),
    ({"batch_size": 21}, "large_batch", {"batch": 21, "samples": 20}),
    ({"shuffle_tags": True, "keep_tokens": 2}, "nothing_to_shuffle", {"keep": 2}),
    ({"shuffle_tags": True, "captions": ["a red apple on a table"] * 20}, "nothing_to_shuffle", {}),
    ({"validation_split": 0.5, "captions": ["a"]}, "none_held_out", {})])
def test_the_course_of_a_run(changes: dict[str, Any], key: str, params: dict[str, Any]) -> None:
    found = said(**changes)[key]
    assert params.items() <= found.items()


@pytest.mark.parametrize("changes", [
    {"lr_warmup_steps": 50, "max_train_steps": 100}, {"save_steps": 2000},
    {"shuffle_tags": True, "keep_tokens": 1}, {"batch_size": 20}, {"validation_split": 0.1},
    {"shuffle_tags": True, "trigger_word": "ink", "captions": ["apple"] * 20},
    {"lr_scheduler": "cosine_with_restarts", "lr_cycles": 10, "max_train_steps": 20}])
def test_what_just_fits_is_not_told(changes: dict[str, Any]) -> None:
    assert said(**changes).keys() <= {"too_few", "too_many"}


@settings(max_examples=60, deadline=None)
@given(epochs=st.integers(1, 20), batch=st.integers(1, 8), accumulation=st.integers(1, 4),
       repeats=st.lists(st.integers(1, 5), min_size=1, max_size=20))
def test_the_length_is_a_plain_count(epochs: int, batch: int, accumulation: int,
                                     repeats: list[int]) -> None:
    config = TrainConfig(epochs=epochs, batch_size=batch, gradient_accumulation_steps=accumulation)
    batches = len(range(0, sum(repeats), batch))
    assert course.updates(config, repeats) == epochs * len(range(0, batches, accumulation))
    assert course.updates(config.with_changes(max_train_steps=7), repeats) == 7
