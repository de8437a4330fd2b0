"""Projects and settings on disk: what is kept, in which order values win, what a torn file does."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from core import paths
from core.errors import UserError
from core.workspace import presets, settings
from core.workspace.project import FIRST, Projects, checked_name
from core.workspace.settings import SettingsFile


def test_edits_survive_a_restart(own_home: Path) -> None:
    projects = Projects()
    assert projects.now.name == FIRST
    projects.open("Mia 画像")
    projects.edit(lora_rank=16, trigger_word="m1a")
    projects.refuse("epochs", "many")
    again = Projects("Mia 画像")
    assert again.now.edits == {"lora_rank": 16, "trigger_word": "m1a"}
    assert again.now.invalid == {"epochs": "many"}
    assert again.names() == ["Mia 画像"]
    again.edit(epochs=5)
    assert again.now.invalid == {}
    again.edit(epochs=None)
    assert "epochs" not in again.now.edits


def test_what_a_config_cannot_be_is_not_kept(own_home: Path) -> None:
    projects = Projects()
    version = projects.version
    with pytest.raises(ValidationError):
        projects.edit(lora_rank=0)
    with pytest.raises(ValidationError):
        projects.edit(no_such_key=1)
    assert (projects.now.edits, projects.version) == ({}, version)


def test_own_edits_win_over_advice_over_preset(own_home: Path) -> None:
    projects = Projects()
    preset = presets.list_presets(family="demo")[0]
    projects.edit(base_model="demo", lora_rank=3)
    projects.change(preset=preset.slug, advised={"batch_size": 2, "lora_rank": 5})
    config = projects.now.config(own_home)
    sources = projects.now.sources()
    assert (config.lora_rank, sources["lora_rank"]) == (3, "own")
    assert (config.batch_size, sources["batch_size"]) == (2, "advised")
    assert config.learning_rate == preset.set["learning_rate"]
    assert sources["learning_rate"] == "preset"
    assert "seed" not in sources
    assert Path(config.output_dir) == own_home / FIRST
    projects.edit(base_model=str(own_home / "gone"))
    assert projects.now.chosen() is None            # a preset of another base has no say


@pytest.mark.parametrize("content", ["", "[1, 2]", "name: {", "edits: 5", "\x00\xff"])
def test_a_torn_file_counts_as_new_and_is_put_aside(own_home: Path, content: str) -> None:
    file = own_home / "projects" / "mia.yaml"
    file.parent.mkdir()
    file.write_text(content, "utf-8")
    (own_home / settings.FILE).write_text(content, "utf-8")
    projects, kept = Projects("mia"), SettingsFile()
    assert projects.now.edits == {}
    assert kept.now.theme == "auto"
    assert projects.broken is not None
    assert file.with_name("mia.yaml.broken").read_text("utf-8") == content
    assert "mia.yaml.broken" in str(projects.broken)
    if content not in ("", "edits: 5"):             # no settings, and one that is not known
        assert kept.broken is not None
        assert (own_home / "settings.yaml.broken").read_text("utf-8") == content
    assert Projects("mia").broken is None
    assert SettingsFile().broken is None


def test_one_bad_setting_takes_no_other_with_it(own_home: Path) -> None:
    (own_home / settings.FILE).write_text("theme: dark\nlanguage: fr\nmirror: x\n7: 8\nnew: 1\n")
    kept = SettingsFile()
    assert (kept.now.theme, kept.now.language, kept.now.mirror) == ("dark", "", "x")
    assert "language" in str(kept.broken)
    text = (own_home / settings.FILE).read_text()
    assert "new: 1" in text
    assert "fr" not in text


@given(st.text(max_size=70))
def test_a_name_is_a_file_name_or_refused(name: str) -> None:
    try:
        good = checked_name(name)
    except UserError:
        return
    assert Path(good).name == good
    assert good not in (".", "..")
    assert not set(good) & set('<>:"/\\|?*')


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "x.", "C:x", "a\nb"])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(UserError):
        checked_name(name)


def test_settings_keep_what_they_do_not_know(own_home: Path) -> None:
    (own_home / settings.FILE).write_text("theme: dark\nfrom_the_future: 7\n")
    kept = SettingsFile()
    kept.change(language="zh-CN")
    text = (own_home / settings.FILE).read_text()
    assert "from_the_future: 7" in text
    assert "language: zh-CN" in text
    assert SettingsFile().now.spoken == "zh-CN"
    with pytest.raises(ValidationError):
        kept.change(theme="pink")
    assert kept.now.theme == "dark"


def test_loras_go_to_the_user_or_stay_with_a_portable_install(
        own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.Settings().output_folder == paths.data_dir() / "output"
    assert settings.Settings(output_root="/x/y").output_folder == Path("/x/y")
    monkeypatch.delenv("DARKROOM_HOME")
    assert paths.data_dir() not in settings.Settings().output_folder.parents


@pytest.mark.parametrize("value", ["!!float ''", "!!int ''", "!!bool x", "!!timestamp x",
                                   "!!null x", "!!float x", "!!int 0x", "!!binary ''"])
def test_a_tag_that_its_value_does_not_allow(own_home: Path, value: str) -> None:
    """PyYAML itself fails at some of them in its own ways."""
    (own_home / settings.FILE).write_text(f"welcomed: true\nmirror: {value}\n")
    assert isinstance(SettingsFile().now.mirror, str)
