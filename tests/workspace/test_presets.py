"""Presets: each fits the card that it names, on the largest bucket and with the margin; found by
its name in either language; laid below what a user wrote."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from core import i18n, paths
from core.config import TrainConfig
from core.errors import UserError
from core.families.detection import Base
from core.importers import load_train_config
from core.memory import advisor, plan, plan_inputs, relief
from core.memory.plan import Machine
from core.system.machine import MB
from core.units import gigabytes
from core.weights import precision_rules
from core.workspace import presets
from core.workspace.presets import Needs, Preset
from tests.planned import lasting_home, traces
from tests.tiny import families as tiny_families

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
    assert preset.title.keys() == preset.about.keys() == set(i18n.LANGUAGES)
    assert preset.path.parent.name == preset.family
    assert preset.purpose in advisor.PURPOSES
    assert preset.set.keys() <= TrainConfig.model_fields.keys()
    TrainConfig.model_validate(preset.set)


# What the presets' plans ask for was traced when build/make_presets.py wrote them, and lies in
# tests/data: the arithmetic above it is tested every day, the traces themselves by the slow suite
# (tests/memory/test_plan.py holds tracing to what torch hands out).

@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    kept: dict[str, dict[str, dict[str, float]]] = json.loads(
        maker().TRACES.read_text("utf-8"))
    known = {key: value for traced in kept.values() for key, value in traced.items()}

    def ask(what: str, base: Base, numbers: dict[str, str], **settings: Any) -> dict[str, float]:
        key = maker().trace_key(what, base, numbers, settings)
        assert key in known, f"run build/make_presets.py {base.family}: {key}"
        return known[key]
    monkeypatch.setattr(plan, "ask", ask)
    return known


@pytest.mark.parametrize("preset", shipped(), ids=lambda one: f"{one.family}-{one.slug}")
@pytest.mark.usefixtures("recorded")
def test_preset_fits_its_needs_on_the_largest_bucket(preset: Preset) -> None:
    """The whole card: context, workspaces, fragments and a desktop beside it are counted."""
    machine, config = machine_of(preset), TrainConfig.model_validate(preset.set)
    planned = plan.plan_run(config, plan_inputs.base_of(preset.family), machine)
    assert planned.needs_mb <= plan.room(machine) * (1 - plan.MARGIN)
    assert planned.bucket[0] * planned.bucket[1] == relief.side_of(config, 0) ** 2
    assert sum(planned.ram.values()) <= preset.needs.ram_gb * 1024
    assert gigabytes(planned.needs_mb) in preset.localized("about", "zh-CN")
    if preset.needs.vram_gb:
        assert planned.outside["context"] >= 400


@pytest.mark.parametrize(("family", "gb", "side", "most"), [
    ("sd15", 4, 512, 3), ("sdxl", 8, 1024, 8), ("sdxl", 6, 1024, 5), ("flux", 12, 512, 12),
    ("flux", 8, 512, 8)])
@pytest.mark.usefixtures("recorded")
def test_what_was_promised_of_small_cards(family: str, gb: int, side: int, most: float) -> None:
    """SD 1.5 in 4 GB (target 3), SDXL in 8 (target 5), Flux.1 at 512 px in 12 (target 8)."""
    for purpose in PURPOSES:
        preset = next(one for one in shipped() if (one.family, one.needs.vram_gb, one.purpose) == (
            family, gb, purpose))
        config = TrainConfig.model_validate(preset.set)
        planned = plan.plan_run(config, plan_inputs.base_of(family), machine_of(preset))
        assert config.max_resolution == f"{side},{side}"
        assert planned.needs_mb <= most * 1024


@pytest.mark.usefixtures("recorded")
def test_t5_travels_on_small_cards_only() -> None:
    """It takes 9.1 GB in 16 bits, 4.8 in int8, and less than one of the card while it travels."""
    numbers, found = precision_rules.numbers_for("auto", "cuda", (8, 6)), {}
    for family, kept in (("sd3", "same"), ("flux", "nf4")):
        base, config = plan_inputs.base_of(family), TrainConfig(base_precision=kept)
        facts = plan.ask("base", base, numbers)
        ways = plan._encoders(config, advisor.card_of(12), facts)
        assert ways["vram_budget"] == 0.0
        assert "vram_budget" not in plan._encoders(config, advisor.card_of(48), facts)
        found[family] = plan.ask("texts", base, numbers, kind="cuda", batch=2, **ways)
    assert (found["flux"]["weights"] + found["flux"]["peak"]) / MB < 1000
    assert found["sd3"]["waiting"] / MB > 8800 > 4500 > found["flux"]["waiting"] / MB


def test_traces_are_what_is_traced_now(recorded: dict[str, dict[str, float]]) -> None:
    """The cheapest live: one of each kind of the demo's."""
    memory, base = importlib.import_module("core.memory.traces"), plan_inputs.base_of("demo")
    found = {json.loads(key)[0]: (*json.loads(key)[1:], value) for key, value in recorded.items()
             if json.loads(key)[1] == base.digest}
    for what in ("base", "texts", "cache", "step"):
        _, numbers, asked, value = found[what]
        assert memory.TRACES[what](base, numbers, **asked) == pytest.approx(value), what


@pytest.mark.slow
@pytest.mark.parametrize("family", list(maker().FAMILIES))
def test_all_traces_are_what_is_traced_now(family: str) -> None:
    memory, base = importlib.import_module("core.memory.traces"), plan_inputs.base_of(family)
    for key, value in json.loads(maker().TRACES.read_text("utf-8"))[family].items():
        what, digest, numbers, asked = json.loads(key)
        assert digest == base.digest
        assert memory.TRACES[what](base, numbers, **asked) == pytest.approx(value), key


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [
    ("demo", "cpu-object"), ("sd15", "4gb-style"), ("sd15", "8gb-laptop-style"),
    ("sdxl", "8gb-laptop-style")])
def test_files_are_what_the_advisor_gives(family: str, name: str, traces: Path) -> None:
    """build/make_presets.py was run after the last change of advisor or plan."""
    compare(family, name)


def test_a_file_of_the_demo_is_what_the_advisor_gives(traces: Path) -> None:
    compare("demo", "cpu-style")


def compare(family: str, name: str) -> None:
    made = {path: data for path, data in maker().made(family, name)}
    assert [path.stem for path in made] == [name]
    for path, data in made.items():
        assert yaml.safe_load(path.read_text("utf-8")) == yaml.safe_load(maker().text_of(data))


@pytest.mark.parametrize("family", list(maker().FAMILIES))
def test_no_file_is_left_over(family: str) -> None:
    made = {f"{size.slug}-{purpose}.yaml" for size in maker().FAMILIES[family]
            for purpose in PURPOSES}
    assert {path.name for path in (paths.PRESETS / family).glob("*.yaml")} - {"demo.yaml"} == made


@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl", "sd3", "flux", "zimage"])
def test_each_base_shows_its_own(family: str) -> None:
    """What the window's cards and `darkroom presets` list for a base of this family."""
    found = presets.list_presets("zh-CN", family)
    assert {one.family for one in found} == {family}
    assert {one.purpose for one in found} == set(PURPOSES)
    for one in found:
        assert re.fullmatch(r"\d+GB (显存|笔记本|台式机|工作站)(，\d+ 像素)?", one.localized(
            "title", "zh-CN"))
        assert presets.find(one.localized("title", "zh-CN"), family, one.purpose) == one


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
    with pytest.raises(UserError) as caught:
        presets.find(name, "sd15")
    assert caught.value.code == "presets.unknown"
    assert caught.value.params["nearest"] == nearest
    assert "12GB desktop" in str(caught.value)


def test_unknown_family_and_purpose_are_faults() -> None:
    with pytest.raises(UserError, match="demo, flux, sd15"):
        presets.find("8GB laptop", "sdxxl")
    with pytest.raises(UserError, match="character, object, style"):
        presets.find("8GB laptop", "sd15", "concept")


def test_listed_by_family_and_size() -> None:
    found = [one.needs.vram_gb for one in presets.list_presets("zh-CN", "sd15")]
    assert found == sorted(found)
    assert presets.list_presets(family="sd15")[0].localized("title", "zh-CN") == "4GB 显存"


def test_families_of_bases(tmp_path: Path, base: Path) -> None:
    assert presets.family_of("demo") == "demo"
    assert presets.family_of(str(paths.DEMO / "base")) == "demo"
    assert presets.family_of("") == presets.family_of("sd15") == "sd15"
    assert presets.family_of(str(base)) == "sd15"
    other = tiny_families.base("sdxl", tmp_path / "xl")
    assert presets.family_of(str(other)) == "sdxl"
    with pytest.raises(UserError) as caught:
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
    assert found.localized("about", "zh-CN") == "x"


@pytest.mark.parametrize(("changes", "what"), [
    ({"set": {"lora_rnak": 3}}, "lora_rnak"), ({"needs": {"vram_gb": "x"}}, "needs.vram_gb"),
    ({"set": 3}, "set"), ({"more": 1}, "more"), ({"set": {"lora_rank": 0}}, "lora_rank"),
    ({"title": "x"}, "title")])
def test_broken_preset_is_named(own_home: Path, changes: dict[str, Any], what: str) -> None:
    """And the others are there all the same."""
    others = presets.list_presets()
    path = write_own(own_home, **changes)
    [fault] = presets.unusable()
    assert fault.code == "presets.bad"
    assert str(path) in str(fault)
    assert what in str(fault)
    assert presets.list_presets() == others


@pytest.mark.parametrize("content", [b"title: {en: 'x'\nset: [", b"\xff\xfe\x00", b"set: !!int x"])
def test_torn_preset_is_named(own_home: Path, content: bytes) -> None:
    write_own(own_home).write_bytes(content)
    assert "mine.yaml can't be read" in str(presets.unusable()[0])


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
    with pytest.raises(UserError) as caught:
        presets.train_config("CPU", file)
    assert caught.value.params["line"] == 2
    with pytest.raises(UserError) as caught:
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
