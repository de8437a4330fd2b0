"""Rows of the keys about pictures, captions, buckets and the order of samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from core import paths
from core.dataset.sampler import Batch
from tests import tiny
from tests.keys.lab import SAME_CAPTION, Lab, near, of_one, row, shown, started


def numbered(lab: Lab, name: str, size: tuple[int, int] = (48, 48), count: int = 2) -> Path:
    return tiny.pictures(lab.folder / name, count, size)


def tagged(lab: Lab) -> Path:
    """Six pictures with one caption."""
    folder = tiny.pictures(lab.folder / "tagged", 6)
    for path in folder.glob("*.txt"):
        path.write_text(SAME_CAPTION, "utf-8")
    return folder


@row("train_data_dir")
def _(lab: Lab) -> None:
    assert '"pictures"' in lab.plain_run.metadata["ss_dataset_dirs"]
    assert '"5_other"' in lab.other_run.metadata["ss_dataset_dirs"]
    assert '"pictures"' not in lab.other_run.metadata["ss_dataset_dirs"]


@row("metadata_path")
def _(lab: Lab) -> None:
    assert '"listed words"' in lab.other_run.metadata["ss_tag_frequency"]
    assert '"red disc"' in lab.plain_run.metadata["ss_tag_frequency"]


@row("trigger_word")
def _(lab: Lab) -> None:
    assert lab.found().items[0].captions == ("red disc, flat, number 0",)
    assert lab.found(trigger_word="ink").items[0].captions == ("ink, red disc, flat, number 0",)
    assert lab.found(trigger_word="red disc").items[0].captions == ("red disc, flat, number 0",)


@row("batch_size")
def _(lab: Lab) -> None:
    for size, updates in ((1, 6), (4, 2)):
        trainer = lab.trainer(batch_size=size, epochs=1, max_train_steps=0)
        assert trainer.total == updates
        batches = [b for n in range(updates) for b in trainer.sampler.update(n)]
        assert max(len(b.indices) for b in batches) == size


@row("epochs")
def _(lab: Lab) -> None:
    trainer = lab.trainer(epochs=3, max_train_steps=0)
    seen = Counter(i for n in range(trainer.total) for b in trainer.sampler.update(n)
                   for i in b.indices)
    assert seen == {i: 3 for i in range(6)}


@row("max_train_steps")
def _(lab: Lab) -> None:
    assert lab.trainer(max_train_steps=5, epochs=3).total == 5
    assert lab.other_run.result["steps"] == 4


@row("gradient_accumulation_steps")
def _(lab: Lab) -> None:
    trainer = lab.trainer(gradient_accumulation_steps=3, max_train_steps=0, epochs=1)
    updates = [trainer.sampler.update(n) for n in range(trainer.total)]
    assert [len(batches) for batches in updates] == [3, 3]
    assert sorted(i for batches in updates for b in batches for i in b.indices) == list(range(6))
    assert lab.plan(gradient_accumulation_steps=2).phase("train").mb > (
        lab.plan().phase("train").mb)


@row("max_resolution")
def _(lab: Lab) -> None:
    folder = str(numbered(lab, "large", (200, 100)))
    for side in (32, 64):
        sizes = {item.bucket for item in lab.found(
            train_data_dir=folder, max_resolution=f"{side},{side}").items}
        [(width, height)] = sizes
        assert 0.7 * side**2 < width * height <= side**2
        assert width > height


@row("min_bucket_side")
def _(lab: Lab) -> None:
    folder = str(numbered(lab, "flat", (200, 40)))
    assert lab.found(train_data_dir=folder).items[0].bucket == (64, 16)
    assert lab.found(train_data_dir=folder, min_bucket_side=24).items[0].bucket == (40, 24)


@row("max_bucket_side")
def _(lab: Lab) -> None:
    folder = str(numbered(lab, "flat", (200, 40)))
    assert lab.found(train_data_dir=folder, max_bucket_side=48).items[0].bucket == (48, 16)


@row("bucket_no_upscale")
def _(lab: Lab) -> None:
    folder = str(numbered(lab, "small", (19, 27)))
    assert lab.found(train_data_dir=folder).items[0].bucket != (16, 24)
    assert lab.found(train_data_dir=folder, bucket_no_upscale=True).items[0].bucket == (16, 24)


@row("crop_about")
def _(lab: Lab) -> None:
    """The subject is the part that isn't transparent: here the right end of a wide picture."""
    folder = lab.folder / "subject"
    folder.mkdir()
    image = Image.new("RGBA", (256, 32), (0, 0, 0, 0))
    image.paste((200, 30, 30, 255), (216, 4, 248, 28))
    image.save(folder / "a.png")
    options = {"train_data_dir": str(folder), "max_bucket_side": 32}
    for about, middle in (("center", 0.5), ("subject", 232 / 256)):
        item, = lab.found(**options, crop_about=about).items
        frame = item.frame()
        scaled = 256 * frame.target[1] / 32                 # as high as its bucket
        assert (frame.left_top[0] + frame.target[0] / 2) / scaled == pytest.approx(
            min(middle, 1 - frame.target[0] / 2 / scaled), abs=0.03)


@row("alpha_background")
def _(lab: Lab) -> None:
    """A transparent picture is encoded as an opaque one of that colour."""
    colours = {"white": (255, 255, 255), "#204060": (32, 64, 96)}
    for colour, value in colours.items():
        clear, full = (lab.folder / f"{kind}{value[0]}" for kind in ("clear", "full"))
        for folder, mode in ((clear, "RGBA"), (full, "RGB")):
            folder.mkdir()
            Image.new(mode, (32, 32), (1, 2, 3, 0) if mode == "RGBA" else value).save(
                folder / "a.png")
        found, = lab.examples(train_data_dir=str(clear), alpha_background=colour).latents
        wanted, = lab.examples(train_data_dir=str(full)).latents
        torch.testing.assert_close(found, wanted)


@row("picture_processors")
def _(lab: Lab) -> None:
    """Inverted by the processor is inverted in the file."""
    folder = lab.folder / "inverted"
    folder.mkdir()
    for path in sorted(lab.pictures.glob("*.png")):
        ImageOps.invert(Image.open(path)).save(folder / path.name)
    by_key = lab.examples(picture_processors=[f"{lab.own}:invert"]).latents
    by_hand, plain = lab.examples(train_data_dir=str(folder)).latents, lab.examples().latents
    for found, wanted, other in zip(by_key, by_hand, plain, strict=True):
        torch.testing.assert_close(found, wanted)
        assert not torch.allclose(found, other, atol=0.01)


@row("validation_split")
def _(lab: Lab) -> None:
    for share, count in ((0.0, 0), (0.5, 3)):
        trainer = lab.trainer(validation_split=share)
        held = trainer.examples.held_out
        assert len(held) == count
        assert held.isdisjoint(i for n in range(6) for b in trainer.sampler.update(n)
                               for i in b.indices)
        assert (trainer.validate() is None) is (not count)


@row("shuffle_tags")
def _(lab: Lab) -> None:
    """Permutations, of each picture its own."""
    folder = str(tagged(lab))
    assert {item.captions for item in lab.found(train_data_dir=folder).items} == {(SAME_CAPTION,)}
    variants = [item.captions for item in lab.found(train_data_dir=folder, shuffle_tags=True).items]
    assert all(len(one) > 4 for one in variants)
    assert all(sorted(text.split(", ")) == sorted(SAME_CAPTION.split(", "))
               for one in variants for text in one)
    assert len(set(variants)) == len({frozenset(one) for one in variants}) == 6
    trainer = lab.trainer(train_data_dir=folder, shuffle_tags=True, batch_size=256)
    texts = shown(trainer, of_one(200)).cond["text"]
    share = Counter(_which(trainer.examples.texts, trainer.examples.items[0].captions, texts))
    assert len(share) == len(variants[0])                   # every variant comes up
    assert all(near(n / 200, 1 / len(share), 200) for n in share.values())


def _which(known: dict[str, dict[str, Tensor]], names: tuple[str, ...], rows: Tensor) -> list[str]:
    return [next(name for name in names if torch.equal(known[name]["text"][0], row))
            for row in rows]


@row("keep_tokens")
def _(lab: Lab) -> None:
    folder, first = str(tagged(lab)), ", ".join(SAME_CAPTION.split(", ")[:2])
    for keep in (0, 2):
        texts = [text for item in lab.found(
            train_data_dir=folder, shuffle_tags=True, keep_tokens=keep).items
            for text in item.captions]
        assert all(text.startswith(f"{first}, ") for text in texts) is (keep == 2)
        assert len(set(texts)) > 10


@row("enable_wildcard")
def _(lab: Lab) -> None:
    """Each line and each alternative by itself; else all of it as one text."""
    folder = tiny.pictures(lab.folder / "wildcard", 1)
    next(folder.glob("*.png")).with_suffix(".txt").write_text("a {red|blue} cat\na dog, hat\n")
    (plain,) = lab.found(train_data_dir=str(folder)).items
    assert plain.captions == ("a {red|blue} cat, a dog, hat",)
    (item,) = lab.found(train_data_dir=str(folder), enable_wildcard=True).items
    assert {*item.captions} == {"a red cat", "a blue cat", "a dog, hat"}


@row("caption_dropout")
def _(lab: Lab) -> None:
    """The empty text's embedding, for that share of the samples; the picture's own for the rest."""
    for share in (0.0, 0.3, 1.0):
        trainer = lab.trainer(caption_dropout=share, batch_size=256)
        rows, texts = shown(trainer, of_one(1024)).cond["text"], trainer.examples.texts
        own = trainer.examples.items[0].captions[0]
        empty = (rows == texts[""]["text"]).flatten(1).all(1)
        named = (rows == texts[own]["text"]).flatten(1).all(1)
        assert (empty ^ named).all()
        assert near(float(empty.float().mean()), share, 1024)


@row("max_tokens")
def _(lab: Lab) -> None:
    """That many tokens of a caption in chunks of 75; what is longer is cut there."""
    folder, text = tiny.pictures(lab.folder / "long", 1), " ".join(["cat"] * 200)
    (folder / "000.txt").write_text(text, "utf-8")
    for most, chunks in ((75, 1), (150, 2), (225, 3), (300, 3)):
        trainer = lab.trainer(train_data_dir=str(folder), max_tokens=most)
        states = shown(trainer, of_one(1)).cond["text"]
        assert states.shape[1] == 77 * chunks
        short = lab.trainer(train_data_dir=str(folder), max_tokens=75)
        torch.testing.assert_close(states[:, :77], shown(short, of_one(1)).cond["text"])


@row("clip_skip")
def _(lab: Lab) -> None:
    """The last layer but one instead of the last, both through the last norm."""
    family, precision, _ = lab.parts()
    parts = family.load(lab.base, precision, frozenset({"text"}))
    encoder, tokenizer = parts.text["text_encoder"], parts.text["tokenizer"]
    text = lab.found().items[0].captions[0]
    ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        layers = encoder(ids, output_hidden_states=True).hidden_states
        wanted = {skip: encoder.final_layer_norm(layers[-skip]) for skip in (1, 2)}
    for skip, states in wanted.items():
        found = shown(lab.trainer(clip_skip=skip), of_one(1)).cond["text"]
        torch.testing.assert_close(found, states)
    assert (wanted[1] - wanted[2]).abs().max() > 1e-3


@row("flip")
def _(lab: Lab) -> None:
    """Decided for each sample: the same picture is seen both ways, in one batch too."""
    straight = lab.trainer(batch_size=256)
    mirrored = lab.trainer(flip=True, batch_size=256)
    plain, pair = straight.examples.latents[0], mirrored.examples.latents[0]
    torch.testing.assert_close(pair[0], plain)
    assert not torch.allclose(pair[1], plain, atol=0.01)
    seen = shown(mirrored, of_one(1024)).latents
    turned = (seen == pair[1]).flatten(1).all(1)
    assert (turned ^ (seen == pair[0]).flatten(1).all(1)).all()
    assert near(float(turned.float().mean()), 0.5, 1024)
    assert 0 < int(turned[:64].sum()) < 64
    assert (shown(straight, of_one(64)).latents == plain).all()


@row("masked_loss")
def _(lab: Lab) -> None:
    trainer = lab.trainer(train_data_dir=str(_masked(lab)), masked_loss=True)
    weights = shown(trainer, of_one(1)).weights
    assert weights is not None
    assert (weights[..., :3] == 1).all()
    assert (weights[..., 5:] == 0).all()
    assert shown(lab.trainer(train_data_dir=str(_masked(lab))), of_one(1)).weights is None


@row("unmasked_weight")
def _(lab: Lab) -> None:
    trainer = lab.trainer(train_data_dir=str(_masked(lab)), masked_loss=True, unmasked_weight=0.25)
    weights = shown(trainer, of_one(1)).weights
    assert weights is not None
    assert (weights[..., :3] == 1).all()
    assert (weights[..., 5:] == 0.25).all()


def _masked(lab: Lab) -> Path:
    folder = tiny.pictures(lab.folder / "masked", 1)
    half = Image.new("L", (48, 48), 0)
    half.paste(255, (0, 0, 24, 48))
    half.save(folder / "000.mask.png")
    return folder


# --- regularisation pictures ---

@row("reg_data_dir")
def _(lab: Lab) -> None:
    folder = numbered(lab, "prior", count=2)
    found = lab.examples(reg_data_dir=str(folder), trigger_word="ink")
    assert {found.items[i].picture.path.parent for i in found.regular} == {folder}
    assert len(found.regular) == 2
    assert all("ink" not in found.items[i].captions[0] for i in found.regular)
    assert lab.found().regular == frozenset()


@row("reg_from_base")
def _(lab: Lab) -> None:
    found = lab.examples(reg_from_base=3, trigger_word="ink", sample_inference_steps=1,
                         sample_cfg=1.0)
    assert len(found.regular) == 3
    assert all(found.items[i].picture.path.is_relative_to(paths.cache_dir())
               for i in found.regular)


@row("reg_share")
def _(lab: Lab) -> None:
    for share, samples in ((0.25, 2), (0.5, 6), (0.75, 18)):
        trainer = lab.trainer(reg_data_dir=str(numbered(lab, "prior")), reg_share=share)
        epoch = [i for n in range(trainer.sampler.updates_per_epoch)
                 for b in trainer.sampler.update(n) for i in b.indices]
        assert sum(i in trainer.examples.regular for i in epoch) == samples
        assert len(epoch) == 6 + samples


@row("prior_loss_weight")
def _(lab: Lab) -> None:
    """The regularisation pictures' weight, not the others'; the gradient of a batch of them scales
    with it."""
    options = {"reg_data_dir": str(numbered(lab, "prior")), "batch_size": 8}
    trainer = lab.trainer(**options, prior_loss_weight=0.25)
    regular = sorted(trainer.examples.regular)
    assert regular == [6, 7]
    weights = shown(trainer, [Batch((0, 6, 5, 7), (0, 1, 2, 3))]).weights
    assert weights is not None
    assert weights.flatten().tolist() == [1.0, 0.25, 1.0, 0.25]
    whole = started(lab.trainer(**options))
    part = started(trainer)
    for index, factor in ((6, 0.25), (0, 1.0)):
        for one in (whole, part):
            one.optimizer.zero_grad(set_to_none=True)
            one.accumulate(of_one(2, index))
        for a, b in zip(whole.parameters, part.parameters, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert a.grad.any()
            torch.testing.assert_close(b.grad, a.grad * factor)
