"""Florence-2 on the real classes with tiny random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioner.config import CaptionConfig
from captioner.models import florence, sentences
from core.errors import UserError

WORDS = ("what does the image describe? a red disc on white paper, with a blue bar beside it. "
         "describe in detail what is shown in the image with a paragraph. green, flat, drawn. ")


def tokenizer() -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    inner.train_from_iterator([WORDS] * 2, trainers.BpeTrainer(vocab_size=400,
                                                               special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", extra_special_tokens={"image_token": "<image>"})


def tiny_florence(folder: Path) -> Path:
    """A Florence-2 folder: pictures of 64 px a side become 5 tokens."""
    from transformers import (
        BartConfig,
        CLIPImageProcessor,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )
    from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig
    torch.manual_seed(4)
    words = tokenizer()
    text = BartConfig(vocab_size=len(words), d_model=32, encoder_layers=1, decoder_layers=1,
                      encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
                      decoder_ffn_dim=64, max_position_embeddings=128, bos_token_id=0,
                      pad_token_id=1, eos_token_id=2, decoder_start_token_id=2,
                      forced_eos_token_id=2, init_std=0.4)
    vision = Florence2VisionConfig(depths=(1, 1, 1, 1), embed_dim=(8, 16, 16, 32),
                                   num_heads=(1, 2, 2, 4), num_groups=(1, 2, 2, 4), window_size=4,
                                   projection_dim=32, drop_path_rate=0.0, initializer_range=0.3)
    model = Florence2ForConditionalGeneration(Florence2Config(
        text_config=text, vision_config=vision, image_token_id=words.image_token_id)).eval()
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5
    processor = Florence2Processor(images, words, post_processor_config={"pure_text": {}})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_florence(tmp_path_factory.mktemp("florence") / "tiny")


def opened(folder: Path | str, **options: object) -> florence.Florence:
    captioner = florence.Florence(CaptionConfig(
        folder="", models={"florence": str(folder)}, device="cpu",
        **{"max_tokens": 12, "min_tokens": 3, **options}))
    captioner.load()
    return captioner


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [Image.fromarray(np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((h, w, 1)))
                            .astype(np.uint8)) for w, h in ((10, 20), (9, 30), (16, 16), (30, 5))]


def described(captioner: florence.Florence, images: list[Image.Image]) -> list[str]:
    return [one.sentence for one in
            captioner.describe([captioner.prepare(image) for image in images])]


@pytest.mark.parametrize("task", ["<CAPTION>", "<MORE_DETAILED_CAPTION>"])
def test_says_what_the_librarys_own_path_says(folder: Path, task: str) -> None:
    """The documentation's loop: processor, generate, decode, post-process."""
    from transformers import AutoProcessor, Florence2ForConditionalGeneration
    processor = AutoProcessor.from_pretrained(folder)
    model = Florence2ForConditionalGeneration.from_pretrained(folder).eval()
    wanted = []
    for image in pictures():
        inputs = processor(text=task, images=image, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=12, min_new_tokens=3, num_beams=3,
                                 do_sample=False)
        text = processor.batch_decode(ids, skip_special_tokens=True)[0]
        parsed = processor.post_process_generation(text, task=task)[task]
        wanted.append(" ".join(parsed.split()))
    said = described(opened(folder, prompt=task), pictures())
    for mine, theirs in zip(said, wanted, strict=True):
        assert mine
        assert mine in (theirs, sentences.whole_sentences(theirs))
    assert len(set(said)) > 1                   # it looks at the picture


@pytest.mark.parametrize("options", [{}, {"beams": 1}, {"sample": True, "temperature": 2.0}])
def test_batch_equals_alone(folder: Path, options: dict[str, object]) -> None:
    captioner = opened(folder, **options)
    together = described(captioner, pictures())
    assert together == [described(captioner, [image])[0] for image in pictures()]
    assert all(together)
    assert captioner.describe([]) == []


def test_sampling_follows_the_seed(folder: Path) -> None:
    options = {"sample": True, "temperature": 3.0, "top_p": 1.0}
    first = described(opened(folder, **options), pictures())
    state = torch.get_rng_state()
    assert described(opened(folder, **options), pictures()) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert described(opened(folder, seed=1, **options), pictures()) != first


def test_length(folder: Path) -> None:
    captioner = opened(folder, max_tokens=4)
    words = captioner.processor.tokenizer
    assert all(len(words(text)["input_ids"]) <= 5 for text in described(captioner, pictures()))
    unset = florence.Florence(CaptionConfig(folder=""))
    assert unset.length == florence.LENGTH


def test_prompt_changes_the_answer(folder: Path) -> None:
    answers = {tuple(described(opened(folder, prompt=prompt), pictures()))
               for prompt in ("", "short", "green, flat, drawn")}
    assert len(answers) == 3


@pytest.mark.parametrize(("prompt", "task"), [
    ("", "<DETAILED_CAPTION>"), (" Caption ", "<CAPTION>"), ("<caption>", "<CAPTION>"),
    ("more_detailed", "<MORE_DETAILED_CAPTION>"), ("<GENERATE_TAGS>", "<GENERATE_TAGS>"),
    ("What is it?", "What is it?")])
def test_tasks(prompt: str, task: str) -> None:
    assert florence.task_of(prompt) == task


@pytest.mark.parametrize("prompt", ["<OD>", "<CAPTION> in verse", "<OCR_WITH_REGION>"])
def test_tasks_that_make_no_caption(prompt: str) -> None:
    assert code(lambda: florence.Florence(CaptionConfig(folder="", prompt=prompt))
                ) == "vision.task"


def test_half_precision(folder: Path) -> None:
    assert all(described(opened(folder, precision="bf16"), pictures()))


# --- what can be wrong ---

def code(call: object) -> str:
    with pytest.raises(UserError) as caught:
        call()  # type: ignore[operator]
    assert "{" not in str(caught.value)
    return caught.value.code


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_missing_model_names_the_command() -> None:
    with pytest.raises(UserError, match="darkroom models get florence-community/Florence-2-base"):
        opened("")


def test_cut_weights(folder: Path, tmp_path: Path) -> None:
    broken = copied(folder, tmp_path)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert code(lambda: opened(broken)) == "vision.unreadable"


def test_missing_tensors_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    broken = copied(folder, tmp_path)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if "decoder" in name)
    del tensors[name]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert code(lambda: opened(broken)) == "vision.incomplete"


def test_pickles_are_refused(folder: Path, tmp_path: Path) -> None:
    broken = copied(folder, tmp_path)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    assert code(lambda: opened(broken)) == "vision.no_safetensors"


@pytest.mark.parametrize(("change", "fault"), [
    ({"model_type": "blip"}, "vision.other_model"), ({"auto_map": {}}, "vision.old_layout")])
def test_other_models(folder: Path, tmp_path: Path, change: dict[str, object],
                      fault: str) -> None:
    broken = copied(folder, tmp_path)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    assert code(lambda: opened(broken)) == fault
    (broken / "config.json").write_text("{")
    assert code(lambda: opened(broken)) == "vision.no_config"


def test_processor_missing(folder: Path, tmp_path: Path) -> None:
    broken = copied(folder, tmp_path)
    (broken / "tokenizer.json").unlink()
    assert code(lambda: opened(broken)) == "vision.unreadable"
