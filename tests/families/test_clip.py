"""Texts of more than 75 tokens on CLIP bases, and clip skip: against straightforward references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTokenizer

from core import families
from core.config import TrainConfig
from core.config.draw import DrawConfig
from core.dataset.text_embeddings import batched, unread
from core.errors import UserError
from core.families import clip
from core.families.base import CropInfo, Family, Parts, Reading
from core.families.loading import TOKENIZER
from core.families.text import padded
from core.inference import draw, generate
from core.jobs.control import Control
from core.jobs.events import Note
from core.training.trainer import Trainer
from core.weights.precision import choose
from tests import tiny
from tests.tiny import families as tiny_families
from tests.training.test_trainer import run, trainer_of

WORDS = ("cat", "dog", "red", "big", "tree", "house", "the", "of")      # one token each
LONG = " ".join(WORDS[n % 7] for n in range(100))                       # two chunks
SHORT = "a red cat"
READERS = ("sd15", "sd2", "sdxl")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return CLIPTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module", params=READERS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
           ) -> tuple[Family, Parts]:
    name = str(request.param)
    folder = tmp_path_factory.mktemp(name) / "base"
    source = tiny.tiny_base(folder) if name == "sd15" else tiny_families.base(name, folder)
    family = families.get(name)
    return family, family.load(source, choose("fp32", "cpu"))


def reference(tokenizer: Any, text: str, chunks: int, most: int) -> list[int]:
    """Word by word: every chunk is a text of its own for the library's tokenizer."""
    words = text.split()[:most]
    return [token for n in range(chunks) for token in padded(
        tokenizer, [" ".join(words[n * 75:(n + 1) * 75])], 77).input_ids[0].tolist()]


# --- tokens ---

@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=400), min_size=1, max_size=4),
       most=st.sampled_from([75, 150, 225, 300]))
def test_chunks_are_texts_of_their_own(tokenizer: Any, texts: list[list[str]], most: int) -> None:
    prompts = [" ".join(words) for words in texts]
    found = clip.tokenize(tokenizer, prompts, most)
    chunks = max(1, *(-(-min(len(words), most) // 75) for words in texts))
    assert found.tolist() == [reference(tokenizer, prompt, chunks, most) for prompt in prompts]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_a_short_text_s_tokens_are_the_library_s(tokenizer: Any, text: str) -> None:
    if len(tokenizer(text, add_special_tokens=False).input_ids) <= 75:
        assert torch.equal(clip.tokenize(tokenizer, [text], 225),
                           padded(tokenizer, [text], 77).input_ids)


@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.sampled_from([*WORDS, "supercalifragilistic", "猫", "a,b"]), max_size=200),
       most=st.sampled_from([75, 150]))
def test_what_is_not_read_is_the_end(sd15: tuple[Family, Parts], words: list[str], most: int
                                     ) -> None:
    family, parts = sd15
    parts.reading = Reading(most)
    text = " ".join(words)
    rest = unread(family, parts, text)
    assert text.endswith(rest)
    read = text[:len(text) - len(rest)]
    assert family.count_tokens(parts, [read])[0] <= most
    if rest:
        first = rest.split()[0]
        assert family.count_tokens(parts, [read + first])[0] > most


@pytest.fixture(scope="module")
def sd15(base: Path) -> tuple[Family, Parts]:
    family = families.get("sd15")
    return family, family.load(base, choose("fp32", "cpu"), frozenset({"text"}))


# --- states ---

def test_states_of_chunks_stand_one_behind_the_other(loaded: tuple[Family, Parts]) -> None:
    family, parts = loaded
    words = LONG.split()
    whole = family.encode_text(parts, [LONG])
    ones = [family.encode_text(parts, [" ".join(part)]) for part in (words[:75], words[75:])]
    for name, value in whole.items():
        if name == "pooled":                # of the first chunk
            torch.testing.assert_close(value, ones[0][name])
        else:
            torch.testing.assert_close(value, torch.cat([one[name] for one in ones], 1))
    short = family.encode_text(parts, [SHORT])
    both = family.encode_text(parts, [SHORT, LONG])
    empty = family.encode_text(parts, [""])
    for name, value in short.items():
        own = value if name == "pooled" else torch.cat([value, empty[name]], 1)
        torch.testing.assert_close(both[name][:1], own)


def test_a_caption_isn_t_changed_by_its_neighbours(loaded: tuple[Family, Parts]) -> None:
    """A batch of a short and a long caption is what each is alone; without the mask it isn't."""
    family, parts = loaded
    rows = [family.encode_text(parts, [text]) for text in (SHORT, LONG)]
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(3)
    noisy, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([300, 700])
    size_conditioning = family.size_conditioning(CropInfo((32, 32), (0, 0), (32, 32)))

    def predict(cond: dict[str, Tensor], which: slice) -> Tensor:
        count = len(noisy[which])
        more = {name: value.repeat(count, 1) for name, value in size_conditioning.items()}
        with torch.no_grad():
            return family.predict(parts.denoiser, noisy[which], t[which], cond | more)
    together = batched(rows, device)
    assert together["mask"].tolist() == [[1.0] * 77 + [0.0] * 77, [1.0] * 154]
    alone = torch.cat([predict(batched([row], device), slice(n, n + 1))
                       for n, row in enumerate(rows)])
    torch.testing.assert_close(predict(together, slice(None)), alone, atol=2e-6, rtol=1e-5)
    blind = {name: value for name, value in together.items() if name != "mask"}
    assert (predict(blind, slice(None)) - alone)[0].abs().max() > 1e-4
    assert "mask" not in batched(rows[:1] * 2, device)      # no slower attention where none is


# --- a run ---

def config(base: Path, folder: Path, captions: tuple[str, ...], **changes: Any) -> TrainConfig:
    pictures = tiny.pictures(folder / "pictures", len(captions))
    for path, caption in zip(sorted(pictures.glob("*.txt")), captions, strict=True):
        path.write_text(caption, "utf-8")
    return TrainConfig.model_validate({
        "base_model": str(base), "train_data_dir": str(pictures), "output_dir": str(folder / "out"),
        "output_name": "ink", "lora_rank": 2, "batch_size": len(captions), "max_train_steps": 2,
        "learning_rate": 1e-2, "device": "cpu", "save_precision": "fp32", **changes})


@pytest.mark.parametrize("text_lr", [0.0, 1e-3])
def test_captions_of_any_length_learn_together(base: Path, tmp_path: Path, text_lr: float) -> None:
    """One batch of a short and a long caption has the gradient of two batches of one, the text
    encoder's too; and the second chunk counts."""
    made = config(base, tmp_path, (SHORT, LONG), text_encoder_lr=text_lr, batch_size=2)

    def gradient(**changes: Any) -> list[Tensor]:
        trainer = trainer_of(made.with_changes(**changes))
        for n, parameter in enumerate(trainer.parameters):
            torch.manual_seed(n)
            parameter.data = torch.randn_like(parameter) * 0.1
        trainer.accumulate(trainer.sampler.update(0))
        return [p.grad for p in trainer.parameters if p.grad is not None]
    together, apart = gradient(), gradient(batch_size=1, gradient_accumulation_steps=2)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    cut = gradient(max_tokens=75)
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(together, cut, strict=True))


def test_what_max_tokens_cuts_is_told_and_kept_in_the_file(base: Path, tmp_path: Path) -> None:
    result, events = run(config(base, tmp_path, (SHORT, LONG), max_tokens=75, clip_skip=2,
                                sample_prompts=[LONG], sample_every=2, sample_inference_steps=1))
    (note,) = [e for e in events if isinstance(e, Note) and e.key == "engine.caption_too_long"]
    assert (note.params["count"], note.params["limit"], note.params["tokens"]) == (1, 75, 100)
    assert note.params["rest"] == " ".join(LONG.split()[75:])
    with safe_open(result["lora"], "pt") as file:
        told = file.metadata()
    assert (told["ss_clip_skip"], told["ss_max_token_length"]) == ("2", "None")
    assert "Clip skip: 2" in Image.open(result["samples"][0]).info["parameters"]
    assert result["proof"]["ok"]
    longer, events = run(config(base, tmp_path / "b", (SHORT, LONG)))
    assert not [e for e in events if isinstance(e, Note) and e.key == "engine.caption_too_long"]
    with safe_open(longer["lora"], "pt") as file:
        told = file.metadata()
    assert (told["ss_clip_skip"], told["ss_max_token_length"]) == ("1", "225")


def test_other_families_tell_that_both_keys_do_nothing(tmp_path: Path) -> None:
    base = tiny_families.base("sdxl", tmp_path / "base")
    _, events = run(config(base, tmp_path, (SHORT,), clip_skip=2, max_train_steps=1))
    (note,) = [e for e in events if isinstance(e, Note) and e.key == "engine.not_for_family"]
    assert note.params["keys"] == "clip_skip"


# --- clip skip ---

def test_clip_skip_is_an_earlier_layer_behind_the_last_norm(sd15: tuple[Family, Parts]) -> None:
    family, parts = sd15
    encoder, tokenizer = parts.text["text_encoder"], parts.text["tokenizer"]
    ids = padded(tokenizer, [SHORT], 77).input_ids
    with torch.no_grad():
        layers = encoder(ids, output_hidden_states=True).hidden_states
        wanted = {skip: encoder.final_layer_norm(layers[-skip]) for skip in (1, 2)}
    found = {}
    for skip in (1, 2):
        parts.reading = Reading(225, skip)
        found[skip] = family.encode_text(parts, [SHORT])["text"]
        torch.testing.assert_close(found[skip], wanted[skip])
    assert (found[1] - found[2]).abs().max() > 1e-3
    parts.reading = Reading(225, 3)
    with pytest.raises(UserError, match="2 layers"):
        family.encode_text(parts, [SHORT])
    parts.reading = Reading()


def test_a_run_reads_as_clip_skip_says(base: Path, tmp_path: Path) -> None:
    """And a cache of another setting isn't taken for it."""
    made = config(base, tmp_path, (SHORT,))
    first, second = (trainer_of(made.with_changes(clip_skip=skip)) for skip in (1, 2))

    def states(trainer: Trainer) -> Tensor:
        return trainer.cond([SHORT])["text"]
    assert (states(first) - states(second)).abs().max() > 1e-3
    live = trainer_of(made.with_changes(clip_skip=2, text_encoder_lr=1e-3))
    torch.testing.assert_close(states(live).detach(), states(second))


# --- drawing ---

def drawn(base: Path, out: Path, **more: Any) -> tuple[np.ndarray, str, list[Any]]:
    told: list[Any] = []
    config = DrawConfig.model_validate({"base": str(base), "prompt": SHORT, "steps": 2, "cfg": 3.0,
                                        "seed": 1, "out": str(out), "device": "cpu", **more})
    (file,) = draw.draw(config, told.append, Control())["files"]
    image = Image.open(file)
    return (np.asarray(image.convert("RGB"), np.int16), image.info["parameters"],
            [one.key for one in told if isinstance(one, Note)])


def test_all_chunks_of_a_prompt_are_drawn(base: Path, tmp_path: Path) -> None:
    whole, _, notes = drawn(base, tmp_path, prompt=LONG)
    other, _, _ = drawn(base, tmp_path, prompt=" ".join([*LONG.split()[:99], "sky"]))
    cut, _, told = drawn(base, tmp_path, prompt=LONG, max_tokens=75)
    first, _, _ = drawn(base, tmp_path, prompt=" ".join(LONG.split()[:75]))
    assert (notes, told) == ([], ["generate.prompt_too_long"])
    assert not np.array_equal(whole, other)
    assert np.array_equal(cut, first)
    assert not np.array_equal(whole, cut)
    drawn(base, tmp_path, negative=LONG)    # and a negative that is the longer one


def test_pictures_are_drawn_with_the_clip_skip_of_their_lora(base: Path, tmp_path: Path) -> None:
    loras = {skip: tiny.tiny_lora(tmp_path / f"skip{skip}.safetensors", metadata={
        "ss_base_model_version": "sd_v1", "ss_clip_skip": skip}) for skip in ("1", "2", "None")}
    last, told_last, _ = drawn(base, tmp_path, loras=[str(loras["1"])])
    second, told, notes = drawn(base, tmp_path, loras=[str(loras["2"])])
    assert notes == ["generate.clip_skip"]
    assert "Clip skip: 2" in told
    assert "Clip skip" not in told_last
    assert not np.array_equal(last, second)
    plain, _, notes = drawn(base, tmp_path, loras=[str(loras["None"])])
    assert np.array_equal(plain, last)
    assert notes == []
    by_hand, _, notes = drawn(base, tmp_path, loras=[str(loras["None"])], clip_skip=2)
    assert np.array_equal(by_hand, second)
    chosen, _, notes = drawn(base, tmp_path, loras=[str(loras["2"])], clip_skip=1)
    assert np.array_equal(chosen, last)
    assert notes == ["generate.other_clip_skip"]
    both = [f"{loras[skip]}:0.5" for skip in ("2", "1")]
    assert drawn(base, tmp_path, loras=both)[2] == ["generate.other_clip_skip"]


def test_weights_move_the_states_of_their_words(loaded: tuple[Family, Parts]) -> None:
    """Of 1 nothing, of 0 to those of an empty prompt; BREAK begins another chunk."""
    family, parts = loaded
    parts.reading = Reading()

    def states(prompt: str, weighted: bool = True) -> Tensor:
        found: Tensor = generate.read_prompt(
            family, parts, choose("fp32", "cpu"), prompt, weighted=weighted)["prompt_embeds"]
        return found
    plain, empty = states("big cat of trees"), states("")
    assert torch.allclose(states("big (cat:1.0) of trees"), plain, atol=1e-5)
    none, half, double = (states(f"big (cat:{weight}) of trees") for weight in (0, 0.5, 2))
    second = (torch.arange(clip.WHOLE) == 2)[:, None]           # behind the start and "big"
    for found, expected in ((none, empty), (half, (plain + empty) / 2),
                            (double, 2 * plain - empty)):
        assert torch.allclose(found, torch.where(second, expected, plain), atol=1e-5)
    broken = states("big cat BREAK house")
    assert broken.shape[1] == 2 * clip.WHOLE
    assert torch.allclose(broken, torch.cat([states("big cat"), states("house")], 1), atol=1e-5)
    both = generate.read_prompt(family, parts, choose("fp32", "cpu"), "big BREAK cat",
                                "(house:1.3)", weighted=True)
    assert both["negative_prompt_embeds"].shape == both["prompt_embeds"].shape
    # a caption is read as it stands: the proof of a run compares what was learned
    learned = family.prompt_arguments(*[family.encode_text(parts, ["(cat:1.5) BREAK", ""])] * 2)
    assert torch.allclose(states("(cat:1.5) BREAK", weighted=False),
                          learned["prompt_embeds"][:1], atol=1e-5)
    assert states("cat " * 300 + "BREAK (house:1.2)").shape[1] == 225 // 75 * clip.WHOLE
