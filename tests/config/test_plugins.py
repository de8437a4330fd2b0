from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import launcher
from core import families, i18n, importers, plugins
from core.config import TrainConfig, dump_yaml
from core.dataset.examples import Encoder, find
from core.dataset.processors import Processors
from core.errors import UserError
from core.importers import load_train_config
from core.jobs.control import Control
from core.jobs.events import Event, Note, Step
from core.lora_files.metadata import CONFIG_KEY
from core.memory import service
from core.training.run import train
from core.weights.precision import choose
from tests import tiny

GUIDE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text("utf-8")
SECTIONS = {key: body for body in GUIDE.split("\n## ")[1:]
            for key in ("picture_processors", "callbacks", "adapter", "optimizer", "family")
            if f"\n{key}:" in body}
PROGRAM = re.compile(r"^`([\w.]+)`:\n\n```\w+\n(.*?)```", re.DOTALL | re.MULTILINE)


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    tiny.pictures(tmp_path / "pictures")

    def config(source: str = "", **changes: Any) -> TrainConfig:
        (tmp_path / "own.py").write_text(source)
        return TrainConfig.model_validate({
            "base_model": str(base), "train_data_dir": str(tmp_path / "pictures"),
            "output_dir": str(tmp_path / "out"), "output_name": "ink", "lora_rank": 4,
            "max_train_steps": 2, "learning_rate": 1e-3} | changes)
    return config


def run(config: TrainConfig, beside: Path) -> tuple[dict[str, Any], list[Event]]:
    events: list[Event] = []
    return train(importers.located(config, beside), events.append, Control()), events


# --- the guide --------------------------------------------------------------------------------

@pytest.mark.parametrize("key", importers.load.EXTENSIONS)
def test_the_guides_example_runs_as_printed(key: str, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    files = dict(PROGRAM.findall(SECTIONS[key]))
    assert len(files) == 2
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    tiny.pictures(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    code = launcher.main(["train", "--config", "my_style.yaml", "--json"])
    assert code == (130 if key == "callbacks" else 0)       # 130: stopped
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    weights = load_file(tmp_path / "output" / "output.safetensors") if told.get("lora") else {}
    check: Callable[..., None] = globals()[f"_see_{key}"]
    check(told, weights, tmp_path)


def _see_picture_processors(told: dict[str, Any], weights: dict[str, Any], folder: Path) -> None:
    assert told["proof"]["ok"]
    process = Processors([f"{folder}/contrast.py:raise_contrast"])
    grey = Image.linear_gradient("L").convert("RGB")
    made = process(grey, folder / "x.png")
    assert made.getpixel((0, 10)) == grey.getpixel((0, 10))             # outside of the box
    assert made.getpixel((128, 70)) < grey.getpixel((128, 70))          # darker dark
    assert made.getpixel((128, 180)) > grey.getpixel((128, 180))


def _see_callbacks(told: dict[str, Any], weights: dict[str, Any], folder: Path) -> None:
    assert (told["state"], told["steps"]) == ("stopped", 3)
    assert len((folder / "losses.csv").read_text().splitlines()) >= 1


def _see_adapter(told: dict[str, Any], weights: dict[str, Any], folder: Path) -> None:
    size = sum(v.numel() for k, v in weights.items() if "lora_up" in k)
    assert told["parameters"] == size
    assert told["proof"]["ok"]


def _see_optimizer(told: dict[str, Any], weights: dict[str, Any], folder: Path) -> None:
    up = torch.cat([v.flatten() for k, v in weights.items() if "lora_up" in k]).float()
    assert sorted({round(float(x) / 1e-4) for x in up} - {0}) in ([-2, 2], [-2, -1, 1, 2])


def _see_family(told: dict[str, Any], weights: dict[str, Any], folder: Path) -> None:
    assert told["proof"]["ok"]
    own = families.get(f"{folder}/two_layers.py:TwoLayers")
    assert own.spec.id == "sd15-two-layers"


# --- what it changes --------------------------------------------------------------------------

def test_an_edited_processor_makes_new_latents(make: Any, tmp_path: Path) -> None:
    source = "def dark(image, path):\n    return image.point(lambda x: x // {})\n"

    def encode(divisor: int, **changes: Any) -> tuple[int, torch.Tensor]:
        config = importers.located(make(source.format(divisor), **changes), tmp_path)
        family, precision, events = families.get("sd15"), choose("fp32", "cpu"), []
        examples = find(config, tmp_path / "pictures", None, 32, 8, lambda event: None)
        Encoder(family, Path(config.base_model), precision, config, events.append,
                Control()).fill(examples)
        return sum(getattr(e, "name", "") == "cache" for e in events), examples.latents[0]

    own = {"picture_processors": ["own:dark"]}
    plain, half, again, third = encode(2), encode(2, **own), encode(2, **own), encode(3, **own)
    assert [one[0] > 0 for one in (plain, half, again, third)] == [True, True, False, True]
    assert torch.equal(half[1], again[1])
    assert not torch.equal(half[1], plain[1])
    assert not torch.equal(half[1], third[1])


def test_callbacks_change_nothing_unasked(make: Any, tmp_path: Path) -> None:
    heard = "SEEN = []\ndef hear(event):\n    SEEN.append(event.kind)\n"
    plain, _ = run(make(), tmp_path)
    with_, events = run(make(heard, callbacks="own:hear", output_name="b"), tmp_path)
    one, two = load_file(plain["lora"]), load_file(with_["lora"])
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert sum(isinstance(e, Note) and e.key == "extensions.used" for e in events) == 1
    kinds = plugins.load(f"{tmp_path}/own.py:hear", "callbacks").found.__globals__["SEEN"]
    assert kinds == [*(event.kind for event in events), "ended"]


def test_a_variant_is_part_of_the_plan(make: Any, tmp_path: Path) -> None:
    freeze = dict(PROGRAM.findall(SECTIONS["adapter"]))["lora_fa.py"]
    _, events = run(make(freeze), tmp_path)
    _, frozen = run(make(freeze, adapter="own:freeze_a"), tmp_path)
    parameters = [next(e.plan["parameters"] for e in told if hasattr(e, "plan"))
                  for told in (events, frozen)]
    assert parameters[1] < parameters[0]


@pytest.mark.parametrize("keys", [
    {"adapter": "{file}:vary"}, {"optimizer": "{file}:vary"}, {"optimizer": "pack.own.vary"},
    {"adapter": "pack.own:vary", "optimizer": "pack.own:vary"}, {"family": "{file}:vary"},
    {"family": "pack.own:vary"}, {"callbacks": ["{file}:vary"]},
    {"picture_processors": ["pack.own:vary"]}])
def test_no_plan_runs_a_configs_code(keys: dict[str, Any], tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    """Nor the package around it. What isn't counted is said, by the command and to the window."""
    ran = tmp_path / "RAN"
    mark = f"open({str(ran)!r}, 'a').write('x')\ndef vary(*_): pass\n"
    (tmp_path / "pack").mkdir()
    for name in ("evil.py", "pack/__init__.py", "pack/own.py"):
        (tmp_path / name).write_text(mark)
    monkeypatch.syspath_prepend(tmp_path)
    tiny.pictures(tmp_path / "pictures")
    written = {key: [name.format(file=tmp_path / "evil.py") for name in value]
               if isinstance(value, list) else value.format(file=tmp_path / "evil.py")
               for key, value in keys.items()}
    (tmp_path / "their.yaml").write_text(json.dumps({
        "base_model": "demo", "train_data_dir": str(tmp_path / "pictures"), **written}))
    code = launcher.run(["plan", "--config", str(tmp_path / "their.yaml"), "--json"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    question = {"config": load_train_config(tmp_path / "their.yaml").model_dump(mode="json"),
                "purpose": "style", "language": "en"}
    with plugins.asleep():
        reply = service.answer(question)
    assert not ran.exists()
    if "family" in keys:
        assert (code, said["fault"]) == (2, "extensions.asleep")
        assert reply["fault"]["code"] == "extensions.asleep"
    else:
        counted = {key for key in keys if key not in ("callbacks", "picture_processors")}
        assert set(said["not_counted"]) == set(reply.get("not_counted", {})) == counted
        assert reply["plan"]["needs_mb"] > 0


def test_an_own_optimizer_resumes(make: Any, tmp_path: Path) -> None:
    source = dict(PROGRAM.findall(SECTIONS["optimizer"]))["sign.py"]
    config = make(source, optimizer="own:SignMomentum", max_train_steps=4)
    whole, _ = run(config.with_changes(output_dir=str(tmp_path / "whole")), tmp_path)
    control = Control()

    def stop(event: Event) -> None:
        # not at the checkpoint's event: its writer is a thread that may come after the last step
        if isinstance(event, Step) and event.step == 2:
            control.ask("stop")
    train(importers.located(config.with_changes(save_steps=2), tmp_path), stop, control)
    rest, _ = run(config.with_changes(resume=True), tmp_path)
    one, two = load_file(whole["lora"]), load_file(rest["lora"])
    assert all(torch.equal(one[k], two[k]) for k in one)


# --- failures ---------------------------------------------------------------------------------

BROKEN = """
def fails(*args, **options):
    raise ValueError("no\\nluck")

class Fails:
    def __init__(self, *args, **options):
        fails()

class FailsLater:
    def __call__(self, event):
        pass
    def after_update(self, trainer, done):
        fails()

from core.families.sd15.model import StableDiffusion1
class Lost(StableDiffusion1):
    def encode_image(self, parts, pixels):
        fails()

import torch
class Stuck(torch.optim.SGD):
    def step(self, closure=None):
        fails()

def gives(*args):
    return 5

class Little:
    spec = StableDiffusion1.spec
"""


@pytest.mark.parametrize(("key", "name", "code"), [
    ("picture_processors", "own:fails", "failed"), ("picture_processors", "own:gives", "wrong"),
    ("callbacks", "own:fails", "failed"), ("callbacks", "own:Fails", "failed"),
    ("callbacks", "own:FailsLater", "failed"), ("callbacks", "own:gives", "wrong"),
    ("adapter", "own:fails", "failed"), ("optimizer", "own:Fails", "failed"),
    ("optimizer", "own:Stuck", "failed"), ("optimizer", "own:gives", "wrong"),
    ("family", "own:Fails", "failed"), ("family", "own:Lost", "failed"),
    ("family", "own:Little", "wrong")])
def test_a_failing_extension_is_named(make: Any, tmp_path: Path, key: str, name: str,
                                      code: str) -> None:
    with pytest.raises(UserError) as caught:
        run(make(BROKEN, **{key: name}), tmp_path)
    fault = caught.value
    assert fault.code == {"failed": "extensions.failed", "wrong": "extensions.wrong_answer"}[code]
    assert (fault.params["key"], fault.params["name"]) == (key, f"{tmp_path / 'own.py'}:{name[4:]}")
    if code == "failed":
        assert fault.params["where"] == "own.py:3"
        assert "no luck" in str(fault)
    for language in i18n.LANGUAGES:
        assert "{" not in i18n.tr(fault.code, fault.params, language)


@pytest.mark.parametrize(("source", "name", "code"), [
    ("", "other:x", "missing"), ("", "own:x", "no_object"), ("def x(: 1", "own:x", "broken"),
    ("1 / 0", "own:x", "broken"), ("import sys; sys.exit()", "own:x", "broken"),
    ("x = 5", "own:x", "no_object"), ("", "json.nothing:x", "missing"), ("", "own", "bad_name"),
    ("", ":x", "bad_name"), ("", "own:x y", "bad_name"), ("", "..:x", "missing"),
    ("", "a\0b:x", "missing"), ("", "a\0b.py:x", "missing"), ("", "nope.py:x", "missing")])
def test_what_is_not_there(make: Any, tmp_path: Path, source: str, name: str, code: str) -> None:
    with pytest.raises(UserError) as caught:
        run(make(source, callbacks=[name]), tmp_path)
    assert caught.value.code == f"extensions.{code}"


def test_installed_modules_and_files_beside_the_yaml(tmp_path: Path) -> None:
    assert plugins.load("json:dumps", "callbacks").found is json.dumps
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "json.py").write_text("def dumps(x): return 'mine'")
    config = TrainConfig(callbacks=["tools.json:dumps", "json:dumps"], optimizer="torch.optim:SGD")
    found = importers.located(config, tmp_path)
    assert found.callbacks == [f"{tmp_path / 'tools' / 'json.py'}:dumps", "json:dumps"]
    assert found.optimizer == "torch.optim:SGD"
    assert plugins.load(found.callbacks[0], "callbacks")(1) == "mine"
    assert not [name for name in sys.modules if name.startswith("tools")]


def test_a_lora_file_may_not_name_code(tmp_path: Path) -> None:
    for key in importers.load.EXTENSIONS:
        text = dump_yaml(TrainConfig.model_validate({key: "os:abort"}))
        save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", {CONFIG_KEY: text})
        with pytest.raises(UserError, match="never run code") as caught:
            load_train_config(tmp_path / "a.safetensors")
        assert caught.value.code == "extensions.in_a_lora"
        own = {key: "[]" if key in ("callbacks", "picture_processors") else {
            "optimizer": "adamw", "adapter": "lora", "family": "auto"}[key]}
        assert not importers.named_in(load_train_config(tmp_path / "a.safetensors", own))
