from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from core import families, hashes, paths
from core.config import TrainConfig
from core.dataset import buckets
from core.dataset.examples import Encoder, Examples, find
from core.errors import UserError
from core.families.base import Cond, Parts
from core.families.sd15.model import StableDiffusion1
from core.jobs.control import Control
from core.jobs.events import Event, Note, Phase
from core.weights.precision import Precision, choose
from tests import tiny


def prepared(config: TrainConfig, texts: tuple[str, ...] = ()) -> tuple[Examples, list[Event]]:
    events: list[Event] = []
    family, precision, source = families.get("sd15"), choose("fp32", "cpu"), Path(
        config.base_model)
    parts = family.load(source, precision, frozenset())
    examples = find(config, Path(config.train_data_dir), None, parts.native_size,
                    parts.bucket_step, events.append)
    Encoder(family, source, precision, config, events.append, Control()).fill(examples, texts)
    return examples, events


@pytest.fixture
def config(base: Path, tmp_path: Path) -> TrainConfig:
    folder = tiny.pictures(tmp_path / "p", 5)
    tiny.pictures(tmp_path / "p" / "wide", 2, (64, 24))
    return TrainConfig(base_model=str(base), train_data_dir=str(folder), cache_batch_size=2)


def encoded(events: list[Event]) -> set[str]:
    return {e.name for e in events if isinstance(e, Phase)} & {"cache", "texts"}


def test_latents_are_those_of_one_picture_at_a_time(config: TrainConfig) -> None:
    """Batches by bucket, in threads: the same values as alone, to fp32 rounding."""
    examples, _ = prepared(config)
    family = families.get("sd15")
    parts = family.load(Path(config.base_model), choose("fp32", "cpu"))
    assert len({i.bucket for i in examples.items}) == 2
    for item, latents in zip(examples.items, examples.latents, strict=True):
        pixels = buckets.fit_picture(Image.open(item.picture.path).convert("RGB"), item.bucket)
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        torch.testing.assert_close(latents, family.encode_image(parts, x)[0], atol=1e-5, rtol=1e-4)
        text = family.encode_text(parts, [item.captions[0]])["text"]
        torch.testing.assert_close(examples.texts[item.captions[0]]["text"], text,
                                   atol=1e-5, rtol=1e-4)


def test_the_second_run_encodes_nothing(config: TrainConfig) -> None:
    first, events = prepared(config)
    assert encoded(events) == {"cache", "texts"}
    second, events = prepared(config)
    assert encoded(events) == set()
    assert all(torch.equal(a, b) for a, b in zip(first.latents, second.latents, strict=True))


def test_what_changes_is_encoded_again(config: TrainConfig, tmp_path: Path) -> None:
    prepared(config)
    Image.new("RGB", (48, 48), "black").save(tmp_path / "p" / "000.png")
    (tmp_path / "p" / "001.txt").write_text("another caption")
    _, events = prepared(config)
    assert [e.total for e in events if isinstance(e, Phase) and e.name == "cache"][:1] == [1]
    assert [e.total for e in events if isinstance(e, Phase) and e.name == "texts"][:1] == [1]
    _, events = prepared(config.with_changes(max_resolution="48,48"))
    assert encoded(events) == {"cache"}


def test_torn_entries_are_made_again(config: TrainConfig, own_home: Path) -> None:
    first, _ = prepared(config)
    files = sorted(paths.cache_dir().glob("**/*.safetensors"))
    assert len(files) == 7 + len(first.texts)
    for file in files[::2]:
        file.write_bytes(file.read_bytes()[:40])
    second, _ = prepared(config)
    assert all(torch.equal(a, b) for a, b in zip(first.latents, second.latents, strict=True))


def test_flip_keeps_the_mirrored_picture(config: TrainConfig, tmp_path: Path) -> None:
    plain, _ = prepared(config)
    both, _ = prepared(config.with_changes(flip=True))
    for image in (tmp_path / "p").glob("**/*.png"):
        Image.fromarray(np.asarray(Image.open(image))[:, ::-1].copy()).save(image)
    mirrored, _ = prepared(config)
    for i, latents in enumerate(both.latents):
        torch.testing.assert_close(latents[0], plain.latents[i])
        torch.testing.assert_close(latents[1], mirrored.latents[i], atol=1e-5, rtol=1e-4)


def test_the_users_folder_is_only_read(config: TrainConfig, tmp_path: Path) -> None:
    def seen() -> dict[str, tuple[str, int]]:
        return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
                for p in sorted((tmp_path / "p").glob("**/*")) if p.is_file()}
    before = seen()
    prepared(config)
    assert seen() == before


def test_bad_pictures_are_named_and_the_rest_trains(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "p" / "torn.png").write_bytes((tmp_path / "p" / "000.png").read_bytes()[:80])
    (tmp_path / "p" / "empty.jpg").write_bytes(b"")
    examples, events = prepared(config)
    assert len(examples.items) == 7
    notes = [e for e in events if isinstance(e, Note)]
    assert {Path(str(n.params["file"])).name for n in notes if "file" in n.params} == {
        "torn.png", "empty.jpg"}
    found = next(n for n in notes if n.key == "engine.found")
    assert (found.params["pictures"], found.params["skipped"]) == (7, 2)


def test_long_captions_are_told(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "p" / "000.txt").write_text("very long " * 120)
    _, events = prepared(config)
    note = next(e for e in events if isinstance(e, Note) and e.key == "engine.caption_too_long")
    assert (note.params["count"], note.params["limit"], note.params["tokens"]) == (1, 225, 240)


class Loud(StableDiffusion1):
    """Its text has states that fp16 can't hold, as language models have."""

    def encode_text(self, parts: Parts, prompts: Sequence[str]) -> Cond:
        with torch.autocast("cpu", enabled=False):
            found = super().encode_text(parts, prompts)
        found["text"][:, 0, 0] = 1e6
        return found


@pytest.mark.parametrize(("compute", "largest"), [(torch.float16, 65504.0),
                                                  (torch.bfloat16, 1e6)])
def test_states_that_outgrow_fp16_stay_finite(config: TrainConfig, compute: torch.dtype,
                                              largest: float) -> None:
    events: list[Any] = []
    precision = replace(choose("fp32", "cpu"), compute=compute)
    found = Encoder(Loud(), Path(config.base_model), precision, config, events.append,
                    Control()).embeddings(["red disc", "blue"])
    for cond in found.values():
        assert cond["text"].dtype == compute
        assert bool(cond["text"].isfinite().all())
        assert float(cond["text"].max()) == pytest.approx(largest, rel=0.01)
    told = [e for e in events if getattr(e, "key", "") == "precision.text_outgrows_fp16"]
    assert len(told) == (compute == torch.float16)


def test_shuffled_tags_keep_the_trigger_first(config: TrainConfig) -> None:
    examples, _ = prepared(config.with_changes(shuffle_tags=True, trigger_word="mia"))
    for item in examples.items:
        assert 1 < len(item.captions) <= 8
        assert all(c.startswith("mia, ") for c in item.captions)
        assert len({tuple(sorted(c.split(", "))) for c in item.captions}) == 1


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    weights = {"vae.a": torch.randn(300, 300), "unet.b": torch.randn(4)}
    save_file(weights, path)
    first = hashes.fingerprint([(path, "vae.")])
    save_file(weights | {"unet.b": torch.randn(4)}, path)
    assert hashes.fingerprint([(path, "vae.")]) == first
    save_file(weights | {"vae.a": weights["vae.a"] + 1e-3}, path)
    assert hashes.fingerprint([(path, "vae.")]) != first
    assert load_file(path)


# --- memory, numbers and pictures that go ---

class Encoding(StableDiffusion1):
    """The real encoders in a memory for `most` items at once."""

    def __init__(self, most: int) -> None:
        self.most, self.sizes, self.tiled = most, list[int](), False

    def encode_image(self, parts: Parts, pixels: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(pixels))
        if len(pixels) > self.most and not (len(pixels) == 1 and parts.vae.use_tiling):
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.tiled = self.tiled or parts.vae.use_tiling
        return super().encode_image(parts, pixels)

    def encode_text(self, parts: Parts, prompts: Sequence[str]) -> Cond:
        if len(prompts) > max(1, self.most):
            raise MemoryError
        return super().encode_text(parts, prompts)


def encode_with(family: Encoding, config: TrainConfig, precision: Precision | None = None
                ) -> tuple[Examples, list[Note]]:
    events: list[Event] = []
    precision, source = precision or choose("fp32", "cpu"), Path(config.base_model)
    parts = family.load(source, precision, frozenset())
    examples = find(config, Path(config.train_data_dir), None, parts.native_size,
                    parts.bucket_step, events.append)
    Encoder(family, source, precision, config, events.append, Control()).fill(examples)
    return examples, [e for e in events if isinstance(e, Note)]


@pytest.mark.parametrize(("most", "told"), [
    (2, ["engine.cache_fewer"] * 3), (1, ["engine.cache_fewer"] * 4),
    (0, ["engine.cache_fewer"] * 4 + ["engine.cache_tiled"])])
def test_encoding_in_little_memory(config: TrainConfig, most: int, told: list[str]) -> None:
    """Six captions at once, then three, then one; four pictures, then two, one, one in tiles."""
    config = config.with_changes(cache_batch_size=4, cache_to_disk=False)
    plain, _ = encode_with(Encoding(99), config)
    family = Encoding(most)
    little, notes = encode_with(family, config)
    assert [n.key for n in notes if n.key.startswith("engine.cache")] == told
    assert family.tiled == (most == 0)
    for item, a, b in zip(plain.items, plain.latents, little.latents, strict=True):
        if not family.tiled or item.bucket == (32, 32):     # larger ones are of several tiles
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        assert a.shape == b.shape
    for text, cond in plain.texts.items():
        torch.testing.assert_close(cond["text"], little.texts[text]["text"], atol=1e-5, rtol=1e-4)


def test_what_never_fits_is_one_fault(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(Encoding, "encode_image", never)
    with pytest.raises(UserError) as caught:
        encode_with(Encoding(99), config)
    assert caught.value.code == "engine.cache_too_big"


def test_a_vae_that_overflows_in_fp16_encodes_that_picture_in_fp32(
        config: TrainConfig, base: Path, tmp_path: Path) -> None:
    """A base whose VAE leaves fp16's range for bright pictures, not for dark ones."""
    hot = shutil.copytree(base, tmp_path / "hot")
    file = hot / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.weight"] = torch.full_like(weights["encoder.conv_in.weight"], 1300.0)
    weights["encoder.conv_in.bias"] = torch.full_like(weights["encoder.conv_in.bias"], 1300.0 * 27)
    save_file(weights, file, {"format": "pt"})
    for path in (tmp_path / "p").glob("**/*.png"):
        Image.new("RGB", (48, 48), "white" if path.name == "003.png" else "black").save(path)
    config = config.with_changes(base_model=str(hot), cache_batch_size=4)
    half = replace(choose("fp32", "cpu"), vae=torch.float16)
    examples, notes = encode_with(Encoding(99), config, half)
    assert [Path(n.params["file"]).name for n in notes if n.key == "engine.latents_again"] == [
        "003.png"]
    assert all(torch.isfinite(latents).all() for latents in examples.latents)
    whole, _ = encode_with(Encoding(99), config)
    place = [i.picture.path.name for i in examples.items].index("003.png")
    # weights went through fp16: 11 bits
    torch.testing.assert_close(examples.latents[place], whole.latents[place], atol=1e-3, rtol=1e-2)


def test_a_vae_that_is_broken_names_the_picture(config: TrainConfig,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    def third(self: Encoding, parts: Parts, pixels: torch.Tensor) -> torch.Tensor:
        latents = StableDiffusion1.encode_image(self, parts, pixels)
        return latents * torch.where(pixels.sum((1, 2, 3)) == darkest, torch.nan, 1.0).view(
            -1, 1, 1, 1)
    path = sorted(Path(config.train_data_dir).glob("*.png"))[2]
    Image.new("RGB", (48, 48)).save(path)
    darkest = -3.0 * 32 * 32
    monkeypatch.setattr(Encoding, "encode_image", third)
    with pytest.raises(UserError) as caught:
        encode_with(Encoding(99), config)
    assert (caught.value.code, caught.value.params["path"]) == ("engine.bad_latents", path)


def test_pictures_that_go_while_encoding_are_left_out(
        config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One between the scan and its hash, one between its hash and its decoding."""
    pictures_found = sorted((tmp_path / "p").glob("*.png"))

    whole_find = find

    def find_and_lose(*rest: Any) -> Examples:
        examples = whole_find(*rest)
        pictures_found[0].unlink()
        return examples
    monkeypatch.setitem(globals(), "find", find_and_lose)
    keys = Encoder._latent_keys

    def hash_and_lose(self: Encoder, item: Any) -> list[str]:
        names = keys(self, item)
        if item.picture.path == pictures_found[1]:
            item.picture.path.unlink()
        return names
    monkeypatch.setattr(Encoder, "_latent_keys", hash_and_lose)
    examples, notes = encode_with(Encoding(99), config.with_changes(validation_split=0.3))
    assert sorted(n.params["file"] for n in notes if n.key == "engine.picture_gone") == [
        str(path) for path in pictures_found[:2]]
    names = [item.picture.path for item in examples.items]
    assert not set(names) & set(pictures_found[:2])
    assert len(names) == len(examples.latents) == 5
    assert examples.held_out <= {*range(5)}


def test_a_cache_that_takes_nothing_is_done_without(config: TrainConfig, own_home: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = prepared(config.with_changes(cache_to_disk=False))
    (own_home / "cache" / "vae").write_text("a file where a folder is wanted")
    examples, events = prepared(config)
    assert [e.key for e in events if isinstance(e, Note)].count("engine.cache_not_kept") == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.latents, examples.latents, strict=True))


def test_a_broken_caching_goes_on_with_the_same_numbers(config: TrainConfig) -> None:
    """Numbers in a batch depend a little on its size: batches stay what they were."""
    config = config.with_changes(cache_batch_size=4)
    whole, _ = prepared(config)
    for n, file in enumerate(sorted(paths.cache_dir().glob("**/*.safetensors"))):
        if n % 3:
            file.unlink()
    again, _ = prepared(config)
    assert all(torch.equal(a, b) for a, b in zip(whole.latents, again.latents, strict=True))
    assert all(torch.equal(a["text"], again.texts[t]["text"]) for t, a in whole.texts.items())
