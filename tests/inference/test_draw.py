"""Pictures as a job: weights as columns, seeds as rows, stop between two, faults for bad files."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from core.config import draw as draw_config
from core.config import dump_yaml
from core.config.draw import DrawConfig
from core.errors import UserError
from core.inference import draw
from core.jobs.control import Control
from core.jobs.events import Event, Phase, Sample


def settings(base: Path, tmp_path: Path, **more: object) -> DrawConfig:
    return DrawConfig.model_validate({"base": str(base), "prompt": "a cat", "steps": 2, "cfg": 1.0,
                                      "out": str(tmp_path / "out"), "device": "cpu", **more})


def test_one_picture_a_seed(base: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    result = draw.draw(settings(base, tmp_path, count=2, seed=5), told.append, Control())
    samples = [event for event in told if isinstance(event, Sample)]
    assert result["state"] == "done"
    assert [sample.seed for sample in samples] == [5, 6]
    assert result["files"] == [sample.path for sample in samples]
    for file in result["files"]:
        with Image.open(file) as image:
            assert "Seed: " in image.text["parameters"]


def test_a_stop_comes_between_two_pictures(base: Path, tmp_path: Path) -> None:
    control = Control()

    def emit(event: Event) -> None:
        if isinstance(event, Sample):
            control.ask("stop")
    result = draw.draw(settings(base, tmp_path, count=5), emit, control)
    assert (result["state"], len(result["files"])) == ("stopped", 1)


def test_the_config_comes_back_from_its_file(base: Path, tmp_path: Path) -> None:
    config = settings(base, tmp_path, weights=[0.0, 0.8], loras=["x:0.8"], size=[64, 32])
    (tmp_path / "config.yaml").write_text(dump_yaml(config), "utf-8")
    assert draw_config.load(tmp_path / "config.yaml") == config
    (tmp_path / "config.yaml").write_text("base: x\nsteps: many\n")
    with pytest.raises(UserError) as caught:
        draw_config.load(tmp_path / "config.yaml")
    assert caught.value.params["line"] == 2


def test_weights_are_columns(tmp_path: Path) -> None:
    from core.lora_files.library import Lora
    loras = [Lora(tmp_path / "a", 0.8), Lora(tmp_path / "b", 0.3)]
    config = DrawConfig(base="x", weights=[0.0, 1.0])
    columns, labels = draw.columns_of(config, loras)
    assert [[one.weight for one in column] for column in columns] == [[0.0, 0.3], [1.0, 0.3]]
    assert labels == ["weight 0", "weight 1"]
    assert draw.columns_of(config, []) == ([[]], [])
    assert draw.columns_of(DrawConfig(base="x"), loras) == ([loras], [])
    sheet = DrawConfig(base="x", sheet="weights=0, 1")
    assert draw.columns_of(sheet, loras) == (columns, labels)


def test_checkpoints_are_columns(tmp_path: Path) -> None:
    from core.lora_files.library import Lora
    files = [tmp_path / f"mia-{step:06d}.safetensors" for step in (10, 20)]
    for file in files:
        file.touch()
    config = DrawConfig(base="x", checkpoints=[str(file) for file in files], labels=["step 10"])
    columns, labels = draw.columns_of(config, [Lora(tmp_path / "a", 0.6),
                                               Lora(tmp_path / "b", 0.3)])
    assert [[(one.path.name, one.weight) for one in column] for column in columns] == [
        [(file.name, 0.6), ("b", 0.3)] for file in files]
    assert labels == ["step 10", ""]


def test_a_tag_s_weight_goes_before_the_list_s(tmp_path: Path) -> None:
    for name in ("ink", "mia"):
        (tmp_path / f"{name}.safetensors").touch()
    config = DrawConfig(
        base="x", prompt="a <lora:mia:0.2> cat <lora:wash:0.4>", names={
            "mia": str(tmp_path / "mia.safetensors"), "wash": str(tmp_path / "ink.safetensors")},
        loras=[str(tmp_path / "mia.safetensors") + ":0.9"])
    told: list[Event] = []
    prompt, negative, loras = draw.texts_and_loras(config, told.append)
    assert (prompt, negative) == ("a cat", "")
    assert [(one.path.stem, one.weight) for one in loras] == [("mia", 0.2), ("ink", 0.4)]
    assert [(one.key, one.params["tag"], one.params["others"]) for one in told  # type: ignore
            ] == [("generate.lora_twice", "<lora:mia:0.2>", "0.9")]


@pytest.mark.parametrize(("prompt", "part"), [
    ("an __animal__", "__animal__"), ("a [cat:dog:0.5]", "[cat:dog:0.5]"),
    ("a [cat|dog]", "[cat|dog]"), ("embedding:easynegative", "embedding:easynegative"),
    ("(cat)1.3", ")1.3"), ("a cat++, x", "cat++"), ("a cat AND a dog", "AND"),
    ("[trigger], a cat", "[trigger]"), ("<hypernet:x:1> cat", "<hypernet:x:1>"),
    ("a cat <lora:ink:0.8", "<lora:ink:0.8"), ("lora：ink", "lora：ink"),
    ("a cat (in a hat), {one}, snake_case_word", ""), ("(a cat:1.4) BREAK [x] ((y)) ||| z", ""),
    (r"ink \(style\)", ""), ("# a note\ncat", ""), ("（红发：1.3），猫", ""),
])
def test_other_programs_syntax_is_told(prompt: str, part: str) -> None:
    for words in ({"prompt": prompt}, {"negative": prompt}):
        told: list[Event] = []
        draw.texts_and_loras(DrawConfig(base="x", **words), told.append)
        assert [one.params["parts"] for one in told] == ([part] if part else [])  # type: ignore


@pytest.mark.parametrize("words", [
    {"prompt": "(cat:nan)"}, {"negative": "(cat:1e9)"}, {"prompt": "(cat:1,2)"},
    {"prompt": "(cat:)"}, {"prompt": "<lora:mia:nan>"}, {"prompt": "<lora:mia:99>"},
    {"prompt": "<lora:mia:>"}, {"loras": ["mia:nan"]}, {"loras": ["mia:0,8"]},
    {"loras": ["mia:1e9"]}, {"prompt": "<lora:mia:0.5:inf>"}])
def test_weights_that_are_none_are_refused(words: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "mia.safetensors").touch()
    config = DrawConfig.model_validate({
        "base": "x", "names": {"mia": str(tmp_path / "mia.safetensors")}} | words)
    with pytest.raises(UserError) as caught:
        draw.texts_and_loras(config)
    assert caught.value.code == "generate.bad_weight"


def test_weights_of_a_sheet_and_of_base_loras(tmp_path: Path) -> None:
    from core.lora_files.library import Lora, find_lora, parse_lora
    with pytest.raises(UserError) as caught:
        draw.columns_of(DrawConfig(base="x", sheet="weights=0,nan"), [Lora(tmp_path, 1.0)])
    assert caught.value.code == "generate.bad_sheet"
    (tmp_path / "mia.safetensors").touch()
    for weight in ("nan", "1e9", "0,8"):
        with pytest.raises(UserError) as caught:
            find_lora(*parse_lora(f"{tmp_path / 'mia'}:{weight}"))
        assert caught.value.code == "generate.bad_weight"


def test_tags_of_the_negative_prompt_are_told_and_go() -> None:
    told: list[Event] = []
    config = DrawConfig(base="x", negative="blur <lora:mia:1>")
    assert draw.texts_and_loras(config, told.append) == ("", "blur", [])
    assert [one.key for one in told] == ["generate.tag_in_negative"]  # type: ignore


def test_a_lora_tells_the_word_for_its_place(tmp_path: Path) -> None:
    from tests.tiny import tiny_lora
    lora = tiny_lora(tmp_path / "mia.safetensors", metadata={"modelspec.trigger_phrase": "mi4"})
    told: list[Event] = []
    prompt, *_ = draw.texts_and_loras(
        DrawConfig(base="x", prompt="[trigger], a cat", loras=[str(lora)]), told.append)
    assert (prompt, told) == ("mi4, a cat", [])


def test_each_seed_takes_one_alternative_and_weights_weigh(base: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    draw.draw(settings(base, tmp_path, prompt="a {red|blue|green} (cat:1.5)", count=6, steps=1),
              told.append, Control())
    drawn = [event for event in told if isinstance(event, Sample)]
    assert len({sample.prompt for sample in drawn}) > 1
    for sample in drawn:
        with Image.open(sample.path) as image:
            assert image.text["parameters"].startswith(sample.prompt + "\n")
        assert sample.prompt in {f"a {one} (cat:1.5)" for one in ("red", "blue", "green")}
    assert "generate.choice" in [getattr(event, "key", "") for event in told]


def test_what_a_tag_can_t_say_here_is_told(tmp_path: Path) -> None:
    (tmp_path / "mia.safetensors").touch()
    told: list[Event] = []
    *_, loras = draw.texts_and_loras(DrawConfig(base="x", prompt="<lora:mia:1:lbw=MIDD>", names={
        "mia": str(tmp_path / "mia.safetensors")}), told.append)
    assert [(one.weight, one.text) for one in loras] == [(1.0, None)]
    assert [(one.key, one.params["part"]) for one in told  # type: ignore
            ] == [("generate.tag_unread", "lbw=MIDD")]


def test_command_line_and_window_draw_the_same_bytes(
        base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompt, LoRAs and seed: by `generate`, and by the worker as the window has it."""
    from core.cli.console import FINE
    from core.jobs import control, runs, worker
    from launcher import main
    from tests.tiny import tiny_lora
    monkeypatch.chdir(tmp_path)
    lora = tiny_lora(tmp_path / "output" / "ink.safetensors")
    assert main(["generate", "--base", str(base), "--prompt", "a cat <lora:ink:0.8>", "--lora",
                 f"{lora}:0.5", "--seed", "5", "--steps", "2", "--out", "line"]) == FINE
    config = DrawConfig(base=str(base), prompt="a cat <lora:ink:0.8>", loras=[f"{lora}:0.5"],
                        names={"ink": str(lora)}, seed=5, steps=2, out="window")
    folder = runs.create_run("generate", dump_yaml(config), "x", queued=False)
    end = worker.run_job("generate", worker.load_config("generate", folder / "config.yaml"),
                         folder, control.Control(), lambda event: None)
    assert end.state == "done"
    line, window = (Path(name, "00001.png").read_bytes() for name in ("line", "window"))
    assert line == window
    assert b"<lora:ink:0.8>" in line
    assert main(["generate", "--base", str(base), "--prompt", "a cat", "--lora", f"{lora}:0.8",
                 "--seed", "5", "--steps", "2", "--out", "list"]) == FINE
    assert Path("list", "00001.png").read_bytes() == line
    main(["generate", "--base", str(base), "--prompt", "a cat", "--lora", f"{lora}:0.5",
          "--seed", "5", "--steps", "2", "--out", "other"])
    assert Path("other", "00001.png").read_bytes() != line


@pytest.mark.parametrize("key", ["prompt", "negative"])
def test_the_end_of_a_prompt_that_isn_t_read_is_told(base: Path, tmp_path: Path, key: str) -> None:
    told: list[Event] = []
    text = ", ".join(["a big cat"] * 70) + ", two zebras"
    draw.draw(settings(base, tmp_path, **{"steps": 1, "prompt": "a cat", key: text}), told.append,
              Control())
    (note,) = [one for one in told if getattr(one, "key", "") == f"generate.{key}_too_long"]
    assert note.params["rest"].endswith("two zebras")  # type: ignore
    assert note.params["tokens"] == 283  # type: ignore


def test_what_stands_behind_too_many_breaks_is_told(base: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    draw.draw(settings(base, tmp_path, steps=1, prompt="a BREAK (b:1.2) BREAK c BREAK two zebras"),
              told.append, Control())
    (note,) = [one for one in told if getattr(one, "key", "") == "generate.prompt_too_long"]
    assert (note.params["rest"], note.params["limit"]) == ("two zebras", 225)  # type: ignore
    assert 225 < note.params["tokens"] < 240  # type: ignore


def test_tags_name_and_don_t_reach(tmp_path: Path) -> None:
    (tmp_path / "mia.safetensors").touch()
    with pytest.raises(UserError) as caught:
        draw.texts_and_loras(DrawConfig(base="x", prompt=f"<lora:{tmp_path / 'mia'}:1>"))
    assert caught.value.code == "generate.lora_path"


def test_a_comparison_ends_with_its_sheet(base: Path, tmp_path: Path) -> None:
    """And a stop within a picture keeps what is whole."""
    from tests.tiny import tiny_lora
    lora = tiny_lora(tmp_path / "ink.safetensors")
    config = settings(base, tmp_path, weights=[0.0, 1.0], loras=[f"{lora}:1"], count=2, seed=3)
    told: list[Event] = []
    result = draw.draw(config, told.append, Control())
    samples = [event for event in told if isinstance(event, Sample)]
    assert [(one.step, one.seed) for one in samples] == [(0, 3), (1, 3), (0, 4), (1, 4), (-1, 3)]
    assert len(result["files"]) == 4
    assert Path(samples[-1].path).name.startswith("sheet-")
    with Image.open(samples[-1].path) as sheet, Image.open(samples[0].path) as one:
        assert sheet.width > 2 * one.width
    drawing = [event for event in told if isinstance(event, Phase) and event.name == "draw"]
    assert all(event.total == 8 for event in drawing)

    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, Sample):
            control.ask("stop")
    assert draw.draw(config, stop, control) == {
        "state": "stopped", "files": [str(tmp_path / "out" / "00006.png")]}


def test_deleted_pictures_keep_their_numbers(tmp_path: Path) -> None:
    from core.inference import generate, trash
    picture = Image.new("RGB", (4, 4))
    first, second = (generate.save_numbered(picture, tmp_path, "x") for _ in range(2))
    there = trash.discard(second)
    assert generate.save_numbered(picture, tmp_path, "x").stem == "00003"
    trash.restore(there, second)
    assert second.is_file()
    again = trash.discard(first)
    generate.save_png(picture, first, "y")
    with pytest.raises(FileExistsError):
        trash.restore(again, first)
    assert trash.discard(first) != again


def test_sizes_that_can_t_be_drawn_and_loras_of_other_families(base: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    with pytest.raises(UserError, match="64 x 64") as caught:
        draw.draw(settings(base, tmp_path, size="66,65"), lambda event: None, Control())
    assert caught.value.code == "generate.bad_size"
    import torch
    from safetensors.torch import save_file
    other = tmp_path / "other.safetensors"
    save_file({f"lora_unet_double_blocks_0_img_attn_proj.lora_{end}.weight": torch.zeros(shape)
               for end, shape in (("down", (2, 3072)), ("up", (3072, 2)))}, other)
    with pytest.raises(UserError) as caught:
        draw.draw(settings(base, tmp_path, loras=[str(other)]), told.append, Control())
    assert caught.value.code == "generate.other_family"
    assert not any(isinstance(event, Phase) for event in told)      # before anything was loaded


def test_a_preview_is_the_picture_that_generate_draws(base: Path, tmp_path: Path) -> None:
    """The same prompt, weight, seed and numbers, from memory and from the file; clip skip and
    several chunks included, tags of a preview's prompt left out and told."""
    import numpy as np

    from core.config import TrainConfig
    from core.training.run import train
    from tests.tiny import pictures
    prompt, told = "a red disc, " * 30, list[Event]()
    result = train(TrainConfig(
        base_model=str(base), train_data_dir=str(pictures(tmp_path / "p", 2)), lora_rank=4,
        output_dir=str(tmp_path / "out"), max_train_steps=3, learning_rate=0.05, clip_skip=2,
        sample_prompts=[prompt, "a cat <lora:other:1>"], sample_every=3, sample_inference_steps=3,
        sample_cfg=2.0, sample_size="32,40", sample_weight=0.7, save_precision="fp32", seed=8,
        text_encoder_lr=1e-3, device="cpu"), told.append, Control())
    (note,) = [one for one in told if getattr(one, "key", "") == "engine.preview_tags"]
    assert note.params["names"] == "other"  # type: ignore
    previews = result["samples"][-2:]
    for number, text in enumerate((prompt, "a cat")):
        (file,) = draw.draw(settings(
            base, tmp_path, prompt=text, loras=[f"{result['lora']}:0.7"], cfg=2.0, steps=3,
            size="32,40", seed=8 + number), lambda event: None, Control())["files"]
        ours, theirs = (np.asarray(Image.open(path).convert("RGB"), np.int16)
                        for path in (file, previews[number]))
        assert ours.shape == (40, 32, 3)
        assert np.abs(ours - theirs).max() <= 1
        without = draw.draw(settings(
            base, tmp_path, prompt=text, cfg=2.0, steps=3, size="32,40", seed=8 + number,
            clip_skip=2), lambda event: None, Control())["files"][0]
        plain = np.asarray(Image.open(without).convert("RGB"), np.int16)
        assert np.abs(ours - plain).max() > 4


def test_a_negative_prompt_without_guidance_is_told(base: Path, tmp_path: Path) -> None:
    for cfg, notes in ((1.0, 1), (2.0, 0)):
        told: list[Event] = []
        draw.draw(settings(base, tmp_path, negative="blur", cfg=cfg, count=2), told.append,
                  Control())
        assert sum(getattr(one, "key", "") == "generate.negative_unused" for one in told) == notes
