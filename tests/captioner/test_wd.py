"""captioner/models/wd.py on a tiny ONNX model with the taggers' own signature."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner.config import CaptionConfig
from captioner.models import wd
from core.errors import UserError

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

SIDE = 16
TAGS = [("sensitive", 9), ("explicit", 9), ("long_hair", 0), ("^_^", 0), ("1girl", 0),
        ("red_disc", 0), ("hatsune_miku", 4), ("saber_(fate)", 4), ("artist_name", 1)]


def tiny_tagger(folder: Path, batch: int | str = "N", tags: int = len(TAGS)) -> Path:
    """sigmoid(mean over pixels x weights), input (N, 16, 16, 3) float32, output (N, tags)."""
    from onnx import TensorProto, helper, numpy_helper
    rng = np.random.default_rng(3)
    weights = rng.normal(0, 0.04, (3, tags)).astype(np.float32)
    nodes = [helper.make_node("ReduceMean", ["input_1:0", "axes"], ["mean"], keepdims=0),
             helper.make_node("MatMul", ["mean", "weights"], ["logits"]),
             helper.make_node("Sigmoid", ["logits"], ["output"])]
    graph = helper.make_graph(
        nodes, "tagger",
        [helper.make_tensor_value_info("input_1:0", TensorProto.FLOAT, [batch, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, tags])],
        [numpy_helper.from_array(weights, "weights"),
         numpy_helper.from_array(np.array([1, 2], np.int64), "axes")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(folder / "model.onnx"))
    with open(folder / "selected_tags.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["tag_id", "name", "category", "count"])
        rows.writerows([[i, name, category, 9] for i, (name, category) in enumerate(TAGS)])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tagger(tmp_path_factory.mktemp("wd") / "tiny")


def opened(folder: Path | str, **options: object) -> wd.WdTagger:
    tagger = wd.WdTagger(CaptionConfig(folder="", models={"wd": str(folder)}, **options))
    tagger.load()
    return tagger


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8))
            for w, h in ((40, 20), (9, 30), (16, 16), (64, 64))]


def plain_scores(folder: Path, image: Image.Image) -> np.ndarray:
    """The model's documentation, step by step: pad white, resize, RGB to BGR, run."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), (255, 255, 255))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    array = np.asarray(canvas.resize((SIDE, SIDE), Image.BICUBIC), np.float32)[:, :, ::-1]
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    return session.run(None, {"input_1:0": array[None]})[0][0]


@pytest.mark.parametrize("batch", ["N", 1])
def test_tags_and_scores_are_the_models_own(tmp_path: Path, batch: int | str) -> None:
    folder = tiny_tagger(tmp_path / "model", batch)
    tagger = opened(folder, tag_threshold=0.0, character_threshold=0.0)
    images = pictures()
    for image, found in zip(images, tagger.describe([tagger.prepare(i) for i in images]),
                            strict=True):
        scores = plain_scores(folder, image)
        wanted = {wd.written(name): scores[i] for i, (name, c) in enumerate(TAGS) if c in (0, 4)}
        assert {tag.name: tag.score for tag in found.tags} == pytest.approx(wanted, abs=1e-6)
        ordered = [tag.score for tag in found.tags]
        assert ordered == sorted(ordered, reverse=True)
        assert found.sentence == ""


def test_batch_equals_alone(folder: Path) -> None:
    tagger = opened(folder, tag_threshold=0.1)
    ready = [tagger.prepare(image) for image in pictures()]
    assert tagger.describe(ready) == [tagger.describe([one])[0] for one in ready]
    assert tagger.describe([]) == []


def test_thresholds_by_category(folder: Path) -> None:
    image = pictures()[0]
    scores = plain_scores(folder, image)
    tagger = opened(folder)
    assert tagger.thresholds == {"general": 0.35, "character": 0.85}
    for general, character in ((0.35, 0.85), (0.9, 0.0), (0.0, 1.0)):
        tagger = opened(folder, tag_threshold=general, character_threshold=character)
        names = {tag.name for tag in tagger.describe([tagger.prepare(image)])[0].tags}
        assert names == {wd.written(name) for i, (name, category) in enumerate(TAGS)
                         if (category == 0 and scores[i] >= general)
                         or (category == 4 and scores[i] >= character)}


def all_tags(folder: Path, **options: object) -> dict[str, str]:
    tagger = opened(folder, tag_threshold=0.0, character_threshold=0.0, **options)
    return {tag.name: tag.category
            for tag in tagger.describe([tagger.prepare(pictures()[0])])[0].tags}


def test_names_categories_and_the_exclude_list(folder: Path) -> None:
    assert all_tags(folder) == {
        "long hair": "general", "^_^": "general", "1girl": "general", "red disc": "general",
        "hatsune miku": "character", "saber (fate)": "character"}
    assert "long_hair" in all_tags(folder, underscores=True)
    assert "saber \\(fate\\)" in all_tags(folder, escape_brackets=True)
    left = all_tags(folder, exclude=["Long Hair", "saber_(fate)", "^_^"])
    assert set(left) == {"1girl", "red disc", "hatsune miku"}
    assert len(all_tags(folder, most_tags=2)) == 2


@pytest.mark.parametrize("face", ["^_^", ">_<", "o_o", "0_0", "(o)_(o)", "|_|", "3_3", "+_-",
                                  "<|>_<|>", "x_x", "._."])
def test_faces_keep_their_underscores(face: str) -> None:
    assert wd.written(face) == face


@given(st.text(alphabet="ab_() 1", min_size=1, max_size=20))
def test_written_changes_underscores_and_brackets_only(name: str) -> None:
    assert wd.written(name, underscores=True) == name
    assert wd.written(name).replace("_", " ") == name.replace("_", " ")
    assert wd.written(name, True, True).replace("\\", "") == name


def test_square_keeps_the_whole_picture_on_white() -> None:
    image = Image.new("RGB", (32, 16), (255, 0, 0))
    pixels = wd.square(image, 32)
    assert pixels.shape == (32, 32, 3)
    assert (pixels[16] == (0, 0, 255)).all()                # BGR
    assert (pixels[0] == 255).all()
    assert wd.square(Image.new("L", (8, 8)), 16).shape == (16, 16, 3)


# --- taggers of other kinds ---

def other_tagger(folder: Path, shape: list[int | str], kind: str = "FLOAT",
                 outputs: tuple[str, ...] = ("output",)) -> Path:
    """Like tiny_tagger; its answers are logits: the channels' means times weights, then twice and
    so on for each further output."""
    from onnx import TensorProto, helper, numpy_helper
    tiny_tagger(folder)
    weights = np.random.default_rng(3).normal(0, 1, (3, len(TAGS))).astype(np.float32)
    axes = [2, 3] if shape[1] == 3 else [1, 2]
    nodes = [helper.make_node("Cast", ["x"], ["pixels"], to=TensorProto.FLOAT),
             helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
             helper.make_node("MatMul", ["mean", "weights"], ["once"])]
    made, last = [], "once"
    for name in outputs:
        nodes.append(helper.make_node("Identity" if last == "once" else "Neg", [last], [name]))
        made.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [shape[0], len(TAGS)]))
        last = name
    made.insert(0, helper.make_tensor_value_info("mean", TensorProto.FLOAT, [shape[0], 3]))
    graph = helper.make_graph(
        nodes, "tagger",
        [helper.make_tensor_value_info("x", getattr(TensorProto, kind), shape)], made,
        [numpy_helper.from_array(weights, "weights"),
         numpy_helper.from_array(np.array(axes, np.int64), "axes")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
              str(folder / "model.onnx"))
    return folder


def scores_of(tagger: wd.WdTagger, image: Image.Image) -> dict[str, float]:
    return {tag.name: tag.score for tag in tagger.describe([tagger.prepare(image)])[0].tags}


def wanted_scores(means: np.ndarray, sign: int = 1) -> dict[str, float]:
    weights = np.random.default_rng(3).normal(0, 1, (3, len(TAGS))).astype(np.float32)
    with np.errstate(over="ignore"):
        scores = 1 / (1 + np.exp(-sign * (means @ weights)))
    return {wd.written(name): float(score) for (name, category), score
            in zip(TAGS, scores, strict=True) if category in (0, 4)}


COLOUR = (200, 100, 50)


@pytest.mark.parametrize(("shape", "kind", "side"), [
    (["N", 3, SIDE, SIDE], "FLOAT", SIDE), (["N", 3, "H", "W"], "FLOAT", wd.SIDE),
    ([1, 3, SIDE, SIDE], "FLOAT16", SIDE), (["N", "H", "W", 3], "FLOAT", wd.SIDE),
    (["N", SIDE, "W", 3], "UINT8", SIDE), (["N", "H", "W", "C"], "FLOAT", wd.SIDE),
    (["N", 3, SIDE, SIDE], "UINT8", SIDE)])
def test_shapes_and_kinds_of_inputs(tmp_path: Path, shape: list[int | str], kind: str,
                                    side: int) -> None:
    folder = other_tagger(tmp_path / "other", shape, kind)
    tagger = opened(folder, tag_threshold=0.0, character_threshold=0.0)
    assert tagger.side == side
    assert [note.key for note in tagger.notes] == ["wd.logits"]
    means = np.array(COLOUR if shape[1] == 3 else COLOUR[::-1], np.float32)
    if shape[1] == 3 and kind != "UINT8":
        means = (means / 255 - 0.5) / 0.5           # RGB, -1..1
    assert scores_of(tagger, Image.new("RGB", (20, 20), COLOUR)) == pytest.approx(
        wanted_scores(means), abs=2e-3)


@pytest.mark.parametrize("text", [
    '{"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 4], "input_size": [3, 32, 32]}}',
    '{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4]}', '{"pretrained_cfg": 3}', "[]", "{",
    '{"size": {"height": 32, "width": 32}}', '{"input_size": [3, 0, 0]}',
    '{"input_size": [3, 99999999, 99999999]}'])
def test_the_config_beside_it_says_how_pixels_are_normalized(tmp_path: Path, text: str) -> None:
    folder = other_tagger(tmp_path / "other", ["N", 3, "H", "W"])
    (folder / "config.json").write_text(text)
    tagger = opened(folder, tag_threshold=0.0, character_threshold=0.0)
    mean, std = ([.1, .2, .3], [1, 2, 4]) if "0.1" in text else ([.5] * 3, [.5] * 3)
    assert tagger.side == (32 if "32" in text else wd.SIDE)
    means = (np.array(COLOUR, np.float32) / 255 - mean) / std
    assert scores_of(tagger, Image.new("RGB", (20, 20), COLOUR)) == pytest.approx(
        wanted_scores(means), abs=1e-4)


@pytest.mark.parametrize(("outputs", "sign"), [
    (("initial_predictions", "refined_predictions"), -1), (("logits", "prediction"), -1),
    (("output", "logit"), 1)])
def test_of_several_outputs_the_one_for_the_tags(tmp_path: Path, outputs: tuple[str, ...],
                                                 sign: int) -> None:
    tagger = opened(other_tagger(tmp_path / "other", ["N", 3, SIDE, SIDE], outputs=outputs),
                    tag_threshold=0.0, character_threshold=0.0)
    means = (np.array(COLOUR, np.float32) / 255 - 0.5) / 0.5
    assert scores_of(tagger, Image.new("RGB", (20, 20), COLOUR)) == pytest.approx(
        wanted_scores(means, sign), abs=1e-4)


def test_probabilities_stay_as_they_are(folder: Path) -> None:
    assert opened(folder).notes == []


# --- what can be wrong ---

def code(call: object) -> str:
    with pytest.raises(UserError) as caught:
        call()  # type: ignore[operator]
    assert "{" not in str(caught.value)
    return caught.value.code


def test_missing_files_name_the_command_or_the_file(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="darkroom models get SmilingWolf/wd-vit-tagger-v3"):
        opened("")
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    assert code(lambda: opened(tmp_path)) == "wd.incomplete"


def test_corrupt_and_foreign_models(tmp_path: Path) -> None:
    folder = tiny_tagger(tmp_path / "corrupt")
    model = folder / "model.onnx"
    model.write_bytes(model.read_bytes()[:100])
    assert code(lambda: opened(folder)) == "wd.unreadable"
    assert code(lambda: opened(tiny_tagger(tmp_path / "more", tags=12))) == "wd.other_tags"
    folder = tiny_tagger(tmp_path / "flat")
    loaded = onnx.load(folder / "model.onnx")
    loaded.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 4
    loaded.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.ones((4, len(TAGS)), np.float32), "weights"))
    onnx.save(loaded, folder / "model.onnx")
    assert code(lambda: opened(folder)) == "wd.not_a_tagger"


@pytest.mark.parametrize("text", ["", "tag_id,name\n1,x\n", "name,category\nx,nine\n",
                                  "name,category\n", "\x00\x01\n"])
def test_bad_tag_lists(tmp_path: Path, text: str) -> None:
    folder = tiny_tagger(tmp_path / "model")
    (folder / "selected_tags.csv").write_text(text, "utf-8")
    assert code(lambda: opened(folder)) == "wd.bad_tags"


def test_without_the_runtime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wd, "PACKAGE", "onnxruntime_that_is_not_here")
    with pytest.raises(UserError, match="pip install onnxruntime"):
        opened(folder)


def test_gpu_that_this_runtime_has_not(folder: Path) -> None:
    if "CUDAExecutionProvider" in runtime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    assert code(lambda: opened(folder, device="cuda")) == "wd.no_cuda"


def test_out_of_memory_is_a_memory_error(folder: Path) -> None:
    tagger = opened(folder)

    class Full:
        def get_inputs(self) -> list[object]:
            return tagger_inputs

        def run(self, *_: object) -> None:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 99")

    tagger_inputs = tagger.session.get_inputs()
    tagger.session = Full()
    with pytest.raises(MemoryError):
        tagger.describe([tagger.prepare(pictures()[0])])


def test_identity_follows_the_options(folder: Path) -> None:
    first = opened(folder).identity()
    assert first == opened(folder).identity()
    for options in ({"tag_threshold": 0.5}, {"underscores": True}, {"exclude": ["1girl"]}):
        assert opened(folder, **options).identity() != first


def test_takes_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, captioner.models.wd; print('torch' in sys.modules)"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
