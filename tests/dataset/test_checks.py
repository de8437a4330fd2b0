"""Dataset checks: every finding on files that have it, none on files that don't, and the cache."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import launcher
from core import i18n, paths
from core.config import TrainConfig
from core.dataset import crops, curation, image_folder
from core.dataset.captions import with_trigger
from core.dataset.checks import image_stats, measures
from core.dataset.checks import report as dataset_report
from core.dataset.checks.captions import fused_with, is_garbled
from core.dataset.checks.findings import Finding
from core.dataset.checks.image_stats import Looks, Stopped, measure
from core.dataset.checks.images import style_finding, style_outliers
from core.dataset.checks.report import Report, check
from core.dataset.crops import BaseFacts, TokenCounter, base_facts
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Event, Phase
from core.memory import plan
from tests.drawn import DRAWN, as_jpeg, blurred, clouds, discs, facts_for, save, subject

FACTS = facts_for((192, 192), 64)
DEMO = paths.DEMO / "base"


def looked(folder: Path, facts: BaseFacts = FACTS, **more: Any) -> dict[str, Finding]:
    """The findings by code, after every sentence was made in both languages."""
    report = check(folder, facts, **more)
    json.dumps(report.as_dict(), default=list)
    for language in i18n.LANGUAGES:
        for finding in report.findings:
            lines = [i18n.tr(finding.code, {"count": len(finding.subjects), **finding.params},
                             language), *map(finding.line, finding.subjects)]
            if finding.code.startswith("checks."):
                key = f"{finding.code}_mend"
                if finding.code != "checks.remarks":
                    assert key in i18n.catalogue(language), key
                    lines.append(i18n.tr(key, finding.params, language))
            assert not [x for x in lines if re.search(r"\{\w+\}|^checks\.", x)], finding
    return {one.code.removeprefix("checks."): one for one in report.findings}


def names(finding: Finding) -> set[str]:
    return {one.name for one in finding.subjects}


def good(folder: Path, count: int = 5) -> Path:
    """Pictures without anything to say against them."""
    for i in range(count):
        save(discs((192, 192), seed=i), folder / f"good{i}.png", f"m1a, disc number {i}, art {i}")
    return folder


# --- what can be wrong with pictures ----------------------------------------------------------

def test_good_pictures_have_no_finding_but_their_tags(tmp_path: Path) -> None:
    assert set(looked(good(tmp_path), trigger="m1a")) <= {"tag_once"}


def test_files_that_cant_be_read(tmp_path: Path) -> None:
    good(tmp_path, 1)
    whole = (tmp_path / "good0.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"hello")
    found = looked(tmp_path)["unreadable"]
    assert found.level == "error"
    assert {one.name: one.code for one in found.subjects} == {
        "torn.png": "dataset.truncated", "empty.png": "dataset.empty",
        "text.jpg": "dataset.not_a_picture"}


def test_suffixes_alpha_animation_and_orientation(tmp_path: Path) -> None:
    good(tmp_path, 1)
    save(clouds(), tmp_path / "really.jpg", format="PNG")
    save(clouds().convert("RGBA"), tmp_path / "opaque.png")
    image = clouds().convert("RGBA")
    image.putalpha(100)
    save(image, tmp_path / "clear.png")
    save(clouds(seed=5), tmp_path / "moving.webp", save_all=True, append_images=[clouds(seed=6)])
    exif = Image.Exif()
    exif[0x0112] = 6
    save(clouds(seed=7), tmp_path / "turned.jpg", exif=exif, quality=95)
    found = looked(tmp_path)
    assert {code: names(found[code]) for code in ("wrong_suffix", "alpha", "animated", "turned")
            } == {"wrong_suffix": {"really.jpg"}, "alpha": {"clear.png"},
                  "animated": {"moving.webp"}, "turned": {"turned.jpg"}}
    assert found["wrong_suffix"].subjects[0].params == {"format": "PNG"}


def test_too_small_is_told_against_its_own_bucket(tmp_path: Path) -> None:
    good(tmp_path, 1)
    save(discs((96, 96)), tmp_path / "small.png")
    save(discs((180, 180)), tmp_path / "nearly.png")
    found = looked(tmp_path)["too_small"]
    assert names(found) == {"small.png"}
    assert found.subjects[0].params["scale"] == 2.0
    assert "too_small" not in looked(tmp_path, facts_for((192, 192), 64, no_upscale=True))
    assert "too_small" not in looked(tmp_path, facts_for((64, 64), 16))


def test_extreme_aspect(tmp_path: Path) -> None:
    good(tmp_path, 1)
    save(discs((900, 250)), tmp_path / "long.png")
    assert names(looked(tmp_path)["extreme_aspect"]) == {"long.png"}


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize(("sigma", "scales"), [(0, (1,)), (1, (0.5, 1)), (2, (0.25,)),
                                               (4, (0.125,))])
def test_detail_follows_blur_whatever_the_picture(
        kind: str, sigma: float, scales: tuple[float, ...]) -> None:
    for seed in range(3):
        image = blurred(DRAWN[kind]((512, 384), seed), sigma)
        for quality in (None, 90, 60):
            made = as_jpeg(image, quality) if quality else image
            assert measures.detail(np.asarray(made.convert("L"))) in scales


def test_detail_of_enlarged_noisy_and_half_sharp_pictures() -> None:
    image = discs((512, 384))

    def detail(made: Image.Image) -> float:
        return measures.detail(np.asarray(made.convert("L")))

    for times in (2, 4):
        small = image.resize((512 // times, 384 // times), Image.Resampling.LANCZOS)
        assert detail(small.resize((512, 384), Image.Resampling.LANCZOS)) == 1 / times
    grain = np.random.default_rng(0).normal(0, 3, (384, 512, 3))
    noisy = np.clip(np.asarray(blurred(image, 6)) + grain, 0, 255).astype(np.uint8)
    assert detail(Image.fromarray(noisy)) <= 0.25
    half = blurred(image, 8)
    half.paste(image.crop((0, 0, 170, 384)), (0, 0))
    assert detail(half) == 1
    assert detail(Image.new("RGB", (200, 200), "teal")) == 1
    assert detail(Image.linear_gradient("L")) == 1


def test_blur_counts_at_the_size_that_trains(tmp_path: Path) -> None:
    good(tmp_path, 1)
    save(blurred(discs((384, 384)), 3), tmp_path / "blurred.png")
    assert names(looked(tmp_path)["soft"]) == {"blurred.png"}
    assert names(looked(tmp_path, facts_for((384, 384), 64))["blurred"]) == {"blurred.png"}
    found = looked(tmp_path, facts_for((64, 64), 16))
    assert not {"soft", "blurred"} & set(found)


@pytest.mark.parametrize("quality", [10, 30, 49, 50, 60, 75, 90, 95, 100])
def test_jpeg_quality_is_read_from_the_tables(quality: int) -> None:
    tables = as_jpeg(clouds(), quality).quantization  # type: ignore[attr-defined]
    assert abs(measures.jpeg_quality(tables) - quality) <= (1 if quality < 97 else 3)
    assert measures.jpeg_quality({}) == 0


def test_over_compression_by_tables_and_by_blocks(tmp_path: Path) -> None:
    good(tmp_path, 1)
    save(clouds(), tmp_path / "low.jpg", quality=20)
    save(clouds(seed=2), tmp_path / "fine.jpg", quality=85)
    save(as_jpeg(clouds(seed=3), 15), tmp_path / "again.png")
    found = looked(tmp_path)
    assert names(found["compressed"]) == {"low.jpg"}
    assert abs(found["compressed"].subjects[0].params["quality"] - 20) <= 1
    assert names(found["blocky"]) == {"again.png"}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 30), st.integers(0, 25), st.booleans(), st.integers(0, 5))
def test_bars_are_measured(top: int, side: int, white: bool, seed: int) -> None:
    colour = "white" if white else "black"
    inner = clouds((200 - 2 * side, 150 - 2 * top), seed)
    image = Image.new("RGB", (200, 150), colour)
    image.paste(inner, (side, top))
    top, side = (top if top >= 5 else 0), (side if side >= 5 else 0)
    found = measures.borders(np.asarray(image.convert("L")))
    if top or side or not any(found):
        assert np.abs(np.subtract(found, (side, top, side, top))).max() <= 4


def test_backgrounds_and_floors_are_no_bars(tmp_path: Path) -> None:
    product = subject((200, 200), (0.5, 0.5), 60, ground=Image.new("RGB", (200, 200), "white"))
    floor = clouds((200, 200))
    floor.paste("black", (0, 170, 200, 200))
    for image in (product, floor, Image.new("RGB", (200, 200)), clouds(), discs()):
        assert measures.borders(np.asarray(image.convert("L"))) == (0, 0, 0, 0)
    letterbox = Image.new("RGB", (200, 200))
    letterbox.paste(clouds((200, 140)), (0, 30))
    save(letterbox, tmp_path / "film.jpg", quality=90)
    found = looked(tmp_path)["borders"]
    assert names(found) == {"film.jpg"}
    assert found.subjects[0].params["top"] == pytest.approx(30, abs=1)


def test_copies_in_groups_with_the_one_to_keep(tmp_path: Path) -> None:
    good(tmp_path, 3)
    save(discs((192, 192), seed=0), tmp_path / "twin.png")
    save(discs((192, 192), seed=1).resize((150, 150)), tmp_path / "near.jpg", quality=80)
    found = looked(tmp_path)
    assert found["same_file"].groups == (("good0.png", "twin.png"),)
    assert found["near_same"].groups == (("good1.png", "near.jpg"),)
    assert found["near_same"].actions == ("keep_one_of_group",)


def test_a_crop_that_cuts_the_subject_is_never_silent(tmp_path: Path) -> None:
    save(subject((600, 220), (0.1, 0.5), 55), tmp_path / "left.png")
    save(subject((600, 220), (0.5, 0.5), 55), tmp_path / "middle.png")
    facts = BaseFacts((192, 192), 64, 192, 192)             # square only
    assert names(looked(tmp_path, facts)["subject_cut"]) == {"left.png"}
    assert names(looked(tmp_path, facts)["much_cut"]) == {"middle.png"}
    assert "subject_cut" not in looked(tmp_path, facts, crop_about="subject")
    curation.set_focus(tmp_path, {"left.png": (0.1, 0.5), "middle.png": (1, 0)})
    found = looked(tmp_path, facts)
    assert names(found["subject_cut"]) == {"middle.png"}


def test_tops_are_named_where_heads_may_be(tmp_path: Path) -> None:
    save(discs((200, 300)), tmp_path / "tall.png")
    facts = BaseFacts((192, 192), 64, 192, 192)
    assert looked(tmp_path, facts)["top_cut"].level == "note"
    found = looked(tmp_path, facts, purpose="person")["top_cut"]
    assert found.level == "warning"
    assert found.subjects[0].params["top"] == 17
    assert "top_cut" not in looked(tmp_path, facts, purpose="style")


# --- styles -----------------------------------------------------------------------------------

def styles(rng: np.random.Generator, *counts: int) -> np.ndarray:
    centres = np.eye(64)[:len(counts)] * 3
    return np.concatenate([rng.normal(c, 0.15, (n, 64)) for c, n in
                           zip(centres, counts, strict=True)])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_pictures_of_another_style_are_outliers(scale: float) -> None:
    found = style_outliers(styles(np.random.default_rng(0), 40, 2) * scale)
    assert sorted(i for i, _ in found) == [40, 41]
    assert all(z > 3.5 for _, z in found)


def test_one_style_two_styles_and_few_pictures_have_none() -> None:
    rng = np.random.default_rng(1)
    assert style_outliers(styles(rng, 20, 20)) == []
    assert style_outliers(np.ones((30, 8))) == []
    assert style_outliers(styles(rng, 5, 1)) == []
    assert len(style_outliers(styles(rng, 100))) <= 2
    assert style_outliers(np.zeros((0, 4))) == []


def test_many_pictures_are_compared_with_a_sample() -> None:
    found = style_outliers(styles(np.random.default_rng(2), 5000, 3))
    assert {5000, 5001, 5002} <= {i for i, _ in found}


@pytest.mark.parametrize("bad", [np.ones(5), np.full((9, 2), np.nan)])
def test_embeddings_have_to_be_numbers(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite"):
        style_outliers(bad)


def test_an_outlier_as_a_finding() -> None:
    vectors = styles(np.random.default_rng(0), 10, 1)
    found = style_finding([f"{i}.png" for i in range(11)], vectors, "style")
    assert found is not None
    assert found.level == "warning"
    assert names(found) == {"10.png"}
    assert style_finding(["a.png"] * 3, vectors[:3]) is None


# --- captions ---------------------------------------------------------------------------------

def captioned(folder: Path, *texts: str | bytes | None) -> Path:
    for i, text in enumerate(texts):
        save(discs((192, 192), seed=i), folder / f"{i}.png")
        if text is not None:
            (folder / f"{i}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_missing_empty_and_same(tmp_path: Path) -> None:
    found = looked(captioned(tmp_path, None, " \n", "a cat", "A cat", "a dog"))
    assert names(found["caption_missing"]) == {"0.png"}
    assert names(found["caption_empty"]) == {"1.png"}
    assert names(found["caption_same"]) == {"2.png", "3.png"}


def test_a_folders_name_as_the_caption_is_meant(tmp_path: Path) -> None:
    captioned(tmp_path / "5_sks dog", None, None, None)
    assert not {"caption_missing", "caption_same"} & set(looked(tmp_path))


def test_too_long_by_the_bases_own_tokens(tmp_path: Path) -> None:
    """75 fit; the trigger word in front counts as well."""
    fits, over = " ".join(["cat"] * 75), " ".join(["cat"] * 76)
    captioned(tmp_path, fits, over, "犬" * 40, "supercalifragilistic " * 3)
    counter = TokenCounter()
    assert counter([fits, over]) == [75, 76]
    facts = facts_for((192, 192), 64, count_tokens=counter)
    found = looked(tmp_path, facts)["caption_long"]
    assert [(one.name, one.params["tokens"]) for one in found.subjects][-1] == ("1.png", 76)
    assert names(found) == {f"{i}.png" for i, text in enumerate(
        (fits, over, "犬" * 40, "supercalifragilistic " * 3)) if counter([text])[0] > 75}
    assert "0.png" in names(looked(tmp_path, facts, trigger="zzz")["caption_long"])


def test_tokens_are_those_of_the_engines_family(base: Path) -> None:
    from core import families
    from core.weights.precision import choose
    texts = ["a red apple", "m1aperson, 猫, (weird:1.2)", "", "x " * 100]
    facts = base_facts(base, plan.sizes)
    family = families.get("sd15")
    parts = family.load(base, choose("fp32", "cpu"), frozenset({"text"}))
    assert facts.count_tokens is not None
    assert facts.count_tokens(texts) == family.count_tokens(parts, texts)
    assert facts.token_limit == family.token_limit(parts)
    assert (facts.area, facts.step) == ((parts.native_size,) * 2, parts.bucket_step)


def test_encodings(tmp_path: Path) -> None:
    found = looked(captioned(
        tmp_path, "一只猫在屋顶上".encode("gb18030"), "a cat".encode("utf-16"), "café",
        "caf\u00e9".encode("cp1252"), b"\xef\xbb\xbfwith a mark", "plain", "cafÃ© au lait",
        "lost \ufffd letter"))
    assert {one.name: one.params["encoding"] for one in found["caption_encoding"].subjects} == {
        "0.png": "GB18030", "1.png": "UTF-16", "3.png": "Windows-1252"}
    assert names(found["caption_garbled"]) == {"6.png", "7.png"}


@settings(deadline=None)
@given(st.text(max_size=40))
def test_only_damaged_text_is_garbled(text: str) -> None:
    text = text.replace("\ufffd", "")
    try:
        once = text.encode("utf-8").decode("cp1252")
    except UnicodeDecodeError:
        return
    assert is_garbled(once) == (once != text)


@pytest.mark.parametrize("text", ["cats &amp; dogs", "&#39;90s", r"caf\u00e9", "锟斤拷, 猫"])
def test_signs_of_other_formats_are_garbled(text: str) -> None:
    assert is_garbled(text)


@pytest.mark.parametrize("text", ["cats & dogs; fish", r"\o/ \u", "Ünïcödé naïve façade", "一只猫",
                                  "Ñandú", "æøå", "日本語"])
def test_true_letters_are_not_garbled(text: str) -> None:
    assert not is_garbled(text)


@pytest.mark.parametrize(("caption", "trigger", "word"), [
    ("m1aperson, smiling", "m1a person", "m1aperson"), ("m1aperson", "m1a", "m1aperson"),
    ("a photo of sks_dog.", "sks", "sks_dog."), ("M1A-Person", "m1a person", "M1A-Person"),
    ("m1a person", "m1a person", ""), ("a photo of m1a", "m1a", ""), ("a cat", "m1a", ""),
    ("一只m1a猫", "m1a", ""), ("piano", "an", ""), ("anything", "", "")])
def test_fused_triggers(caption: str, trigger: str, word: str) -> None:
    assert fused_with(caption, trigger) == word


@settings(deadline=None)
@given(st.text(alphabet="abm1 ,_", max_size=25), st.sampled_from(["m1a", "m1a b", "abm"]))
def test_what_training_would_not_recognise_is_missing_or_fused(
        caption: str, trigger: str) -> None:
    if with_trigger(caption, trigger) == caption:
        assert fused_with(caption, trigger) == ""


def test_markup_of_other_programs_is_told(tmp_path: Path) -> None:
    captioned(tmp_path, "(red hair:1.3), smile", "a cat BREAK a dog", "{red|blue} car", "__c__ x",
              "miku, <lora:other:0.8>", "m1a ||| hat", "[trigger], tree", "ganyu (genshin impact)")
    found = looked(tmp_path, trigger="m1a")
    assert {one.name: one.code for one in found["caption_markup"].subjects} == {
        f"{n}.png": f"checks.markup_{kind}" for n, kind in enumerate(
            ("weight", "chunk", "choice", "wildcard", "lora"))}
    assert "6.png" not in names(found["trigger_missing"])
    without = looked(tmp_path)["caption_markup"].subjects
    assert [one.code for one in without if one.name == "6.png"] == ["checks.markup_trigger"]


def test_lines_that_may_be_captions_are_told(tmp_path: Path) -> None:
    found = looked(captioned(tmp_path, "a red cat on a roof\na dog, hat\n", "cat\nhat\nroof",
                             "a, b\n\n", "one line, only"))
    assert {one.name: one.params["lines"] for one in found["caption_lines"].subjects} == {
        "0.png": 2}


def test_trigger_missing_and_fused(tmp_path: Path) -> None:
    captioned(tmp_path, "m1a, hat", "m1ahat, tree", "a tree")
    found = looked(tmp_path, trigger="m1a")
    assert names(found["trigger_fused"]) == {"1.png"}
    assert names(found["trigger_missing"]) == {"2.png"}
    assert "trigger_missing" not in looked(tmp_path)


def test_tags_everywhere_and_once(tmp_path: Path) -> None:
    captioned(tmp_path, "m1a, girl, hat", "m1a, girl, tree", "m1a, girl, hat", "m1a, Girl, hta")
    found = looked(tmp_path, trigger="m1a")
    assert found["tag_everywhere"].params["tags"] == "girl"
    assert {one.params["tag"] for one in found["tag_once"].subjects} == {"tree", "hta"}


def test_prose_has_no_tags(tmp_path: Path) -> None:
    captioned(tmp_path, *(f"A photo of a {x} that stands in the old garden behind the house."
                          for x in ("cat", "dog", "cow", "hen", "fox")))
    assert not {"tag_once", "tag_everywhere"} & set(looked(tmp_path))


# --- the whole --------------------------------------------------------------------------------

def test_left_out_pictures_are_neither_checked_nor_scanned(tmp_path: Path) -> None:
    good(tmp_path, 3)
    save(discs((40, 40)), tmp_path / "small.png")
    curation.leave_out(tmp_path, ["small.png"])
    report = check(tmp_path, FACTS)
    assert "small.png" not in report.names
    assert report.left_out == 1
    assert not [one for one in report.findings if one.code == "checks.too_small"]
    assert len(image_folder.scan(tmp_path).pictures) == 4
    data = image_folder.scan(tmp_path, left_out={"small.png"})
    assert len(data.pictures) == 3
    with pytest.raises(UserError) as caught:
        image_folder.scan(tmp_path, left_out=set(report.names) | {"small.png"})
    assert caught.value.code == "dataset.all_left_out"


def test_the_plan_has_every_picture_with_its_crop(tmp_path: Path) -> None:
    save(discs((400, 190)), tmp_path / "2_x" / "a.png")
    save(discs((192, 192)), tmp_path / "b.png")
    report = check(tmp_path, FACTS)
    told = {one["name"]: one for one in report.as_dict()["plan"]}
    assert told["b.png"]["crop"] == [0, 0, 192, 192]
    assert told["2_x/a.png"]["bucket"] == (256, 128)
    assert told["2_x/a.png"]["crop"] == pytest.approx([10, 0, 390, 190], abs=1.5)
    assert report.buckets[told["2_x/a.png"]["bucket"]] == 2
    assert [one["size"] for one in report.as_dict()["buckets"]] == list(report.buckets)


def test_nothing_in_the_folder_changes(tmp_path: Path) -> None:
    good(tmp_path, 2)

    def state() -> dict[str, tuple[int, bytes]]:
        return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}

    before = state()
    looked(tmp_path)
    assert state() == before


def test_events_tell_how_far_it_is(tmp_path: Path) -> None:
    events: list[Event] = []
    check(good(tmp_path, 3), FACTS, emit=events.append)
    assert Phase(name="scan", done=3, total=3, at=events[-2].at) == events[-2]


# --- the cache --------------------------------------------------------------------------------

def test_the_second_look_measures_nothing_and_says_the_same(tmp_path: Path) -> None:
    good(tmp_path, 4)
    first, second = check(tmp_path, FACTS), check(tmp_path, FACTS)
    assert (first.measured, second.measured) == (4, 0)
    assert second.findings == first.findings
    assert second.planned == first.planned


def test_a_changed_file_is_looked_at_again(tmp_path: Path) -> None:
    good(tmp_path, 3)
    check(tmp_path, FACTS)
    save(discs((80, 80)), tmp_path / "good1.png")
    report = check(tmp_path, FACTS)
    assert report.measured == 1
    assert names({one.code: one for one in report.findings}["checks.too_small"]) == {"good1.png"}
    stat = (tmp_path / "good0.png").stat()
    os.utime(tmp_path / "good0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    assert check(tmp_path, FACTS).measured == 1


@pytest.mark.parametrize("harm", ["garbage", "other version", "no table", "short record"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, harm: str) -> None:
    good(tmp_path, 3)
    first = check(tmp_path, FACTS)
    store = paths.cache_dir() / "looks.sqlite"
    if harm == "garbage":
        store.write_bytes(b"not a database at all" * 300)
    else:
        db = sqlite3.connect(store)
        db.execute({"other version": "PRAGMA user_version = 99", "no table": "DROP TABLE looks",
                    "short record": "UPDATE looks SET record = x'00'"}[harm])
        db.commit()
        db.close()
    again = check(tmp_path, FACTS)
    assert (again.measured, again.findings) == (3, first.findings)
    assert check(tmp_path, FACTS).measured == 0


def test_without_a_place_for_the_cache_it_still_works(tmp_path: Path, own_home: Path) -> None:
    (own_home / "cache" / "looks.sqlite").mkdir(parents=True)
    assert check(good(tmp_path, 3), FACTS).measured == 3


def test_stop_keeps_what_was_measured(tmp_path: Path) -> None:
    good(tmp_path, 30)
    control = Control()

    def emit(event: Event) -> None:
        if isinstance(event, Phase) and event.done >= 1:
            control.ask("stop")

    with pytest.raises(Stopped):
        check(tmp_path, FACTS, emit=emit, control=control)
    assert check(tmp_path, FACTS).measured < 30
    assert not [t for t in threading.enumerate() if t.name.startswith("looks")]


def test_records_are_the_same_from_any_thread(tmp_path: Path) -> None:
    good(tmp_path, 12)
    files = sorted(tmp_path.glob("*.png"))
    found = Looks()
    sizes = list(found.look_all(files))
    assert found.table.tobytes() == b"".join(
        one for path in files if isinstance(one := measure(path), bytes))
    assert sizes == [((192, 192), False)] * 12


def test_a_large_jpeg_is_measured_at_reduced_size_and_told_at_its_own(tmp_path: Path) -> None:
    image = Image.new("RGB", (4000, 3000))
    image.paste(clouds((1000, 600)).resize((4000, 2400)), (0, 300))
    save(image, tmp_path / "a.jpg", quality=92)
    record = measure(tmp_path / "a.jpg")
    assert isinstance(record, bytes)
    row = np.frombuffer(record, image_stats.RECORD)[0]
    assert (row["width"], row["height"]) == (4000, 3000)
    np.testing.assert_allclose(row["borders"], (0, 300, 0, 300), atol=6)
    assert row["detail"] <= 0.25


# --- the base and the command -----------------------------------------------------------------

def test_facts_of_bases(tmp_path: Path) -> None:
    facts = base_facts(DEMO, plan.sizes)
    assert (facts.area, facts.step, facts.shortest, facts.longest) == ((64, 64), 16, 32, 128)
    config = TrainConfig(max_resolution="128,64", min_bucket_side=48, max_tokens=150)
    facts = base_facts(DEMO, plan.sizes, config)
    assert (facts.area, facts.shortest, facts.token_limit) == ((128, 64), 48, 150)
    assert facts.base == "base"
    for path, code in ((tmp_path / "nothing", "families.missing"),
                       (tmp_path, "families.not_a_folder")):
        with pytest.raises(UserError) as caught:
            base_facts(path, plan.sizes)
        assert caught.value.code == code


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    rooms = [room for room in launcher.ROOMS if room != "core.cli.dataset"]
    monkeypatch.setattr(launcher, "ROOMS", (*rooms, "core.cli.dataset"))
    monkeypatch.setattr(launcher, "_prepared", lambda argv: None)
    return lambda *argv: launcher.main(["dataset", *map(str, argv)])


def test_the_command_prints_a_report(tmp_path: Path, command: Any, capsys: Any) -> None:
    good(tmp_path, 2)
    save(discs((40, 40)), tmp_path / "small.png")
    assert command("check", tmp_path, "--resolution", "192,192", "--trigger", "m1a") == 0
    out = capsys.readouterr().out
    assert "small.png: 40x40 px" in out
    assert "-> Enlarged pictures" in out
    assert "192x192" in out


def test_the_command_answers_in_json(tmp_path: Path, command: Any, capsys: Any) -> None:
    good(tmp_path, 3)
    assert command("check", tmp_path, "--base", "demo", "--json") == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["ok"]
    assert len(answer["plan"]) == 3
    assert answer["base"]["area"] == [64, 64]


@pytest.mark.parametrize("wrong", [("nowhere",), (".", "--resolution", "5"),
                                   (".", "--base", "nowhere"), (".",)])
def test_bad_input_is_one_sentence_and_exit_2(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any, capsys: Any,
        wrong: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("check", *wrong) == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    assert error


def test_the_report_text_is_short_and_whole(tmp_path: Path) -> None:
    for i in range(9):
        save(discs((60, 60), seed=i), tmp_path / f"{i}.png")
    report = check(tmp_path, FACTS)
    assert isinstance(report, Report)
    text = dataset_report.lines(report, most=2)
    assert sum("enlarged 3.2 times" in line for line in text) == 2
    assert any("and 7 more" in line for line in text)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd3", "sana", "lumina2", "qwen"])
def test_every_base_is_asked_for_its_own_sizes(name: str, tmp_path: Path) -> None:
    """Not the family's usual ones: tiny bases have others."""
    from core import families
    from core.weights.precision import choose
    from tests.tiny import families as tiny_families
    base = tiny_families.base(name, tmp_path / "base")
    parts = families.get(name).load(base, choose("fp32", "cpu"), frozenset())
    facts = base_facts(base, plan.sizes)
    assert (facts.area, facts.step) == ((parts.native_size,) * 2, parts.bucket_step)
    listed = families.SPECS[name]
    assert (facts.area[0], facts.step) != (listed.native_size, listed.bucket_step)
    limits = {"sd2": 225, "sdxl": 225}
    assert facts.token_limit == limits.get(name, listed.tokens)


def test_families_list_their_chunks_as_their_spec_does() -> None:
    from core import families
    for name, listed in families.SPECS.items():
        assert families.get(name).spec.chunked is listed.chunked


def test_without_a_base_the_report_says_what_it_assumes(tmp_path: Path) -> None:
    facts = crops.assumed_facts()
    assert (facts.area, facts.step, facts.token_limit) == ((512, 512), 64, 225)
    captioned(tmp_path, "a cat")
    report = dataset_report.check(tmp_path, facts)
    assert report.as_dict()["base"]["assumed"] is True
    assert "Stable Diffusion 1.5" in "\n".join(dataset_report.lines(report))
    report = dataset_report.check(tmp_path, base_facts(DEMO, plan.sizes))
    assert report.as_dict()["base"]["assumed"] is False
    assert "Stable Diffusion 1.5" not in "\n".join(dataset_report.lines(report))


def test_the_window_s_process_asks_another_one(base: Path) -> None:
    """And takes no torch for it; a base that is none is a fault there too."""
    code = ("import sys; from pathlib import Path\n"
            "from core.dataset import crops; from core.memory import service\n"
            "from core.config.schema import TrainConfig\n"
            f"facts = crops.base_facts(Path({str(base)!r}), "
            "service.sizes_beside, TrainConfig())\n"
            "print(facts.area[0], facts.step, 'torch' in sys.modules)")
    env = {**os.environ, "PYTHONPATH": str(paths.ROOT)}
    for _ in range(2):
        said = subprocess.run([sys.executable, "-c", code], env=env, text=True, check=True,
                              capture_output=True).stdout.split()
        assert said == ["32", "8", "False"]
