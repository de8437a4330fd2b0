"""CLIP: maths against open_clip's own path, vocabulary files, the demo world's own model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from captioner import get
from captioner.base import Description, Tag
from captioner.config import CaptionConfig
from captioner.models import clip, tagging
from captioner.models.clip import ClipTagger
from captioner.models.interrogate import combine
from core import paths
from core.dataset.images import open_picture
from core.errors import UserError
from core.safetensors_header import read_header
from tests.tiny import captioners as tiny

WORDS = {"thing": {"templates": ["a photo of {a}", "{}"], "most": 4, "threshold": 0.0,
                   "relative": 0.0, "entries": ["cat", "old dog", "trees", "key", "red car"]},
         "look": {"written": "{} look", "entries": ["blue", "dark"]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.tiny_clip(tmp_path_factory.mktemp("clip") / "model")
    (made / "vocabulary.yaml").write_text(yaml.safe_dump(WORDS, sort_keys=False), "utf-8")
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny.pictures(tmp_path_factory.mktemp("pictures"))


def opened(folder: Path | str, **more: Any) -> ClipTagger:
    config = CaptionConfig(folder="x", models={"clip": str(folder)}, device="cpu", **more)
    tagger = ClipTagger(config)
    tagger.load()
    return tagger


def reference(folder: Path) -> tuple[Any, Any, Any]:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


# --- against open_clip ---

@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_pixels_are_those_of_open_clips_preprocessing(tmp_path: Path, files: list[Path],
                                                      mode: str) -> None:
    tagger = opened(tiny.tiny_clip(tmp_path, mode))
    _, preprocess, _ = reference(tmp_path)
    seen: list[torch.Tensor] = []
    hook = tagger.model.visual.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = [open_picture(path) for path in files]
    tagger.embed_images([tagger.prepare(image) for image in images])
    hook.remove()
    assert torch.equal(seen[0], torch.stack([preprocess(image) for image in images]))


@torch.no_grad()
def test_similarity_is_open_clips(folder: Path, files: list[Path]) -> None:
    tagger = opened(folder)
    model, preprocess, tokenizer = reference(folder)
    texts = ["a photo of a cat", "rain", "something else altogether, and long: " + "word " * 40]
    pictures = tagger.embed_images([tagger.prepare(open_picture(path)) for path in files])
    ours = pictures @ tagger.embed_texts(texts).T
    for n, path in enumerate(files):                        # one at a time, as its README does
        image = preprocess(open_picture(path)).unsqueeze(0)
        seen, told = model.encode_image(image), model.encode_text(tokenizer(texts))
        seen, told = (x / x.norm(dim=-1, keepdim=True) for x in (seen, told))
        torch.testing.assert_close(ours[n:n + 1], seen @ told.T, atol=2e-6, rtol=0)


def test_texts_of_all_lengths_embed_as_open_clip_embeds_them(folder: Path) -> None:
    tagger = opened(folder)
    model, _, tokenizer = reference(folder)
    for texts in (["", "cat"], ["a b c d e", "x"], ["word " * 99], ["word " * 99, "cat"]):
        theirs = model.encode_text(tokenizer(texts), normalize=True)
        torch.testing.assert_close(tagger.embed_texts(texts), theirs.detach(), atol=2e-6, rtol=0)


@torch.no_grad()
def test_scores_are_zero_shot_probabilities(folder: Path, files: list[Path]) -> None:
    tagger = opened(folder)
    model, preprocess, tokenizer = reference(folder)
    image = open_picture(files[0])
    scores = tagger.scores([tagger.prepare(image)])[0][0]
    prompts = [["a photo of a cat", "cat"], ["a photo of an old dog", "old dog"],
               ["a photo of trees", "trees"], ["a photo of a key", "key"],
               ["a photo of a red car", "red car"]]
    rows = [model.encode_text(tokenizer(two), normalize=True).mean(0) for two in prompts]
    told = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
    seen = model.encode_image(preprocess(image)[None], normalize=True)
    expected = (model.logit_scale.exp() * seen @ told.T).softmax(-1)[0]
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)
    tags = tagger.describe([tagger.prepare(image)])[0].tags
    best = WORDS["thing"]["entries"][int(expected.argmax())]
    assert next(t for t in tags if t.category == "thing").name == best
    assert [t.score for t in tags] == sorted((t.score for t in tags), reverse=True)


def test_a_batch_says_what_each_picture_says_alone(folder: Path, files: list[Path]) -> None:
    tagger = opened(folder)
    prepared = [tagger.prepare(open_picture(path)) for path in files]
    together = tagger.describe(prepared)
    for picture, said in zip(prepared, together, strict=True):
        (alone,) = tagger.describe([picture])
        assert [t.name for t in alone.tags] == [t.name for t in said.tags]
        np.testing.assert_allclose([t.score for t in alone.tags], [t.score for t in said.tags],
                                   atol=2e-5)


def test_embeddings_have_length_one(folder: Path, files: list[Path]) -> None:
    tagger = opened(folder)
    embedded = tagger.embed_images([tagger.prepare(open_picture(path)) for path in files])
    assert embedded.shape == (len(files), 32)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(len(files)))


def test_vocabulary_is_embedded_once(folder: Path, own_home: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(folder)
    with monkeypatch.context() as patched:
        patched.setattr(ClipTagger, "embed_texts", lambda *_: pytest.fail("embedded again"))
        second = opened(folder)
    assert all(torch.equal(a, b) for a, b in zip(first.embeddings, second.embeddings, strict=True))
    next((own_home / "cache" / "vocabularies").rglob("*.safetensors")).write_bytes(b"torn")
    third = opened(folder)
    assert torch.equal(first.embeddings[0], third.embeddings[0])


def test_half_precision_says_much_the_same(folder: Path, files: list[Path]) -> None:
    full, half = opened(folder), opened(folder, precision="bf16")
    prepared = [full.prepare(open_picture(path)) for path in files]
    a, b = full.embed_images(prepared), half.embed_images(prepared)
    assert float((a * b).sum(1).min()) > 0.995


def test_identity_tells_weights_words_and_options(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    words = tmp_path / "mine.txt"
    words.write_text("cat\ndog\n", "utf-8")
    def name(model: Path, **more: Any) -> str:
        return ClipTagger(CaptionConfig(folder="x", models={"clip": str(model)}, **more)).identity()
    assert name(folder) == name(other)
    assert len({name(folder), name(folder, most_tags=3), name(folder, vocabulary=str(words)),
                name(folder, tag_threshold=0.5), name(folder, exclude=["cat"])}) == 5
    config = json.loads((other / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0, 0, 0]
    (other / "open_clip_config.json").write_text(json.dumps(config))
    assert name(folder) != name(other)


def test_built_in_words_are_many_and_clean() -> None:
    vocabulary = tagging.built_in()
    entries = [entry for category in vocabulary for entry in category.entries]
    assert len(entries) > 2000
    assert {"subject", "medium", "style", "lighting", "composition", "colour", "quality"} <= {
        category.name for category in vocabulary}
    assert all(0 < len(entry) < 60 and entry == entry.strip() for entry in entries)
    longest = max(len(open_clip.tokenize([prompt])[0].nonzero()) for category in vocabulary
                  for entry in category.entries[:5] for prompt in category.prompts(entry))
    assert longest < 20


# --- faults ---

def fault(folder: Path | str, **more: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        opened(folder, **more)
    assert "{" not in str(caught.value)
    return caught.value


def test_missing_weights_name_the_command_that_fetches_them() -> None:
    missing = fault("ViT-B-32/laion2b_s34b_b79k")
    assert missing.code == "captioner.no_weights"
    assert missing.params["command"] == (
        "darkroom models get laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    assert fault("someone/some-clip").code == "captioner.no_weights"


def test_broken_folders_are_told(folder: Path, tmp_path: Path) -> None:
    def broken(change: Any) -> str:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "m")
        change(tmp_path / "m")
        return fault(tmp_path / "m").code
    weights = "open_clip_model.safetensors"
    assert broken(lambda m: (m / weights).unlink()) == "captioner.no_weights_in"
    assert broken(lambda m: (m / weights).rename(m / "x.bin")) == "captioner.pickle"
    assert broken(lambda m: (m / weights).write_bytes((m / weights).read_bytes()[:5000])
                  ) == "captioner.broken_weights"
    assert broken(lambda m: (m / weights).write_bytes(b"")) == "captioner.broken_weights"
    assert broken(lambda m: (m / clip.CONFIG).unlink()) == "clip.no_config"
    assert broken(lambda m: (m / clip.CONFIG).write_text("{")) == "clip.bad_config"
    assert broken(lambda m: (m / clip.CONFIG).write_text("[]")) == "clip.bad_config"
    assert broken(lambda m: (m / clip.CONFIG).write_text('{"model_cfg": {"embed_dim": 3}}')
                  ) == "captioner.broken_weights"


def test_another_models_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((folder / clip.CONFIG).read_text())
    config["model_cfg"]["embed_dim"] = 48
    (tmp_path / "m" / clip.CONFIG).write_text(json.dumps(config))
    assert fault(tmp_path / "m").code == "captioner.broken_weights"


# --- vocabularies and thresholds ---

@pytest.mark.parametrize(("text", "problem"), [
    ("", "expected categories"), ("- a\n- b", "expected categories"),
    ("x: {entries: []}", "no entr"),
    ("x: {entries: [a], mots: 3}", "unknown key mots"), ("x: {entries: [a], most: 1.5}", "most"),
    ("x: {entries: [a], threshold: 2}", "threshold"), ("x: [a\ny: b", "line 2"),
    ("x: {entries: [a], templates: [plain]}", "templates"),
    ("x: {entries: [a], most: true}", "most"), ("x: 3", "no entr")])
def test_bad_vocabularies_say_what_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "v.yaml").write_text(text, "utf-8")
    with pytest.raises(UserError, match=problem) as caught:
        ClipTagger(CaptionConfig(folder="x", vocabulary=str(tmp_path / "v.yaml")))
    assert caught.value.code == "clip.bad_vocabulary"
    with pytest.raises(UserError):
        tagging.load_vocabulary(tmp_path / "missing.yaml")


def test_a_plain_list_is_a_vocabulary(tmp_path: Path) -> None:
    text = "\ufeff# mine\nred fox  # animal\n\n 35 mm \nred fox\n"
    (tmp_path / "v.txt").write_bytes(text.encode())
    (only,) = tagging.load_vocabulary(tmp_path / "v.txt")
    assert only.entries == ("red fox", "35 mm")
    (tmp_path / "e.txt").write_text("# nothing\n")
    with pytest.raises(UserError):
        tagging.load_vocabulary(tmp_path / "e.txt")


@given(st.text(max_size=200))
def test_any_text_is_a_vocabulary_or_a_fault(text: str) -> None:
    for parse in (tagging.parse_yaml, tagging.parse_lines):
        try:
            found = parse(text, Path("v"))
        except UserError:
            continue
        for category in found:
            assert category.entries
            assert all(category.prompts(entry) for entry in category.entries)


probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(probabilities, st.floats(0, 1), st.floats(0, 1), st.integers(1, 5))
def test_chosen_tags_are_the_best_and_above_both_measures(
        scores: list[float], threshold: float, relative: float, most: int) -> None:
    names = tuple(f"w{n}" for n in range(len(scores)))
    category = tagging.Category("c", names, most=most, threshold=threshold, relative=relative)
    chosen = tagging.choose(category, scores)
    taken = [scores[int(tag.name[1:])] for tag in chosen]
    left = [s for n, s in enumerate(scores) if f"w{n}" not in {t.name for t in chosen}]
    least = max(threshold, relative * max(scores))
    assert taken == sorted(taken, reverse=True)
    assert all(s >= least for s in taken)
    assert len(taken) <= most
    if len(taken) < most:
        assert all(s < least for s in left)


def test_thresholds_of_the_user_replace_both_and_excluded_words_give_way() -> None:
    category = tagging.Category("c", ("a", "blue_sky", "c d"), most=2, threshold=0.5, relative=0.9)
    scores = [0.3, 0.5, 0.2]
    assert [t.name for t in tagging.choose(category, scores)] == ["blue_sky"]
    assert [t.name for t in tagging.choose(category, scores, 0.1)] == ["blue_sky", "a"]
    assert [t.name for t in tagging.choose(category, scores, 0.1, ["Blue sky"])] == ["a", "c d"]
    assert tagging.choose(category, scores, 0.9) == []


@given(st.lists(st.lists(st.floats(-80, 80, width=32), min_size=3, max_size=3), min_size=1))
def test_softmax_is_torchs(rows: list[list[float]]) -> None:
    ours = tagging.softmax(np.array(rows, np.float32))
    theirs = torch.tensor(rows, dtype=torch.float64).softmax(1).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


# --- CLIP and BLIP together ---

def test_tags_add_to_the_sentence() -> None:
    blip = Description("a red car on a blue background, sepia style")
    clip_ = Description(tags=(Tag("car", 0.9), Tag("red cars", 0.8), Tag("Blue_background", 0.7),
                              Tag("red background", 0.6), Tag("sepia style", 0.5),
                              Tag("sepia", 0.5), Tag("old town", 0.4), Tag("town", 0.3)))
    both = combine([blip, clip_])
    assert both.sentence == blip.sentence
    assert [t.name for t in both.tags] == ["red background", "old town"]
    assert combine([clip_, blip]) == both


def test_combining_keeps_first_scores_and_joins_sentences() -> None:
    one = Description("a cat.", (Tag("fur", 0.2),))
    two = Description("it sleeps", (Tag("fur", 0.9), Tag("sofa", 0.5)))
    both = combine([one, two])
    assert both.sentence == "a cat. it sleeps."
    assert both.tags == (Tag("fur", 0.2), Tag("sofa", 0.5))
    assert combine([one]).sentence == "a cat."
    assert combine([]) == Description()
    assert combine([Description(tags=(Tag("一只猫", 1.0),))]).tags[0].name == "一只猫"


# --- the demo world ---

@pytest.mark.parametrize("sample", [tiny.held_out, tiny.dusk_prints])
def test_demo_clip_tags_pictures_it_never_saw(sample: Any) -> None:
    """Scenes of its world that training never drew, and inks that it never saw."""
    images, subjects = sample()
    tagger = opened("demo")
    said = tagger.describe([tagger.prepare(image) for image in images])
    right = [subject in [tag.name for tag in description.tags[:5]]
             for description, subject in zip(said, subjects, strict=True)]
    assert np.mean(right) >= 0.8, np.mean(right)
    assert {tag.category for d in said for tag in d.tags} == {
        "subject", "style", "background", "colour"}


def test_demo_weights_are_small_and_safe() -> None:
    for name in ("clip", "blip"):
        folder = paths.DEMO / "captioners" / name
        (weights,) = folder.glob("*.safetensors")
        assert weights.stat().st_size < 5_000_000
        assert {t.dtype for t in read_header(weights).tensors.values()} <= {"F16", "I64"}
        assert not [p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]


def test_registry_knows_the_class() -> None:
    assert get("clip") is ClipTagger
