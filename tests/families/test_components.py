"""Companions of single-file bases are told apart by what they are, and where that can't be told
the user is asked."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import os
import shutil
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from core import families, paths
from core.config import GenerateConfig, TrainConfig
from core.errors import UserError
from core.families import text
from core.families.base import Parts
from core.families.components import lookup, precision_copies, tokenizer_kinds, vae_hashes
from core.families.components.lookup import NO_FILES, ComponentFiles
from core.families.components.tokenizer_kinds import KINDS, TokenizerKind
from core.jobs.events import Event, Note
from core.weights.precision import Precision, choose
from tests.tiny import families as tiny_families
from tests.tiny.families import DATA

META = Precision(torch.device("meta"), *[torch.float32] * 3)
QWEN, T5, GEMMA = KINDS["qwen3"], KINDS["t5"], KINDS["gemma2"]
# Names by which a single file is told, and the shapes that its family asks for.
BASES: dict[str, dict[str, tuple[int, ...]]] = {
    "zimage": {"layers.0.adaLN_modulation.0.weight": (1,)},
    "flux2": {"single_stream_modulation.lin.weight": (1,), "img_in.weight": (3072, 128),
              "txt_in.weight": (3072, 7680), "double_blocks.0.img_mlp.0.weight": (1,),
              "single_blocks.0.linear1.weight": (1,)},
    "qwen": {"txt_norm.weight": (1,), "transformer_blocks.0.img_mod.1.weight": (1,)},
    "krea2": {"txtfusion.projector.weight": (1,), "blocks.0.attn.wq.weight": (1,)},
    "flux": {"double_blocks.0.img_attn.norm.key_norm.scale": (1,), "img_in.weight": (3072, 64),
             "guidance_in.in_layer.weight": (1,)},
}
READ = {"zimage": "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n",
        "flux2": "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"
                 "<think>\n\n</think>\n\n"}
READ["qwen"] = READ["krea2"] = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity,"
    " text, spatial relationships of the objects and background:<|im_end|>\n" + READ["zimage"])


def sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], value: bytes = b"") -> Path:
    """A safetensors file of zeros that takes no room; `value`: its first bytes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    told = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(told)) + told + value)
    os.truncate(path, 8 + len(told) + end)
    return path


@cache
def qwen(kind: str) -> Any:
    return text.open_tokenizer(paths.TOKENIZERS / "qwen2", KINDS[kind])


def qwen_folder(folder: Path, kind: str, template: str = "") -> Path:
    """As people have it: the whole tokenizer of a kind, with a template of its own."""
    made = copy.deepcopy(qwen(kind))
    made.chat_template = template or None
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: qwen_folder(tmp_path_factory.mktemp(kind) / kind, kind, "SYSTEM {{ messages }}")
            for kind in ("qwen25", "qwen3")}


def words_folder(folder: Path, words: Mapping[str, int], cls: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps({
        "model": {"type": "WordLevel", "vocab": dict(words), "unk_token": "<unk>"}}), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls}), "utf-8")
    return folder


def gemma_words(turn: int, end: int, more: Mapping[str, int] = {}) -> dict[str, int]:
    return {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<start_of_turn>": turn,
            "<end_of_turn>": turn + 1, "last": end} | dict(more)


GEMMA_2, GEMMA_3 = gemma_words(106, 255_999), gemma_words(105, 262_144)


def find(source: Path, kind: TokenizerKind, rows: int, known: ComponentFiles = NO_FILES) -> Path:
    return lookup.find_tokenizer(source, "tokenizer", kind, rows, known)


# --- tokenizers ---

def test_the_apps_own_tokenizers_are_the_published_ones() -> None:
    """Counts and numbers as the published files have them."""
    sizes = {}
    for name, kind in KINDS.items():
        if kind.folder is not None:
            made = text.open_tokenizer(kind.folder, kind)
            sizes[name] = len(made)
            assert kind.fits(made.get_vocab(), len(made))
            assert made.pad_token == kind.pad
    assert sizes == {"qwen25": 151_665, "qwen3": 151_669, "t5": 32_100}
    reads, t5 = qwen("qwen3"), text.open_tokenizer(T5.folder or Path(), T5)
    assert reads("a cat").input_ids == [64, 8251]
    assert reads("Hello, world!").input_ids == [9707, 11, 1879, 0]
    assert reads("<|im_start|><think>\n\n</think>").input_ids == [151_644, 151_667, 271, 151_668]
    assert t5("a cat").input_ids == [3, 9, 1712, 1]
    assert t5("Studies have shown that").input_ids == [6536, 43, 2008, 24, 1]
    assert t5("<extra_id_0>").input_ids == [32_099, 1]


@given(st.text(max_size=40), st.booleans())
def test_the_chat_template_is_qwens(prompt: str, thinking: bool) -> None:
    """As the one that was published with Qwen3 makes it of what a user says."""
    published = (DATA / "qwen3_chat.jinja").read_text("utf-8")
    told = [PLAIN.apply_chat_template(
        [{"role": "user", "content": prompt}], chat_template=template, tokenize=False,
        add_generation_prompt=True, enable_thinking=thinking)
        for template in (text.QWEN3_CHAT, published)]
    assert told[0] == told[1]


PLAIN: PreTrainedTokenizerFast = tiny_families.qwen_tokenizer()


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("name", READ)
def test_two_qwens_beside_each_other(name: str, order: tuple[str, str], tmp_path: Path,
                                     qwens: dict[str, Path]) -> None:
    """Both tokenizers in ComfyUI's folder, with templates that say something else."""
    models = tmp_path / "models"
    for letter, folder in zip(order, qwens.values(), strict=True):
        shutil.copytree(folder, models / "tokenizers" / f"{letter}_{folder.name}",
                        copy_function=os.link)
    source = sparse(models / f"{name}.safetensors", BASES[name])
    family = families.get(name)
    parts = family.skeleton(source, META, frozenset({"text"}))
    tokens = family.tokenize(parts, ["a cat"])
    ids = tokens["text_encoder"][0][tokens["text_encoder.mask"][0].bool()]
    assert parts.text["tokenizer"].decode(ids) == READ[name]
    known = 151_669 if name != "qwen" else 151_665
    assert len(parts.text["tokenizer"]) == known
    if name in ("qwen", "krea2"):           # 34 tokens are dropped behind the encoder
        told = READ[name].split("a cat")[0]
        assert len(parts.text["tokenizer"](told).input_ids) == 34


@pytest.mark.parametrize("name", READ)
def test_text_is_read_as_the_pipeline_reads_it(name: str, tmp_path: Path) -> None:
    """With the published template in the pipeline's tokenizer, and the whole vocabulary."""
    torch.manual_seed(3)
    pipeline = tiny_families.MADE[name]()
    pipeline.text_encoder.resize_token_embeddings(152_064, mean_resizing=False)
    pipeline.tokenizer = copy.deepcopy(qwen("qwen25" if name == "qwen" else "qwen3"))
    pipeline.tokenizer.chat_template = (DATA / "qwen3_chat.jinja").read_text("utf-8")
    family: Any = families.get(name)
    index = tmp_path / "model_index.json"
    index.write_text('{"text_encoder_select_layers": [1, 2]}')
    source = sparse(tmp_path / "base.safetensors", BASES[name]) if name != "krea2" else tmp_path
    tokenizer = copy.deepcopy(qwen("qwen25" if name == "qwen" else "qwen3"))
    tokenizer.chat_template = family.tokenizers["text_encoder"].chat or None
    encoder = getattr(pipeline.text_encoder, "model", pipeline.text_encoder)
    encoder = getattr(encoder, "language_model", encoder)
    parts = Parts(source, {}, "flow", 32, 8,
                  text={"tokenizer": tokenizer, "text_encoder": encoder.eval()})
    pipeline.text_encoder.eval()
    with torch.no_grad():
        states, mask, *_ = pipeline.encode_prompt("a red disc", device="cpu")
    found = family.encode_text(parts, ["a red disc"])
    ours = found["text"][0][found["mask"][0].bool()] if "mask" in found else found["text"][0]
    theirs = states[0]
    if name == "krea2":                     # it pads in the middle
        theirs = theirs[mask[0].bool()]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_umt5_is_no_t5(names: tuple[str, str], tmp_path: Path) -> None:
    """The same class; UMT5 has eight times the words."""
    source, kept = tmp_path / "base.safetensors", tmp_path / "tokenizers"
    words = tokenizer_kinds.words_in(T5.folder or Path())
    words_folder(kept / names[0], words | {"last": 256_299}, "T5Tokenizer")
    shutil.copytree(T5.folder or Path(), kept / names[1])
    assert find(source, T5, 32_128) == T5.folder
    other = TokenizerKind("T5", T5.marks)       # as if the app had none: the folder beside is found
    assert find(source, other, 32_128) == kept / names[1]


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_gemma_3_is_no_gemma_2(names: tuple[str, str], tmp_path: Path) -> None:
    source, kept = tmp_path / "base.safetensors", tmp_path / "tokenizers"
    three = words_folder(kept / names[0], GEMMA_3, "GemmaTokenizer")
    for words in (GEMMA_3, gemma_words(105, 200_000)):      # too many; few, but with other numbers
        shutil.rmtree(three)
        words_folder(three, words, "GemmaTokenizer")
        with pytest.raises(UserError, match="Gemma 2") as caught:
            find(source, GEMMA, 256_000)
        assert caught.value.code == "families.tokenizer_other"
    two = words_folder(kept / names[1], GEMMA_2, "GemmaTokenizer")
    assert find(source, GEMMA, 256_000) == two
    shutil.copytree(two, kept / "copy")     # is no question
    assert find(source, GEMMA, 256_000) in (two, kept / "copy")


def test_two_tokenizers_that_fit_and_differ_are_a_question(tmp_path: Path) -> None:
    source, kept = tmp_path / "base.safetensors", tmp_path / "tokenizers"
    both = [words_folder(kept / "a", GEMMA_2, "GemmaTokenizer"),
            words_folder(kept / "b", GEMMA_2 | {"ink": 300}, "GemmaTokenizer")]
    with pytest.raises(UserError) as caught:
        find(source, GEMMA, 256_000)
    assert caught.value.code == "families.tokenizer_unclear"
    assert all(str(folder) in str(caught.value) for folder in both)
    for fix, folder in zip(caught.value.fixes, both, strict=True):
        config = TrainConfig().with_changes(**fix.changes)
        assert find(source, GEMMA, 256_000, lookup.files_from_config(config)) == folder
    mine = qwen_folder(kept / "mine", "qwen3")
    told = json.loads((mine / "tokenizer.json").read_text("utf-8"))
    told["added_tokens"].append(told["added_tokens"][-1] | {"id": 151_669, "content": "<ink>"})
    (mine / "tokenizer.json").write_text(json.dumps(told), "utf-8")
    with pytest.raises(UserError) as caught:    # the app's own, or the user's with one word more
        find(source, QWEN, 151_936)
    chosen = [lookup.files_from_config(TrainConfig().with_changes(**fix.changes))
              for fix in caught.value.fixes]
    assert [find(source, QWEN, 151_936, known) for known in chosen] == [QWEN.folder, mine]


def test_an_encoder_must_know_all_words(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        find(tmp_path / "base.safetensors", QWEN, 151_000)
    assert caught.value.code == "families.tokenizer_too_large"
    assert caught.value.params["words"] == 151_669
    with pytest.raises(UserError, match="shipped"):
        find(tmp_path / "base.safetensors", GEMMA, 256_000,
             ComponentFiles(tokenizer=Path("shipped")))


# --- sentencepiece ---

# What the library itself makes of these (sentencepiece 0.2.3), without end mark.
SPOKEN = {
    "gemma_like.model": {
        "red disc": [294, 556, 310, 288, 562],
        "a  red,  disc number 42": [
            550, 547, 381, 556, 565, 547, 310, 288, 562, 313, 486, 572, 266, 547, 593, 585],
        " leading space": [547, 285, 355, 342, 287, 561, 550, 562, 548],
        "猫 cüte ﬁne": [238, 147, 178, 281, 202, 195, 549, 548, 547, 246, 179, 136, 554, 548],
        "Trains a LoRA on a laptop.": [598, 348, 551, 268, 389, 317, 268, 316, 347, 421, 564],
    },
    "t5_like.model": {
        "red disc": [3, 14, 37, 3, 26, 85, 38],
        "a  red,  disc number 42": [
            31, 3, 14, 37, 6, 3, 26, 85, 38, 3, 20, 30, 18, 54, 29, 3, 82, 57],
        " leading space": [3, 22, 8, 138, 67, 3, 4, 19, 16, 38, 8],
        "猫 cüte ﬁne": [3, 2, 3, 38, 2, 17, 8, 3, 2, 20, 8],
        "Trains a LoRA on a laptop.": [
            3, 78, 14, 16, 88, 4, 31, 93, 77, 31, 3, 22, 16, 19, 17, 105, 5],
    },
}


@pytest.mark.parametrize("name", SPOKEN)
def test_a_sentencepiece_model_alone_is_read(name: str, tmp_path: Path) -> None:
    place = "tokenizer.model" if name == "gemma_like.model" else "spiece.model"
    shutil.copyfile(DATA / name, tmp_path / place)
    made = text.open_tokenizer(tmp_path, GEMMA if place == "tokenizer.model" else T5)
    for prompt, ids in SPOKEN[name].items():
        assert made(prompt, add_special_tokens=False).input_ids == ids, prompt
    whole = made("red disc").input_ids
    assert whole == ([2, *SPOKEN[name]["red disc"]] if place == "tokenizer.model"
                     else [*SPOKEN[name]["red disc"], 1])
    assert text.padded(made, ["red", ""], 16).input_ids.shape == (2, 16)


def field(number: int, value: bytes | float | int) -> bytes:
    """A protobuf field."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    return (bytes([value & 127 | 128]) + varint(value >> 7)) if value > 127 else bytes([value])


def t5_model() -> bytes:
    """T5's spiece.model, made of the words in its tokenizer.json."""
    assert T5.folder is not None
    told = json.loads((T5.folder / "tokenizer.json").read_text("utf-8"))
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    pieces = b"".join(field(1, field(1, word.encode()) + field(2, float(score))
                            + field(3, kinds.get(word, 1)))
                      for word, score in told["model"]["vocab"][:32_000])
    table = base64.b64decode(told["normalizer"]["normalizers"][0]["precompiled_charsmap"])
    return pieces + field(2, field(3, 1) + field(40, 2)) + field(3, field(2, table))


def test_t5s_spiece_model_gives_the_tokens_of_its_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(t5_model())
    assert T5.folder is not None
    ours, theirs = text.open_tokenizer(tmp_path, T5), AutoTokenizer.from_pretrained(T5.folder)
    assert ours.get_vocab() == theirs.get_vocab()
    told = (paths.ROOT / "README.zh-CN.md").read_text("utf-8") + (
        paths.ROOT / "README.md").read_text("utf-8")
    lines = [*told.splitlines()[:200], "  two   spaces ", "\ufb01ne \u2460 \t tab", "", "a </s> b"]
    assert [ours(line).input_ids for line in lines] == [theirs(line).input_ids for line in lines]
    digests = {tokenizer_kinds.digest(tokenizer_kinds.words_in(f)) for f in (tmp_path, T5.folder)}
    assert len(digests) == 1                # so that nobody is asked which of the two is meant


@given(st.binary(max_size=200), st.integers(0, 9000))
def test_torn_models_are_told(data: bytes, cut: int) -> None:
    whole = (DATA / "gemma_like.model").read_bytes()
    for content in (data, whole[:cut], whole[:cut] + data):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "is_file", lambda self: self.name == "spiece.model")
            patch.setattr(Path, "read_bytes", lambda self, content=content: content)
            with contextlib.suppress(ValueError):
                found = tokenizer_kinds.pieces_in(Path("anywhere"))
                assert found is not None
                assert found.pieces


# --- weights ---

def t5_file(path: Path, words: int = 32_128, value: bytes = b"") -> Path:
    return sparse(path, {"shared.weight": (words, 4096),
                         "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64)}, value)


def qwen_file(path: Path, width: int, value: bytes = b"") -> Path:
    return sparse(path, {"model.embed_tokens.weight": (151_936, width),
                         "model.layers.0.self_attn.q_norm.weight": (128,)}, value)


def vae_file(path: Path, value: bytes, channels: int = 16) -> Path:
    return sparse(path, {"decoder.conv_in.weight": (512, channels, 3, 3),
                         "encoder.conv_in.weight": (128, 3, 3, 3)}, value)


def config_of(family: str, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((paths.family_configs(family) / part / "config.json"
                                        ).read_text("utf-8"))
    return found


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_encoders_are_told_by_their_words_and_widths(names: tuple[str, str], tmp_path: Path
                                                     ) -> None:
    source, (one, other) = tmp_path / "base.safetensors", names
    t5_file(tmp_path / "clip" / f"{one}.safetensors", 256_384)
    wanted = t5_file(tmp_path / "clip" / f"{other}.safetensors")
    t5_config = config_of("flux", "text_encoder_2")
    assert lookup.find_file(source, "t5", t5_config, NO_FILES) == wanted
    qwen_file(tmp_path / f"{one}_8b.safetensors", 4096)
    small = qwen_file(tmp_path / f"{other}_4b.safetensors", 2560)
    assert lookup.find_file(source, "qwen3", config_of("zimage", "text_encoder"), NO_FILES) == small


def test_two_files_that_fit_and_differ_are_a_question(tmp_path: Path) -> None:
    source, config = tmp_path / "base.safetensors", config_of("zimage", "text_encoder")
    both = [qwen_file(tmp_path / f"{name}.safetensors", 2560, name.encode()) for name in "xy"]
    os.link(both[0], tmp_path / "copy of x.safetensors")       # is no third
    with pytest.raises(UserError) as caught:
        lookup.find_file(source, "qwen3", config, NO_FILES)
    fault = caught.value
    assert (fault.code, fault.params["count"], len(fault.fixes)) == (
        "families.companion_unclear", 2, 2)
    for fix, path in zip(fault.fixes, (tmp_path / "copy of x.safetensors", both[1]), strict=True):
        assert fix.params["file"] == path.name
        known = lookup.files_from_config(TrainConfig().with_changes(**fix.changes))
        assert lookup.named(known, "text", "qwen3") == path
        assert lookup.named(known, "text", "t5") is None


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_vaes_of_the_same_shapes_are_told_by_their_content(
        names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published files are known by their SHA-256; here two others stand for them."""
    source = tmp_path / "base.safetensors"
    made = {model: vae_file(tmp_path / "vae" / f"{name}.safetensors", model.encode())
            for model, name in zip(("flux", "sd3"), names, strict=True)}
    monkeypatch.setattr(vae_hashes, "FILES", {
        vae_hashes.sha256(path): model for model, path in made.items()})
    vae_file(tmp_path / "vae" / "video.safetensors", b"", 48)
    for model, family in (("flux", "flux"), ("flux", "zimage"), ("sd3", "sd3")):
        found = lookup.find_file(source, "vae_16", config_of(family, "vae"), NO_FILES)
        assert found == made[model]
    made["flux"].unlink()
    with pytest.raises(UserError, match="Stable Diffusion 3") as caught:
        lookup.find_file(source, "vae_16", config_of("flux", "vae"), NO_FILES)
    assert caught.value.code == "families.companion_foreign"
    assert caught.value.fixes[0].changes == {"vae": str(made["sd3"])}
    own = [vae_file(tmp_path / f"own_{n}.safetensors", bytes([n])) for n in (1, 2)]
    with pytest.raises(UserError) as caught:    # neither is known
        lookup.find_file(source, "vae_16", config_of("flux", "vae"), NO_FILES)
    assert [fix.changes for fix in caught.value.fixes] == [{"vae": str(path)} for path in own]


def test_the_published_vaes_belong_to_known_models() -> None:
    assert {vae_hashes.model_of(config_of(family, "vae")) for family in (
        "flux", "chroma", "zimage", "lumina2")} == {"flux"}
    assert [vae_hashes.model_of(config_of(family, "vae")) for family in ("sd3", "qwen", "krea2")
            ] == ["sd3", "qwen", "qwen"]
    assert all(len(known) == 64 for known in vae_hashes.FILES)
    assert {*vae_hashes.FILES.values()} == vae_hashes.TITLES.keys()


# --- what is told ---

def test_a_tokenizer_of_the_bases_own_may_be_named(tmp_path: Path) -> None:
    folder = tiny_families.base("flux", tmp_path / "flux")
    named = ComponentFiles(tokenizer=folder / "tokenizer_2")
    found = {one.part: one.path for one in families.get("flux", named).beside(folder)}
    assert found["tokenizer_2"] == folder / "tokenizer_2"


def test_a_torn_file_beside_a_whole_tokenizer_is_not_read(tmp_path: Path) -> None:
    """git-lfs leaves pointers in its place."""
    folder = words_folder(tmp_path / "tokenizer", gemma_words(106, 107), "GemmaTokenizerFast")
    (folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    assert find(tmp_path / "x.safetensors", KINDS["gemma2"], 256_000) == folder
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError) as caught:
        find(tmp_path / "x.safetensors", KINDS["gemma2"], 256_000)
    assert caught.value.code == "families.tokenizer_unreadable"



def test_a_base_tells_what_it_is_used_with(tmp_path: Path) -> None:
    source = sparse(tmp_path / "zimage.safetensors", BASES["zimage"])
    vae_file(tmp_path / "vae" / "ae.safetensors", b"1")
    qwen_file(tmp_path / "clip" / "qwen_3_4b.safetensors", 2560)
    events: list[Event] = []
    found = lookup.announce(families.get("zimage"), source, events.append)
    assert [(one.part, one.path and one.path.name) for one in found] == [
        ("vae", "ae.safetensors"), ("text_encoder", "qwen_3_4b.safetensors"), (
            "tokenizer", "qwen2")]
    assert isinstance(events[0], Note)
    told = lookup.metadata(found)
    assert told["ss_vae_name"] == "ae.safetensors"
    assert told["ss_new_vae_hash"].startswith(found[0].digest[:10])
    assert told["ss_new_vae_hash"][:10] in events[0].params["files"]
    with pytest.MonkeyPatch.context() as patch:     # as if it were the published one of SD 3
        patch.setattr(vae_hashes, "FILES", {vae_hashes.sha256(tmp_path / "vae" / "ae.safetensors"):
                                            "sd3"})
        known = ComponentFiles(vae=tmp_path / "vae" / "ae.safetensors")
        lookup.announce(families.get("zimage", known), source, events.append)
    assert [note.key for note in events if isinstance(note, Note)] == [
        "families.companions_taken", "families.companions_taken", "families.companion_odd"]
    assert (len(told["ss_vae_hash"]), told["darkroom.tokenizer_name"]) == (8, "qwen2")
    assert set(lookup.summary(found)) == {"vae", "text_encoder", "tokenizer"}


@pytest.mark.parametrize(("size", "told"), [(1.0, 0), (0.24, 1), (4.2, 1)])
def test_latents_of_another_scale_are_told(size: float, told: int) -> None:
    """SD 3's VAE beside Flux: 0.653 * 0.3611; Flux's beside SD 3: 2.77 * 1.5305."""
    generator = torch.Generator().manual_seed(1)
    latents = [size * torch.randn(16, 32, 24, generator=generator) for _ in range(4)]
    vae = lookup.UsedComponent("vae", Path("ae.safetensors"), "1", "2")
    for beside in ([vae], []):
        notes: list[Any] = []
        lookup.tell_scale(beside, latents, False, notes.append)
        assert len(notes) == (told if beside else 0)
        assert all(float(note.params["size"]) == pytest.approx(size, rel=0.02) for note in notes)
    masked = [torch.cat([one, torch.full((1, 32, 24), 99.0)]) for one in latents]
    lookup.tell_scale([vae], masked, True, notes.append)    # the mask is no latent
    assert len(notes) == told


def test_a_named_file_without_use_is_refused(tmp_path: Path) -> None:
    source = sparse(tmp_path / "zimage.safetensors", BASES["zimage"])
    vae = vae_file(tmp_path / "vae" / "ae.safetensors", b"1")
    reader = qwen_file(tmp_path / "clip" / "qwen_3_4b.safetensors", 2560)
    t5 = t5_file(tmp_path / "elsewhere" / "t5.safetensors")
    for known in (ComponentFiles(vae=reader), ComponentFiles(text_encoders=(reader, t5)),
                  ComponentFiles(text_encoders=(vae,))):
        with pytest.raises(UserError) as caught:
            families.get("zimage", known).beside(source)        # type: ignore[attr-defined]
        assert caught.value.code == "families.companion_unused"
    with pytest.raises(UserError) as caught:
        families.get("sd15", ComponentFiles(tokenizer=QWEN.folder)).beside(     # type: ignore[attr-defined]
            paths.DEMO / "base")
    assert caught.value.code == "families.tokenizer_unused"
    with pytest.raises(UserError) as caught:
        lookup.files_from_config(GenerateConfig(base="x", vae=str(tmp_path / "no.safetensors")))
    assert caught.value.code == "families.companion_not_there"
    assert choose("fp32", "cpu").vae == torch.float32


# --- the same in other numbers ---

def weights(scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Of T5's names, in the size of its weights, as fp32."""
    generator = torch.Generator().manual_seed(4)
    return {f"encoder.block.{n}.layer.0.SelfAttention.{which}.weight": scale * torch.randn(
        1024, 64, generator=generator) for n in range(3) for which in "qkvo"}


def rounded(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) for name, value in state.items()}


def tensorwise(state: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """ComfyUI's marks of numbers: int8_tensorwise, and others that aren't read."""
    found = {}
    for name, value in state.items():
        layer = name.removesuffix(".weight")
        scale = value.abs().max().float() / 127
        mark = json.dumps({"format": kind}).encode()
        found |= {name: (value.float() / scale).round().to(torch.int8),
                  f"{layer}.weight_scale": scale,
                  f"{layer}.comfy_quant": torch.tensor(list(mark), dtype=torch.uint8)}
    return found


def scaled(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As ComfyUI has it."""
    found = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name, value in state.items():
        scale = value.abs().max() / 448
        found[name] = (value / scale).to(torch.float8_e4m3fn)
        found[name.replace(".weight", ".scale_weight")] = scale
    return found


def test_the_same_weights_in_other_numbers_are_no_question(tmp_path: Path) -> None:
    """The finest is taken; a model that was changed a little is another."""
    half = rounded(weights(0.02), torch.float16)
    files = {"fp8": rounded(half, torch.float8_e4m3fn), "fp16": half,
             "bf16": rounded(weights(0.02), torch.bfloat16), "scaled": scaled(half),
             "int8": tensorwise(half, "int8_tensorwise")}
    for name, state in files.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    found = [tmp_path / f"{name}.safetensors" for name in files]
    assert precision_copies.finest(found) == [tmp_path / "fp16.safetensors"]
    assert precision_copies.finest(reversed(found)) == [tmp_path / "fp16.safetensors"]
    config = {"vocab_size": 1, "d_model": 1}        # files without a table of words fit any
    save_file(tensorwise(half, "nvfp4"), tmp_path / "nvfp4.safetensors")
    assert lookup.find_file(tmp_path / "base", "t5", config, NO_FILES) == found[1]
    # What is left after a direction is taken out of each weight, as for "abliterated" models.
    along = torch.nn.functional.normalize(torch.randn(1024, 1), dim=0)
    bent = {name: value.float() - along @ (along.T @ value.float())
            for name, value in half.items()}
    for name, state in (("fp8", rounded(bent, torch.float8_e4m3fn)), ("scaled", scaled(bent)),
                        ("fp16", rounded(bent, torch.float16))):
        save_file(state, tmp_path / "other.safetensors")
        pair = [tmp_path / "fp16.safetensors", tmp_path / "other.safetensors"]
        assert precision_copies.finest(pair) == pair, name
        os.utime(tmp_path / "other.safetensors", ns=(0, len(name) * 1000 + ord(name[0])))


def test_the_window_sends_whole_paths() -> None:
    from gui.tabs.parameters import startable
    config = startable(TrainConfig(vae="ae.safetensors", text_encoders=["t5.safetensors"],
                                   tokenizer="shipped"))
    assert Path(config.vae).is_absolute()
    assert [Path(path).is_absolute() for path in config.text_encoders] == [True]
    assert config.tokenizer == "shipped"
    assert startable(TrainConfig()).vae == ""
