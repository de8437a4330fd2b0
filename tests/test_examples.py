from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from core import buckets, cache, families, paths
from core.config import TrainConfig
from core.control import Control
from core.events import Event, Note, Phase
from core.examples import Encoder, Examples, find
from core.precision import choose
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
    (tmp_path / "p" / "000.txt").write_text("very long " * 60)
    _, events = prepared(config)
    note = next(e for e in events if isinstance(e, Note) and e.key == "engine.caption_too_long")
    assert (note.params["count"], note.params["limit"], note.params["tokens"]) == (1, 75, 120)


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
    first = cache.fingerprint([(path, "vae.")])
    save_file(weights | {"unet.b": torch.randn(4)}, path)
    assert cache.fingerprint([(path, "vae.")]) == first
    save_file(weights | {"vae.a": weights["vae.a"] + 1e-3}, path)
    assert cache.fingerprint([(path, "vae.")]) != first
    assert load_file(path)
