"""What a step learns on, beyond single keys: every sample's noise, cut, weight and dice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from core.adapters import lora
from core.dataset import curation
from core.dataset.sampler import Batch
from core.families.base import Cond, CropInfo
from core.families.timestep_sampling import TimestepSampling
from core.jobs.events import Step
from core.lora_files import textual_inversion
from core.objectives.flow import Flow
from core.objectives.noise import Draw
from core.training import base_check, checkpoint
from core.training.previews import Previewer
from core.training.trainer import VALIDATION_SHARES
from tests import tiny
from tests.keys.lab import Lab, near, of_one, shown, started


def test_a_picture_meets_new_noise_every_time(lab: Lab) -> None:
    """In one batch, in the next epoch; the same sample, asked again, meets the same."""
    trainer = lab.trainer(batch_size=8)
    draw = shown(trainer, of_one(8)).draw
    assert len({tuple(one.flatten()[:4].tolist()) for one in draw.noise}) == 8
    assert len(set(draw.timesteps.tolist())) > 4
    assert torch.equal(shown(trainer, of_one(8)).draw.noise, draw.noise)
    assert draw.noise.std() == pytest.approx(1, abs=0.05)
    epochs = [trainer.sampler.update(n * trainer.sampler.updates_per_epoch) for n in (0, 1)]
    first, second = (shown(trainer, one).draw.noise for one in epochs)
    assert not any(torch.equal(a, b) for a in first for b in second)


def test_every_sample_of_a_run_has_a_number_of_its_own(lab: Lab) -> None:
    """Regularisation pictures and repeats too: equal numbers would meet equal noise."""
    trainer = lab.trainer(batch_size=4, gradient_accumulation_steps=2, reg_data_dir=str(
        tiny.pictures(lab.folder / "more", 3)))
    numbers = [n for update in range(3 * trainer.sampler.updates_per_epoch)
               for batch in trainer.sampler.update(update) for n in batch.numbers]
    assert sorted(numbers) == list(range(3 * 12))


def test_the_dice_of_a_sample_are_independent(lab: Lab) -> None:
    """Mirrored pictures lose their captions as often as the others."""
    trainer = lab.trainer(flip=True, caption_dropout=0.5, batch_size=256)
    seen = shown(trainer, of_one(1024))
    turned = (seen.latents == trainer.examples.latents[0][1]).flatten(1).all(1)
    empty = (seen.cond["text"] == trainer.examples.texts[""]["text"]).flatten(1).all(1)
    assert near(float((turned & empty).float().mean()), 0.25, 1024)
    assert near(float((~turned & ~empty).float().mean()), 0.25, 1024)


def test_a_mirrored_picture_tells_its_own_cut(lab: Lab) -> None:
    """As SDXL is told it: where the cut begins, in the picture as it is shown."""
    folder = tiny.pictures(lab.folder / "cut", 1, (96, 32))
    curation.set_focus(folder, {"000.png": (0.0, 0.5)})
    trainer = lab.trainer(train_data_dir=str(folder), flip=True, batch_size=64,
                          max_bucket_side=32)

    class Telling(type(trainer.family)):        # type: ignore[misc]
        def size_conditioning(self, frame: CropInfo) -> Cond:
            return {"left": torch.tensor([[frame.left_top[0]]])}
    trainer.family = Telling()
    seen, pair = shown(trainer, of_one(64)), trainer.examples.latents[0]
    item = trainer.examples.items[0]
    turned = (seen.latents == pair[1]).flatten(1).all(1)
    left, right = item.frame().left_top[0], item.frame(flipped=True).left_top[0]
    assert left == 0 < right
    assert seen.cond["left"].flatten().tolist() == [right if one else left for one in turned]


def test_masks_and_prior_weights_multiply(lab: Lab) -> None:
    own, prior = (tiny.pictures(lab.folder / f"weighed-{name}", 1) for name in ("own", "prior"))
    for folder in (own, prior):
        half = Image.new("L", (48, 48), 0)
        half.paste(255, (0, 0, 24, 48))
        half.save(folder / "000.mask.png")
    trainer = lab.trainer(train_data_dir=str(own), reg_data_dir=str(prior), masked_loss=True,
                          unmasked_weight=0.5, prior_loss_weight=0.1, batch_size=2)
    weights = shown(trainer, [Batch((0, 1), (0, 1))]).weights
    assert weights is not None
    for row, factor in zip(weights, (1.0, 0.1), strict=True):
        assert row[..., :3].unique().tolist() == pytest.approx([factor])
        assert row[..., 5:].unique().tolist() == pytest.approx([0.5 * factor])


def test_masks_count_in_flows_too() -> None:
    """An error of 1 everywhere, of which a quarter is seen, the rest at a tenth."""
    flow, ones = Flow(TimestepSampling()), torch.ones(2, 4, 4, 4)
    family: Any = SimpleNamespace(predict=lambda denoiser, noisy, t, cond: torch.zeros_like(noisy))
    weights = torch.full((2, 1, 4, 4), 0.1)
    weights[..., 0] = 1.0
    drawn = Draw(ones.clone(), torch.tensor([500.0, 900.0]))
    for one, wanted in ((None, 1.0), (weights, 0.325)):
        losses = flow.losses(family, None, 2 * ones, drawn, {}, SimpleContext, one)
        assert losses.tolist() == pytest.approx([wanted] * 2)


class SimpleContext:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_a_flow_goes_straight_from_the_picture_to_noise() -> None:
    flow, noise = Flow(TimestepSampling()), torch.ones(1, 1, 1, 1)
    latents = 2 * noise
    for t, wanted in ((0.0, 2.0), (250.0, 1.75), (1000.0, 1.0)):
        noisy, target = flow.noisy_and_target(latents, noise, torch.tensor([t]))
        assert float(noisy) == pytest.approx(wanted)
        assert float(target) == pytest.approx(-1.0)


# --- the update ---

def _taken(trainer: Any) -> list[Tensor]:
    """The gradients that the optimizer takes from now on."""
    grads: list[Tensor] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: grads.extend(p.grad.clone() for p in trainer.parameters))
    return grads


def test_an_update_is_that_of_its_own_batches(lab: Lab) -> None:
    """Nothing of the gradient before it is left."""
    options = {"max_grad_norm": 0.0, "batch_size": 2, "gradient_accumulation_steps": 2}
    trainer, other = started(lab.trainer(**options)), lab.trainer(**options)
    trainer.update(0)
    other.load_state(trainer.state())
    grads = _taken(trainer)
    trainer.update(1)
    other.accumulate(other.sampler.update(1))
    for found, parameter in zip(grads, other.parameters, strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_fp16_is_clipped_as_fp32_is(lab: Lab) -> None:
    """The limit is of the gradient, not of what the scaler made of it: AdamW's first mean is a
    tenth of what was taken."""
    trainer = started(lab.trainer(precision="fp16", max_grad_norm=1e-3))
    for number in range(4):
        trainer.update(number)
        if trainer.optimizer.state:
            break
    means = [trainer.optimizer.state[p]["exp_avg"].flatten() for p in trainer.parameters]
    assert float(torch.cat(means).norm()) == pytest.approx(1e-4, rel=1e-2)


def test_the_base_check_leaves_the_adapter_on(lab: Lab) -> None:
    """It looks at the base alone; the run that follows learns at full weight, with dropout."""
    trainer = started(lab.trainer(lora_dropout=0.5, text_encoder_lr=1e-3))
    base_check.check(trainer)
    for model in trainer.trained_models().values():
        for _, layer in lora.layers(model):
            assert layer.scaling[lora.ADAPTER] == 1
            assert layer.lora_dropout[lora.ADAPTER].training


def test_the_limit_is_of_all_that_learns_together(lab: Lab) -> None:
    """The text encoder and new words are clipped with the denoiser, by one norm."""
    options = {"text_encoder_lr": 1e-3, "pivotal_tokens": 1, "trigger_word": "red disc"}
    norms = {}
    for limit in (0.0, 1e-3):
        trainer = started(lab.trainer(**options, max_grad_norm=limit))
        grads: list[Tensor] = []
        trainer.optimizer.register_step_pre_hook(lambda optimizer, *_, grads=grads: grads.extend(
            p.grad.flatten().clone() for group in optimizer.param_groups for p in group["params"]))
        trainer.update(0)
        assert trainer.text is not None
        assert len(grads) > len(trainer.text.parameters) > 0
        norms[limit] = [float(one.norm()) for one in grads]
    whole = sum(one**2 for one in norms[0.0])**0.5
    assert whole > 2e-3
    assert norms[1e-3] == pytest.approx([one * 1e-3 / whole for one in norms[0.0]], rel=1e-3)


def test_the_average_is_of_all_that_learns(lab: Lab) -> None:
    """Until the text encoder rests: it rests at its average, which is what is saved."""
    trainer = started(lab.trainer(text_encoder_lr=1e-2, ema_decay=0.9, text_encoder_stop=2))
    assert trainer.text is not None
    parts = [*lora.trainable(trainer.denoiser)[:1], trainer.text.parameters[0]]

    def moves_within() -> list[bool]:
        live = [p.detach().clone() for p in parts]
        with trainer.averaged():
            return [not torch.equal(p, old) for p, old in zip(parts, live, strict=True)]
    for number in range(2):
        trainer.update(number)
    assert moves_within() == [True, True]
    trainer.update(2)
    assert moves_within() == [True, False]


def _dropped(trainer: Any, number: int) -> Tensor:
    """Which inputs of the first layers were left out in an update."""
    seen: list[Tensor] = []
    handles = [module.register_forward_hook(lambda _, given, out: seen.append(out == 0))
               for name, module in trainer.denoiser.named_modules()
               if name.endswith("lora_dropout.default")]
    trainer.update(number)
    for handle in handles:
        handle.remove()
    return torch.cat([one.flatten() for one in seen])


def test_every_update_drops_others(lab: Lab) -> None:
    """As its number says: the same again in a run that resumes there."""
    options = {"lora_dropout": 0.5, "batch_size": 1}
    trainer, again = lab.trainer(**options), lab.trainer(**options)
    first, second = _dropped(trainer, 0), _dropped(trainer, 1)
    assert near(float((first == second).float().mean()), 0.5, len(first))
    assert torch.equal(_dropped(again, 1), second)


def test_previews_leave_dropout_out_and_give_it_back(lab: Lab) -> None:
    trainer = lab.trainer(lora_dropout=0.5, sample_prompts=["red disc"], text_encoder_lr=1e-3,
                          sample_inference_steps=1, sample_cfg=1.0)
    layers = [layer.lora_dropout[lora.ADAPTER] for model in trainer.trained_models().values()
              for _, layer in lora.layers(model)]
    seen: list[bool] = []
    trainer.denoiser.register_forward_pre_hook(
        lambda *_: seen.extend(one.training for one in layers))
    drawn = Previewer(trainer.family, trainer.parts, trainer.precision, trainer.config,
                      trainer.cond, lab.folder / "dropped", trainer.emit).draw(
        1, "ink", trainer.text)
    assert len(drawn) == 1
    assert seen
    assert not any(seen)
    assert all(one.training for one in layers)


def test_the_loss_that_is_shown_is_of_the_updates_that_counted(lab: Lab) -> None:
    """One picture is no number: its update is named, and left out of the mean."""
    trainer = lab.trainer(max_train_steps=0)
    order = [trainer.sampler.update(n)[0].indices[0] for n in range(6)]
    trainer.examples.latents[order[2]] = torch.full((4, 8, 8), float("nan"))
    before = [p.detach().clone() for p in trainer.parameters]
    for number in range(6):
        trainer.update(number)
    loss = trainer.mean_loss()
    assert loss is not None
    assert 0 < loss < 10
    assert trainer.skipped == [2]
    assert trainer.read == 5
    assert all(torch.isfinite(p).all() for p in trainer.parameters)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert trainer.mean_loss() is None


def test_prompts_of_previews_are_there_after_the_text_encoder_rests(lab: Lab) -> None:
    """With what it learned, though no caption holds them."""
    prompt = "words of no caption"
    trainer = started(lab.trainer(text_encoder_lr=1e-2, text_encoder_stop=1,
                                  sample_prompts=[prompt]))
    assert trainer.text is not None
    trainer.update(0)
    with torch.no_grad():
        live = trainer.text.cond([prompt])["text"]
    trainer.update(1)
    assert not trainer.text.live
    torch.testing.assert_close(trainer.cond([prompt])["text"], live, rtol=1e-3, atol=1e-4)


# --- validation ---

def _asked(trainer: Any) -> Iterator[tuple[float, Tensor]]:
    """Timestep and noise of each loss of a validation."""
    seen: list[Draw] = []

    def losses(latents: Tensor, draw: Draw, cond: Cond, weights: Tensor | None = None) -> Tensor:
        seen.append(draw)
        return torch.zeros(len(latents))
    trainer.losses = losses
    trainer.validate()
    del trainer.losses
    for draw in seen:
        yield float(draw.timesteps[0]), draw.noise[0]


def test_validation_asks_for_the_same_levels_and_noise_every_time(lab: Lab) -> None:
    trainer = lab.trainer(validation_split=0.4, flip=True)
    first = list(_asked(trainer))
    steps = [round(share * 1000) for share in VALIDATION_SHARES]
    assert [t for t, _ in first] == steps * len(trainer.examples.held_out)
    noises = [noise for _, noise in first]
    assert not torch.equal(noises[0], noises[-1])           # of each picture its own
    trainer.update(0)
    again = list(_asked(trainer))
    assert [t for t, _ in again] == [t for t, _ in first]
    assert all(torch.equal(a, b) for a, (_, b) in zip(noises, again, strict=True))


def test_validation_leaves_dropout_out(lab: Lab) -> None:
    """Two with the same weights say the same; after it dropout is on again."""
    plain = started(lab.trainer(validation_split=0.4))
    dropped = started(lab.trainer(validation_split=0.4, lora_dropout=0.5))
    assert dropped.validate() == pytest.approx(plain.validate(), rel=1e-6)
    switches = [module.training for name, module in dropped.denoiser.named_modules()
                if name.endswith("lora_dropout.default")]
    assert switches
    assert all(switches)


def test_a_run_validates_its_average(lab: Lab) -> None:
    """The loss that is shown is of the weights that are saved."""
    options = {"ema_decay": 0.9, "validation_split": 0.4, "learning_rate": 0.05,
               "output_dir": str(lab.folder / "averaged"), "output_name": "a"}
    run = lab.run(**options)
    told = [e.validation for e in run.events if isinstance(e, Step) and e.validation is not None]
    trainer = lab.trainer(**options)
    _, state = checkpoint.load(lab.folder / "averaged/checkpoints/a-000004")
    trainer.load_state(state.adapter)
    live = trainer.validate()
    with trainer.averaged():
        averaged = trainer.validate()
    assert told[-1] == pytest.approx(averaged, rel=1e-6)
    assert told[-1] != pytest.approx(live, rel=1e-4)


def test_the_best_step_is_the_one_of_the_lowest_loss(lab: Lab) -> None:
    """Both where the loss falls and where it rises."""
    for rate, last in ((3e-3, None), (5.0, False)):
        run = lab.run(validation_split=0.4, save_steps=1, keep_checkpoints=1, learning_rate=rate,
                      output_dir=str(lab.folder / f"best-{rate}"), max_train_steps=5)
        losses = {e.step: e.validation for e in run.events
                  if isinstance(e, Step) and e.validation is not None}
        assert len(losses) == 5
        best = min(losses, key=lambda step: losses[step])
        assert run.result["best"]["step"] == best
        assert run.result["best"]["validation"] == losses[best]
        assert last is None or best != 5
        kept = checkpoint.steps_of(Path(run.config.output_dir), run.result["name"])
        assert set(kept) == {5, best}                       # the newest, and the best


def test_a_resumed_run_knows_the_best_of_before(lab: Lab) -> None:
    """Worse losses after the break are not the best."""
    options = {"validation_split": 0.4, "save_steps": 1, "keep_checkpoints": 0,
               "learning_rate": 5.0, "output_dir": str(lab.folder / "best-before"),
               "output_name": "a"}
    first = lab.run(**options, max_train_steps=2)
    second = lab.run(**options, max_train_steps=4, resume=True)
    losses = {e.step: e.validation for run in (first, second) for e in run.events
              if isinstance(e, Step) and e.validation is not None}
    assert len(losses) == 4
    best = min(losses, key=lambda step: losses[step])
    assert best <= 2
    assert second.result["best"]["step"] == best


# --- words ---

def test_longer_words_are_put_in_first() -> None:
    words = {"ink": "<1>", "ink style": "<2> <3>"}
    assert textual_inversion.expand("an ink style disc, ink", words) == "an <2> <3> disc, <1>"


def test_larger_pictures_of_a_flow_are_noisier() -> None:
    """Where the base's shift goes by a line."""
    sampling = TimestepSampling("uniform", line=((256, 0.5), (4096, 1.15)))
    means = [float(Flow(sampling).draw(1, range(300), (4, side, side)).timesteps.mean())
             for side in (32, 64, 128)]
    assert means == sorted(means)
    assert means[2] - means[0] > 50


# --- the order of samples ---

def test_epochs_come_in_another_order(lab: Lab) -> None:
    """Each shows every picture once."""
    trainer = lab.trainer(max_train_steps=0)
    epochs = [[i for n in range(6) for b in trainer.sampler.update(6 * epoch + n)
               for i in b.indices] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_folders_repeat_as_often_as_they_say(lab: Lab) -> None:
    folder = tiny.pictures(lab.folder / "repeats" / "3_ink", 2).parent
    tiny.pictures(folder / "plain", 1)
    trainer = lab.trainer(train_data_dir=str(folder), max_train_steps=0, epochs=2)
    seen = Counter(trainer.examples.items[i].picture.path.parent.name
                   for n in range(trainer.total) for b in trainer.sampler.update(n)
                   for i in b.indices)
    assert seen == {"3_ink": 2 * 2 * 3, "plain": 2}
    with_prior = lab.trainer(train_data_dir=str(folder), reg_data_dir=str(folder / "plain"))
    assert with_prior.sampler.samples_per_epoch == 7 + 7     # a half, repeats counted
