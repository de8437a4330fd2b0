"""Presets: each fits the card that it names, on the largest bucket and with the margin; found by
its name in either language; laid below what a user wrote."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from core import advisor, ladder, paths, plan, presets, weigh, words
from core.config import TrainConfig, load_train_config
from core.faults import Fault
from core.plan import Machine
from core.presets import Needs, Preset
from tests.planned import lasting_home, traces

__all__ = ["lasting_home", "traces"]

SD15 = ("4GB", "6GB", "8GB laptop", "12GB desktop", "16GB", "24GB workstation")
PURPOSES = ("style", "character", "object")


def maker() -> ModuleType:
    """build/ is no package."""
    name = "make_presets"
    if name not in sys.modules:
        path = paths.ROOT / "build" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def shipped() -> list[Preset]:
    return [one for one in presets.list_presets() if one.path.is_relative_to(paths.PRESETS)]


def machine_of(preset: Preset) -> Machine:
    """The smallest that it is for."""
    if preset.needs.vram_gb:
        return advisor.card_of(preset.needs.vram_gb)
    return Machine("cpu", "CPU", preset.needs.ram_gb * 1024, preset.needs.ram_gb * 768)


# --- the shipped files ---

def test_all_that_was_promised_is_there() -> None:
    there = {(one.family, one.title["en"], one.purpose) for one in shipped()}
    assert there >= {("sd15", title, purpose) for title in SD15 for purpose in PURPOSES}
    assert there >= {("demo", "CPU", purpose) for purpose in PURPOSES}


@pytest.mark.parametrize("preset", shipped(), ids=lambda one: f"{one.family}-{one.slug}")
def test_preset_speaks_both_languages_and_is_a_config(preset: Preset) -> None:
    assert preset.title.keys() == preset.about.keys() == set(words.LANGUAGES)
    assert preset.path.parent.name == preset.family
    assert preset.purpose in advisor.PURPOSES
    assert preset.set.keys() <= TrainConfig.model_fields.keys()
    TrainConfig.model_validate(preset.set)


@pytest.mark.parametrize("preset", shipped(), ids=lambda one: f"{one.family}-{one.slug}")
def test_preset_fits_its_needs_on_the_largest_bucket(preset: Preset, traces: Path) -> None:
    machine = machine_of(preset)
    base = weigh.base_of(preset.family)
    planned = plan.plan_run(TrainConfig.model_validate(preset.set), base, machine)
    assert planned.needs_mb <= ladder.room(machine) * (1 - plan.MARGIN)
    native = int(weigh.base_sizes(base, machine)["native"])
    assert planned.bucket[0] * planned.bucket[1] == native ** 2
    assert sum(planned.ram.values()) <= preset.needs.ram_gb * 1024
    if preset.needs.vram_gb == 4:
        assert planned.needs_mb <= 3 * 1024


@pytest.mark.parametrize("name", ["cpu-style", "cpu-object", "4gb-style", "8gb-laptop-style"])
def test_files_are_what_the_advisor_gives(name: str, traces: Path) -> None:
    """build/make_presets.py was run after the last change of advisor or plan."""
    family = "demo" if name.startswith("cpu") else "sd15"
    made = {path: data for path, data in maker().made(family, name)}
    assert [path.stem for path in made] == [name]
    for path, data in made.items():
        assert yaml.safe_load(path.read_text("utf-8")) == yaml.safe_load(maker().text_of(data))


@pytest.mark.parametrize("family", ["demo", "sd15"])
def test_no_file_is_left_over(family: str) -> None:
    sizes = maker().FAMILIES[family].sizes
    made = {f"{size.slug}-{purpose}.yaml" for size in sizes for purpose in PURPOSES}
    assert {path.name for path in (paths.PRESETS / family).glob("*.yaml")} - {"demo.yaml"} == made


def test_larger_cards_get_no_worse_presets() -> None:
    for purpose in PURPOSES:
        batches = [presets.find(title, "sd15", purpose).set["batch_size"] for title in SD15]
        assert batches == sorted(batches)
        assert batches[0] < batches[-1]


# --- by name ---

@pytest.mark.parametrize("name", ["8GB laptop", "8gb LAPTOP", "8 GB laptop", "8GB 笔记本",
                                  "8gb笔记本", "8GB-laptop"])
def test_found_by_title_in_either_language(name: str) -> None:
    assert presets.find(name, "sd15", "object").path.name == "8gb-laptop-object.yaml"


def test_found_by_file_name_whatever_the_purpose() -> None:
    assert presets.find("8gb-laptop-character", "sd15").purpose == "character"


@pytest.mark.parametrize(("name", "nearest"), [("8GB lapptop", "8GB laptop"),
                                               ("24GB 工作占", "24GB 工作站")])
def test_typo_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(Fault) as caught:
        presets.find(name, "sd15")
    assert caught.value.code == "presets.unknown"
    assert caught.value.params["nearest"] == nearest
    assert "12GB desktop" in str(caught.value)


def test_unknown_family_and_purpose_are_faults() -> None:
    with pytest.raises(Fault, match="demo, sd15"):
        presets.find("8GB laptop", "sdxxl")
    with pytest.raises(Fault, match="character, object, style"):
        presets.find("8GB laptop", "sd15", "concept")


def test_listed_by_family_and_size() -> None:
    found = [one.needs.vram_gb for one in presets.list_presets("zh-CN", "sd15")]
    assert found == sorted(found)
    assert presets.list_presets(family="sd15")[0].said("title", "zh-CN") == "4GB 显存"


def test_families_of_bases(tmp_path: Path, base: Path) -> None:
    assert presets.family_of("demo") == "demo"
    assert presets.family_of(str(paths.DEMO / "base")) == "demo"
    assert presets.family_of("") == presets.family_of("sd15") == "sd15"
    assert presets.family_of(str(base)) == "sd15"
    with pytest.raises(Fault) as caught:
        presets.family_of(str(tmp_path / "none.safetensors"))
    assert caught.value.code == "families.missing"


# --- one's own ---

def write_own(home: Path, **changes: Any) -> Path:
    data = {"title": {"en": "Mine"}, "about": {"en": "x"}, "family": "sd15", "purpose": "style",
            "needs": {"vram_gb": 1, "ram_gb": 1}, "set": {"lora_rank": 3}} | changes
    path = home / "presets" / "sd15" / "mine.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data), "utf-8")
    return path


def test_own_presets_stand_beside_ours(own_home: Path) -> None:
    path = write_own(own_home)
    found = presets.find("mine", "sd15")
    assert (found.path, found.set) == (path, {"lora_rank": 3})
    assert found.said("about", "zh-CN") == "x"


@pytest.mark.parametrize(("changes", "what"), [
    ({"set": {"lora_rnak": 3}}, "lora_rnak"), ({"needs": {"vram_gb": "x"}}, "needs.vram_gb"),
    ({"set": 3}, "set"), ({"more": 1}, "more"), ({"set": {"lora_rank": 0}}, "lora_rank"),
    ({"title": "x"}, "title")])
def test_broken_preset_is_named(own_home: Path, changes: dict[str, Any], what: str) -> None:
    path = write_own(own_home, **changes)
    with pytest.raises(Fault) as caught:
        presets.list_presets()
    assert caught.value.code == "presets.bad"
    assert str(path) in str(caught.value)
    assert what in str(caught.value)


def test_torn_preset_is_named(own_home: Path) -> None:
    write_own(own_home).write_bytes(b"title: {en: 'x'\nset: [")
    with pytest.raises(Fault, match=r"mine\.yaml can't be read"):
        presets.list_presets()


# --- laid over a config ---

def preset(**values: Any) -> Preset:
    return Preset(path=Path("p.yaml"), title={"en": "P"}, about={"en": "p"}, family="sd15",
                  purpose="style", needs=Needs(vram_gb=8, ram_gb=8), set=values)


FULL = preset(batch_size=2, gradient_accumulation_steps=4, lora_rank=8, lora_alpha=8.0,
              max_train_steps=250, lr_warmup_steps=12, save_steps=62, learning_rate=2e-4)


def test_own_edits_win_over_advice_over_preset() -> None:
    found = presets.apply(FULL, {"learning_rate": 1e-5, "trigger_word": "m1a"},
                          {"learning_rate": 3e-4, "batch_size": 1,
                           "gradient_accumulation_steps": 8, "epochs": 7})
    assert found == {"batch_size": 1, "gradient_accumulation_steps": 8, "lora_rank": 8,
                     "lora_alpha": 8.0, "learning_rate": 1e-5, "epochs": 7,
                     "trigger_word": "m1a"}


def test_fields_that_mean_nothing_alone_go_together() -> None:
    assert "max_train_steps" not in presets.apply(FULL, {"epochs": 5})
    assert "lr_warmup_steps" not in presets.apply(FULL, {"epochs": 5})
    assert "lora_alpha" not in presets.apply(FULL, {"lora_rank": 4})
    assert presets.apply(FULL, {"lora_alpha": 1})["lora_rank"] == 8
    assert presets.apply(FULL, {"batch_size": 4})["gradient_accumulation_steps"] == 2
    assert presets.apply(FULL, {"batch_size": 16})["gradient_accumulation_steps"] == 1


def test_tells_which_fields_it_sets() -> None:
    assert presets.sets(FULL) == tuple(FULL.set)
    assert presets.sets(FULL, {"epochs": 5, "lora_rank": 4}) == (
        "batch_size", "gradient_accumulation_steps", "learning_rate")


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["batch_size", "epochs", "lora_rank", "save_steps",
                                        "max_train_steps"]), st.integers(1, 50)))
def test_own_edits_always_win_and_the_rest_is_a_config(own: dict[str, int]) -> None:
    found = presets.apply(FULL, own)
    assert found.items() >= own.items()
    config = TrainConfig.model_validate(found)
    assert set(found) == set(own) | set(presets.sets(FULL, own))
    assert config.learning_rate == 2e-4
    assert not ("epochs" in own and "max_train_steps" not in own and config.max_train_steps)


def test_train_config_by_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base_model: demo\ntrain_data_dir: pics\nlora_rank: 4\n", "utf-8")
    config, used, fields = presets.train_config("CPU", file, {"learning_rate": "2e-3"},
                                                "character")
    assert (used.family, used.purpose) == ("demo", "character")
    assert (config.lora_rank, config.alpha, config.learning_rate) == (4, 4, 2e-3)
    assert config.max_resolution == "64,64"
    assert config.train_data_dir == "pics"
    assert "max_resolution" in fields
    assert not {"lora_rank", "lora_alpha", "learning_rate"} & set(fields)


def test_train_config_needs_no_file() -> None:
    config, used, _ = presets.train_config(
        "8GB 笔记本", None, {"base_model": "sd15", "train_data_dir": "x"})
    assert used.slug == "8gb-laptop-style"
    assert config.train_data_dir == "x"
    assert config.target_modules == used.set["target_modules"]


def test_faults_of_the_file_keep_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base_model: demo\nepoch: 4\n", "utf-8")
    with pytest.raises(Fault) as caught:
        presets.train_config("CPU", file)
    assert caught.value.params["line"] == 2
    with pytest.raises(Fault) as caught:
        presets.train_config("CPU", file.with_name("none.yaml"))
    assert caught.value.code == "config.missing"


def test_demo_config_is_no_preset_and_still_loads() -> None:
    assert load_train_config(paths.DEMO / "demo.yaml").lora_rank == 16
    assert not [one for one in shipped() if one.path.name == "demo.yaml"]


# --- badges ---

@pytest.mark.parametrize(("needs", "total", "free", "badge"), [
    (8, 8188, 7400, "fits"), (8, 8188, 4000, "tight"), (8, 6140, 6000, "too_big"),
    (8, 24564, 23000, "fits"), (4, 4096, 3300, "fits")])
def test_badge_of_a_card(needs: float, total: float, free: float, badge: str) -> None:
    one = preset().model_copy(update={"needs": Needs(vram_gb=needs, ram_gb=8)})
    assert presets.badge(one, Machine("cuda", "x", total, free)) == badge
    assert presets.badge(one, Machine("cpu", "x", 64e3, 60e3)) == "too_big"


def test_badge_of_a_cpu_preset() -> None:
    one = preset().model_copy(update={"needs": Needs(vram_gb=0, ram_gb=4)})
    assert presets.badge(one, Machine("cpu", "x", 8000, 6000)) == "fits"
    assert presets.badge(one, Machine("cpu", "x", 8000, 1000)) == "tight"
    assert presets.badge(one, Machine("cpu", "x", 2000, 1900)) == "too_big"
    assert presets.badge(one, Machine("cuda", "x", 4000, 3600)) == "fits"
