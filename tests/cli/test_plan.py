"""`suggest`, `plan` and `presets` as commands, and what they weigh: machine, base, pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from core import paths
from core.cli import plan as plan_commands
from core.config import TrainConfig, parse_train_config
from core.dataset import buckets, captions
from core.dataset.images import decode
from core.errors import UserError
from core.importers import load_train_config
from core.memory import advisor, plan, plan_inputs
from core.memory.plan import Data
from core.memory.plan_inputs import Pictures
from tests import nvml_stub, tiny
from tests.calls import Run, run
from tests.nvml_stub import Card
from tests.planned import lasting_home, traces

__all__ = ["lasting_home", "run", "traces"]


pytestmark = pytest.mark.usefixtures("traces")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text("base_model: demo\ntrain_data_dir: pics\nbatch_size: 4\n", "utf-8")
    tiny.pictures(tmp_path / "pics", 6, (80, 40))
    return file


# --- suggest ---

def test_suggest_prints_each_value_with_its_reason(run: Run) -> None:
    told = run("suggest", "--base", "demo", "--vram-gb", "8", "--purpose", "character")
    assert told.code == 0
    assert "lora_rank: 16" in told.out
    assert "face" in told.out
    assert "64 px: what the base was made for." in told.out


def test_suggest_in_chinese(run: Run) -> None:
    told = run("suggest", "--base", "demo", lang="zh")
    assert told.code == 0
    assert "底模本来的尺寸" in told.out


def test_suggest_as_json_without_a_card_takes_the_cpu(run: Run) -> None:
    answer = run("suggest", "--base", "demo", "--json").json
    assert answer["ok"] is answer["fits"] is True
    assert answer["plan"]["machine"]["kind"] == "cpu"
    assert answer["reasons"].keys() == answer["values"].keys()
    assert answer["values"]["max_train_steps"] > 0
    assert answer["plan"]["needs_mb"] < answer["room_mb"]


def test_suggest_reads_the_real_card_by_nvml(run: Run) -> None:
    with nvml_stub.loaded([Card.of(6, capability="7.5", free_mb=5000)]):
        answer = run("suggest", "--base", "demo", "--json").json
    machine = answer["plan"]["machine"]
    assert (machine["kind"], machine["free_mb"]) == ("cuda", 5000)
    assert answer["values"]["precision"] == "fp16"
    assert answer["room_mb"] == pytest.approx(5000 - (machine["total_mb"] - 5000) / 4, abs=0.1)


def test_suggest_yaml_trains_as_it_is(run: Run, tmp_path: Path, config: Path) -> None:
    told = run("suggest", "--base", "demo", "--data", "pics", "--yaml")
    file = tmp_path / "ready.yaml"
    file.write_text(told.out, "utf-8")
    found = load_train_config(file)
    assert found.base_model == "demo"
    assert Path(found.train_data_dir) == tmp_path / "pics"
    assert found.epochs > 10                            # a folder is named: rounds, not steps
    assert found.max_train_steps == 0
    assert told.out.count("# ") > len(yaml.safe_load(told.out)) - 4


def test_suggest_yaml_without_a_base_says_where_to_put_one(run: Run) -> None:
    told = run("suggest", "--vram-gb", "24", "--yaml")          # SD 1.5's standard shapes
    assert told.code == 0
    assert "# put your base model here" in told.out
    found = parse_train_config(told.out, "x")
    assert found.base_model == found.train_data_dir == ""
    assert (found.max_resolution, found.batch_size) == ("512,512", 8)


@pytest.mark.thorough
def test_suggest_says_honestly_that_nothing_fits(run: Run) -> None:
    told = run("suggest", "--base", "demo", "--vram-gb", "1")
    assert told.code == 1
    assert "Nothing worth training fits" in told.out
    assert "A card with 4 GB would do." in told.out


@pytest.mark.parametrize(("argv", "words_"), [
    (["suggest", "--base", "sd51"], "Did you mean `sd15`"),
    (["suggest", "--base", "demo", "--purpose", "styl"], "style, character, object, concept"),
    (["suggest", "--base", "demo", "--vram-gb", "0"], "--vram-gb 0"),
    (["suggest", "--base", "demo", "--vram-gb", "nan"], "--vram-gb nan"),
    (["suggest", "--base", "demo", "--data", "nowhere"], "nowhere"),
    (["plan", "--config", "none.yaml"], "none.yaml"),
    (["plan", "--config", "mine.yaml", "--set", "base_model="], "base_model"),
    (["plan", "--config", "mine.yaml", "--set", "base_model=lost.safetensors"], "lost"),
    (["plan", "--config", "mine.yaml", "--set", "target_modules=nix"], "nix"),
    (["plan", "--config", "mine.yaml", "--set", "train_data_dir=away"], "away"),
    (["presets", "--family", "sdxxl"], "sd15")])
def test_bad_input_is_one_sentence(run: Run, config: Path, argv: list[str], words_: str) -> None:
    told = run(*argv)
    assert told.code == 2
    assert words_ in told.err
    assert "Traceback" not in told.err
    assert not told.out


# --- plan ---

def test_plan_tells_parts_and_phases(run: Run, config: Path) -> None:
    told = run("plan", "--config", config)
    assert told.code == 0
    for word in ("captions", "caching", "training", "proof", "base (denoiser)", "optimizer",
                 "activations", "Fits:", "RAM:", "Disk:"):
        assert word in told.out
    assert "\n\n" in told.out


def test_plan_as_json_is_the_plan(run: Run, config: Path) -> None:
    answer = run("plan", "--config", config, "--vram-gb", "8", "--json").json
    assert answer["ok"] is True
    assert answer["verdict"] == "fits"
    assert answer["nearest"] is None
    assert answer["bucket"] == [80, 48]         # of these pictures, not the largest of all
    expected = plan.plan_run(
        load_train_config(config).with_changes(base_model="demo"), plan_inputs.base_of("demo"),
        advisor.card_of(8), Data(6, 7, 4, (80, 48)))
    assert answer["needs_mb"] == round(expected.needs_mb, 1)


def test_plan_that_does_not_fit_names_what_would(run: Run, config: Path) -> None:
    argv = ["plan", "--config", config, "--set", "batch_size=256", "--set", 'train_data_dir=""',
            "--set", "max_resolution=128", "--vram-gb", "2.2"]
    answer = run(*argv, "--json")
    assert answer.code == 1
    assert answer.json["verdict"] == "too_big"
    changes = answer.json["nearest"]["changes"]
    assert changes["batch_size"] * changes["gradient_accumulation_steps"] == 256
    told = run(*argv)
    assert told.code == 1
    assert "Does not fit" in told.out
    assert "--set batch_size=" in told.out
    again = [f"--set={key}={value}" for key, value in changes.items()]
    assert run(*argv, *again).code == 0                 # later ones win: it does fit


@pytest.mark.thorough
def test_plan_that_is_tight_says_so(run: Run, config: Path) -> None:
    needs = run("plan", "--config", config, "--vram-gb", "8", "--json").json["needs_mb"]
    tight = (needs + 700 + 60) / 1024
    told = run("plan", "--config", config, "--vram-gb", f"{tight:.4f}")
    assert told.code == 0
    assert "Tight:" in told.out


def test_plan_in_chinese_keeps_its_columns(run: Run, config: Path) -> None:
    told = run("plan", "--config", config, lang="zh")
    assert "放得下" in told.out
    rows = [line for line in told.out.splitlines() if line.startswith(("合计", "优化器"))]
    assert len(rows) == 2


def test_columns_line_up_by_their_width_on_screen() -> None:
    lines = plan_commands.aligned([["", "训练"], ["VAE", "1 MB"], ["优化器", "12 MB"]])
    assert lines == ["         训练", "VAE      1 MB", "优化器  12 MB"]


# --- presets ---

def test_presets_with_their_badges(run: Run) -> None:
    with nvml_stub.loaded([Card.of(8)]):
        told = run("presets", "--family", "sd15")
        found = run("presets", "--json").json
    assert told.code == 0
    assert "8GB laptop" in told.out
    badges = {(one["slug"]): one["badge"] for one in found["presets"] if one["family"] == "sd15"}
    assert badges["8gb-laptop-style"] == badges["4gb-style"] == "fits"
    assert badges["24gb-workstation-style"] == "too_big"
    assert {one["family"] for one in found["presets"]} >= {"demo", "sd15"}


def test_presets_are_listed_without_torch(run: Run) -> None:
    assert "[放不下]" in run("presets", lang="zh").out
    assert "4GB 显存" in run("presets", lang="zh").out


# --- pictures by their headers ---

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "avif": "AVIF"}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("orientation", [0, 1, 3, 5, 6, 8])
def test_header_gives_the_size_that_decoding_gives(tmp_path: Path, suffix: str, orientation: int
                                                   ) -> None:
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", (64, 40), "red").save(path, FORMATS[suffix], exif=exif)
    assert plan_inputs.header(path) == (decode(path).size, False)


def test_torn_files_and_strangers_are_faults(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "b.jpg").write_bytes(b"")
    for name in ("a.png", "b.jpg", "gone.png"):
        found = plan_inputs.header(tmp_path / name)
        assert isinstance(found, UserError)
        assert found.code == "dataset.corrupt"
    with pytest.raises(UserError, match="2 pictures"):
        plan_inputs.pictures_in(tmp_path)


sizes = st.tuples(st.integers(16, 3000), st.integers(16, 3000))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(sizes, st.integers(1, 9)), min_size=1, max_size=40),
       st.integers(1, 32), st.booleans(), st.sampled_from(["", "448,448", "768,512"]))
def test_data_is_the_heaviest_batch_of_the_training(pictures: list[tuple[Any, int]], batch: int,
                                                    no_upscale: bool, resolution: str) -> None:
    """Against an epoch of the training's own batches."""
    config = TrainConfig(batch_size=batch, bucket_no_upscale=no_upscale,
                         max_resolution=resolution)
    found = Pictures(tuple(s for s, _ in pictures), tuple(n for _, n in pictures),
                     tuple(f"c{i % 3}" for i in range(len(pictures))))
    data = plan_inputs.data_of(config, found, {"native": 512, "step": 64})
    width, height = map(int, resolution.split(",")) if resolution else (512, 512)
    side = int((width * height) ** 0.5)
    rule = buckets.BucketRule((width, height), 64, side // 2, side * 2, no_upscale)
    assigned = rule.assign(found.sizes)
    epoch = buckets.batches(assigned, found.repeats, batch, 1)
    heaviest = max(len(one) * assigned[one[0]][0] * assigned[one[0]][1] for one in epoch)
    assert data.bucket is not None
    assert data.batch * data.bucket[0] * data.bucket[1] == heaviest
    assert data.pictures == len(pictures)
    assert data.captions == 1 + min(3, len(pictures))


@settings(max_examples=30, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=6, unique=True), min_size=1,
                max_size=6), st.integers(0, 3))
def test_shuffled_captions_are_counted_as_training_makes_them(tags: list[list[str]], keep: int
                                                              ) -> None:
    texts = tuple(", ".join(one) for one in tags)
    config = TrainConfig(shuffle_tags=True, keep_tokens=keep)
    found = Pictures(((64, 64),) * len(texts), (1,) * len(texts), texts)
    made = {text for i, caption in enumerate(texts) for text in captions.variants(
        caption, config, i)}
    count = plan_inputs.data_of(config, found, {"native": 64, "step": 16}).captions
    assert count >= len(made | {""}) or len(set(texts)) < len(texts)
    assert count <= 1 + captions_most(texts)
    assert captions.split_tags("a, b") == ["a", "b"]


def captions_most(texts: tuple[str, ...]) -> int:
    return captions.MOST_SHUFFLES * len(set(texts))


def test_data_of_a_folder_reads_repeats_and_captions(tmp_path: Path) -> None:
    tiny.pictures(tmp_path / "5_cats", 4, (80, 40))
    tiny.pictures(tmp_path / "1_dogs", 3, (40, 80))
    facts = {"native": 64.0, "step": 16.0}
    found = plan_inputs.data_of(TrainConfig(batch_size=16), plan_inputs.pictures_in(tmp_path),
                                facts)
    assert found.pictures == 7
    assert (found.batch, found.bucket) == (16, (80, 48))
    small = plan_inputs.data_of(TrainConfig(batch_size=64), plan_inputs.pictures_in(tmp_path),
                                facts)
    assert small.batch == 20                            # 4 pictures, 5 times each


def test_pictures_are_weighed_by_their_headers_alone(tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000 large PNGs, of which none is decoded."""
    noise = np.random.default_rng(1).integers(0, 255, (768, 1024, 3), np.uint8)
    first = tmp_path / "pics" / "0.png"
    first.parent.mkdir()
    Image.fromarray(noise).save(first, compress_level=0)
    for i in range(1, 3000):
        (first.parent / f"{i}.png").hardlink_to(first)
    decoded: list[object] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    found = plan_inputs.pictures_in(first.parent)
    assert len(found.sizes) == 3000
    assert set(found.sizes) == {(1024, 768)}
    assert not decoded


# --- machine and base ---

def test_machine_here_is_the_first_card_else_the_cpu() -> None:
    with nvml_stub.loaded([Card.of(8, free_mb=6000)]):
        found = plan_inputs.machine_here()
        assert (found.kind, found.free_mb, found.capability) == ("cuda", 6000, (8, 9))
        assert found.ram_mb > 0
        assert found.disk_mb > 0
        assert plan_inputs.machine_here("cpu").kind == "cpu"
    with nvml_stub.loaded([]):
        here = plan_inputs.machine_here()
    assert here.kind in ("cpu", "mps")
    assert here.free_mb == here.ram_mb


def test_base_of_a_family_has_its_shapes(traces: Path) -> None:
    base = plan_inputs.base_of("sd15")
    assert base.family == "sd15"
    assert plan_inputs.base_of("sd15") == base                # written once, read again
    facts = plan_inputs.BatchPlanner(base, advisor.card_of(8)).facts
    assert facts["denoiser_parameters"] == 859_520_964
    assert (facts["native"], facts["step"]) == (512, 64)


def test_a_folder_wins_over_a_family_of_its_name(tmp_path: Path, base: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd15").symlink_to(base, target_is_directory=True)
    assert plan_inputs.base_of("sd15").source == Path("sd15")
    assert plan_inputs.base_of("demo").source == paths.DEMO / "base"


def test_modules_take_no_torch() -> None:
    import subprocess
    code = ("import sys; import core.memory.advisor, core.memory.relief, "
            "core.memory.troubleshooting, core.workspace.presets, core.memory.plan_inputs, "
            "core.cli.plan; print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True,
                          text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_long_captions_weigh_as_their_chunks(tmp_path: Path) -> None:
    """The same count before a run (from the files) and in it (from the examples)."""
    from core.dataset.examples import find
    from core.training import memory_guard
    folder = tiny.pictures(tmp_path, 3)
    for name, words_ in (("000", 200), ("001", 100), ("002", 5)):
        (folder / f"{name}.txt").write_text(" ".join(["cat"] * words_), "utf-8")
    for family, limit, chunks, longest in (("sd15", 225, 1 + 3 + 2 + 1, 3), ("sdxl", 150, 6, 2),
                                           ("flux", 225, 4, 1)):
        config = TrainConfig(train_data_dir=str(folder), max_tokens=limit)
        data = plan_inputs.data_of(config, plan_inputs.pictures_of(config),
                                   {"native": 64, "step": 16}, family)
        assert (data.captions, data.chunks) == (chunks, longest)
        items = find(config, folder, None, 64, 16, lambda event: None).items
        there = memory_guard.memory_data(items, config, family)
        assert (there.captions, there.chunks) == (chunks, longest)
    # a preview's prompt weighs where it is drawn, without its tags; the step learns captions
    (folder / "000.txt").write_text("cat", "utf-8")
    prompts = config.with_changes(sample_prompts=["cat " * 220, "cat " * 70 + "<lora:x:0.8>" * 9])
    for wanted, drawn in ((prompts, 3), (prompts.with_changes(
            sample_prompts=prompts.sample_prompts[1:]), 1)):
        data = plan_inputs.data_of(wanted, plan_inputs.pictures_of(config),
                                   {"native": 64, "step": 16}, "sd2")
        items = find(wanted, folder, None, 64, 16, lambda event: None).items
        there = memory_guard.memory_data(items, wanted, "sd2")
        assert {(one.chunks, one.drawn_chunks) for one in (data, there)} == {(2, drawn)}
