from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.config import TrainConfig
from core.config.draw import DrawConfig
from core.errors import UserError
from core.families import schedulers
from core.families.sd15.model import StableDiffusion1
from core.inference import draw as drawing
from core.inference import generate
from core.jobs.control import Control
from core.lora_files import library
from core.training.run import train
from core.training.verify import verify
from core.weights.precision import choose
from tests import tiny
from tests.tiny import families as tiny_families


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short, strong training: the picture must change visibly."""
    folder = tmp_path_factory.mktemp("lora")
    config = TrainConfig(
        base_model=str(base), train_data_dir=str(tiny.pictures(folder / "p", 4)), lora_rank=4,
        output_dir=str(folder / "out"), output_name="ink", max_train_steps=12, batch_size=2,
        learning_rate=0.05, save_steps=6, target_modules="all-linear", cache_to_disk=False)
    return Path(train(config, lambda event: None, Control())["lora"])


def files(config: DrawConfig, notes: list[Any] | None = None) -> list[str]:
    told = notes.append if notes is not None else lambda event: None
    return [str(file) for file in drawing.draw(config, told, Control())["files"]]


def draw(base: Path, out: Path, **changes: Any) -> list[np.ndarray]:
    config = DrawConfig(**{"base": str(base), "prompt": "red disc", "steps": 3, "cfg": 2.0,
                           "out": str(out)} | changes)
    return [np.asarray(Image.open(p).convert("RGB")) for p in files(config)]


def test_weight_zero_is_the_base_to_the_bit(base: Path, lora: Path, tmp_path: Path) -> None:
    plain = draw(base, tmp_path)[0]
    zero = draw(base, tmp_path, loras=[f"{lora}:0"])[0]
    tagged = draw(base, tmp_path, names={lora.stem: str(lora)},
                  prompt=f"red disc <lora:{lora.stem}:0>")[0]
    strong = draw(base, tmp_path, loras=[f"{lora}:1"])[0]
    default = draw(base, tmp_path, loras=[str(lora)])[0]
    half = draw(base, tmp_path, loras=[f"{lora}:0.8"])[0]
    assert np.array_equal(plain, zero)
    assert np.array_equal(plain, tagged)
    assert not np.array_equal(plain, strong)
    assert np.array_equal(default, half)


def test_two_loras_add_up(base: Path, lora: Path, tmp_path: Path) -> None:
    """The same file twice at 0.4 is the file at 0.8; 8-bit rounding apart."""
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(lora.read_bytes())
    both = draw(base, tmp_path, loras=[f"{lora}:0.4", f"{twin}:0.4"])[0].astype(int)
    one = draw(base, tmp_path, loras=[f"{lora}:0.8"])[0].astype(int)
    assert np.abs(both - one).max() <= 1


def test_pictures_carry_their_parameters(base: Path, lora: Path, tmp_path: Path) -> None:
    config = DrawConfig(base=str(base), prompt="红色 disc", negative="blur", steps=2, seed=9,
                        loras=[f"{lora}:0.5"], count=2, out=str(tmp_path), sampler="euler")
    paths = files(config)
    texts = [Image.open(p).info["parameters"] for p in paths]   # type: ignore[index]
    assert [f"Seed: {s}" in t for s, t in zip((9, 10), texts, strict=True)] == [True, True]
    for part in ("红色 disc <lora:ink:0.5>", "Negative prompt: blur", "Steps: 2",
                 "Sampler: Euler,", "CFG scale: 7", "Size: 32x32", 'Lora hashes: "ink: '):
        assert part in texts[0]
    more = files(config)
    assert not set(more) & set(paths)                            # nothing is overwritten


def test_text_encoder_and_denoiser_have_weights_of_their_own(base: Path, tmp_path: Path) -> None:
    """`<lora:x:te:unet>`: each part at its weight is what a file of that part alone gives."""
    from safetensors.torch import save_file
    generator = torch.Generator().manual_seed(3)
    sides = {"unet": (f"lora_unet_{tiny.MIDDLE}_to_q", 64),
             "te": ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 32)}
    tensors = {f"{name}.lora_{end}.weight": torch.randn(shape, generator=generator)
               for name, width in sides.values()
               for end, shape in (("down", (2, width)), ("up", (width, 2)))}
    files = {part: str(tmp_path / f"{part}.safetensors") for part in ("both", *sides)}
    save_file(tensors, files["both"])
    for part in sides:
        save_file({k: v for k, v in tensors.items() if k.startswith(f"lora_{part}_")}, files[part])

    def drawn(prompt: str) -> np.ndarray:
        return draw(base, tmp_path, prompt=f"red disc {prompt}", names=files)[0]
    plain = drawn("")
    assert np.array_equal(drawn("<lora:both:0.9:0.3>"), drawn("<lora:te:0.9><lora:unet:0.3>"))
    assert np.array_equal(drawn("<lora:both:0:0.3>"), drawn("<lora:unet:0.3>"))
    assert np.array_equal(drawn("<lora:both:0.9:0>"), drawn("<lora:te:0.9>"))
    assert len({one.tobytes() for one in (plain, drawn("<lora:te:0.9>"), drawn("<lora:unet:0.3>"),
                                          drawn("<lora:both:0.9:0.3>"))}) == 4


def test_count_doesn_t_change_a_picture(base: Path, tmp_path: Path) -> None:
    many = draw(base, tmp_path, count=2, seed=4)
    assert np.array_equal(many[1], draw(base, tmp_path, seed=5)[0])


def test_sheets(base: Path, lora: Path, tmp_path: Path) -> None:
    weights = draw(base, tmp_path, loras=[str(lora)], sheet="weights=0,0.8,1", count=2)[0]
    steps = draw(base, tmp_path, loras=[str(lora)], sheet="checkpoints=6,12")[0]
    assert weights.shape[1] > steps.shape[1]
    for sheet, loras, code in (("weights=0,x", [str(lora)], "generate.bad_sheet"),
                               ("weights=", [str(lora)], "generate.bad_sheet"),
                               ("weights=1", [], "generate.bad_sheet"),
                               ("checkpoints=7", [str(lora)], "generate.no_checkpoint")):
        with pytest.raises(UserError) as caught:
            draw(base, tmp_path, loras=loras, sheet=sheet)
        assert caught.value.code == code


def test_unknown_names_get_the_nearest(base: Path, lora: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "output").symlink_to(lora.parent)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="ink"):
        library.find_lora("inkk", 0.8)
    assert library.find_lora("ink", 0.8).path.resolve() == lora
    with pytest.raises(UserError, match="euler"):
        draw(base, tmp_path, sampler="eulr")


def test_weights_of_a_base_that_can_t_take_them_are_told(tmp_path: Path) -> None:
    told: list[Any] = []
    source = tiny_families.base("sana", tmp_path / "sana")
    session = generate.PipelineSession(source, DrawConfig(base=str(source), device="cpu"),
                                       told.append)
    session.load()
    for prompt, parts in (("a (cat:1.3) BREAK [x]", "(cat:1.3), [x], BREAK"), ("a (cat)", "")):
        told.clear()
        session.tell_unread(session.shot(DrawConfig(base="x"), prompt))
        assert [one.params["parts"] for one in told
                if one.key == "generate.not_by_this_base"] == ([parts] if parts else [])


@pytest.mark.parametrize(("prompt", "clean", "found"), [
    ("a <lora:ink:0.5> b", "a b", [("ink", 0.5)]),
    ("<lora:ink>", "", [("ink", 0.8)]),
    ("x <lora:a:1><lora:b:-0.25> y", "x y", [("a", 1.0), ("b", -0.25)]),
    ("<lora:中文 名:.7> cat", "cat", [("中文 名", 0.7)]),
    ("a <lora:> b <lorax:y>", "a <lora:> b <lorax:y>", []),
    ("<lora:a:0.8:0.6>", "", [("a", 0.6, 0.8)]),            # text encoder, then the rest: A1111
    ("<lora:a:te=0.8:unet=0.6>", "", [("a", 0.6, 0.8)]),
    ("<lora:a:0.7:0.7>", "", [("a", 0.7)]),
    ("<lora:a:1:1:te=0>", "", [("a", 1.0, 0.0)]),
    ("<lora:a:1:lbw=MIDD>", "", [("a", 1.0, None, "lbw=MIDD")]),
    ("<lora:a:strong>", "", [("a", 0.8, None, "", "strong")]),
    ("<lora:a:1:IN02>", "", [("a", 1.0, None, "IN02")]),
    ("<lora:a:1:MIDD>", "", [("a", 1.0, None, "MIDD")]),
    ("<lora:a:>", "", [("a", 0.8, None, "", "")]),
    ("<lora:a:nan>", "", [("a", 0.8, None, "", "nan")]),
    ("<lora:a:1e9>", "", [("a", 0.8, None, "", "1e9")]),
    ("<lora:a:0,8>", "", [("a", 0.8, None, "", "0,8")]),
    ("x <LoRA: a : 0.5 > <lyco:b:1>", "x", [("a", 0.5), ("b", 1.0)]),
    ("《lora：a：０.５》，＜lora:b＞", "，", [("a", 0.5), ("b", 0.8)]),
    ('<lora:"a.safetensors":1>', "", [("a", 1.0)]),
    ("<lora:a:1:2:3>", "", [("a", 2.0, 1.0, "3")]),
])
def test_prompt_tags(prompt: str, clean: str, found: list[Any]) -> None:
    assert library.split_prompt(prompt) == (clean, [library.Tag(*one) for one in found])


@given(st.text(max_size=60))
def test_any_prompt_is_read(prompt: str) -> None:
    clean, found = library.split_prompt(prompt)
    assert all(tag.name for tag in found)
    assert len(clean) <= len(prompt)


@given(st.lists(st.sampled_from(["0.5", "-1", ".25", "te=0.3", "unet=2", "lbw=X", "", "x", "1e5"]),
                max_size=5))
def test_a_tag_goes_there_and_back(parts: list[str]) -> None:
    """What was understood is written in A1111's form, and read as the same again."""
    (tag,) = library.split_prompt("<lora:" + ":".join(["ink", *parts]) + ">")[1]
    lora = library.Lora(Path("ink.safetensors"), tag.weight, tag.text)
    assert library.split_prompt(lora.tag)[1] == [tag._replace(unread="", bad=None)]


@pytest.mark.parametrize(("text", "expected"), [
    ("ink:0.5", ("ink", 0.5)), ("ink", ("ink", 0.8)), ("C:\\x\\ink.safetensors:1",
     ("C:\\x\\ink.safetensors", 1.0)), ("C:\\x\\ink.safetensors", ("C:\\x\\ink.safetensors", 0.8)),
])
def test_lora_arguments(text: str, expected: tuple[str, float]) -> None:
    assert library.parse_lora(text) == expected


def test_every_sampler_draws(base: Path) -> None:
    family, precision = StableDiffusion1(), choose("fp32", "cpu")
    parts = family.load(base, precision)
    pipeline = family.pipeline(parts)
    for name, (label, _, _) in schedulers.SAMPLERS.items():
        shot = generate.SampleRequest("red disc", "", 1, 3, 2.0, (32, 32), name)
        image = generate.draw(pipeline, parts, shot, {"prompt": "red disc"}, precision)
        assert np.asarray(image).std() > 0, name
        assert schedulers.label(pipeline.scheduler) == label


def test_verify_tells_good_from_bad(base: Path, lora: Path, tmp_path: Path) -> None:
    report = verify(lora, DrawConfig(base=str(base)), lambda event: None)
    assert report["ok"]
    assert report["matched"] == report["modules"] > 0
    from safetensors.torch import load_file, save_file
    tensors = load_file(lora)
    nothing = tmp_path / "nothing.safetensors"
    save_file({k: torch.zeros_like(v) if "lora_up" in k else v for k, v in tensors.items()},
              nothing)
    assert not verify(nothing, DrawConfig(base=str(base)), lambda event: None)["ok"]
    other = tmp_path / "other.safetensors"
    save_file({k.replace("mid_block", "mid_block_gone"): v for k, v in tensors.items()}, other)
    part = verify(other, DrawConfig(base=str(base)), lambda event: None)
    assert not part["ok"]
    assert 0 < part["matched"] < part["modules"]
    notes: list[Any] = []
    files(DrawConfig(base=str(base), steps=1, loras=[str(other)], out=str(tmp_path)), notes)
    assert any(getattr(n, "key", "") == "generate.lora_partly" for n in notes)
    save_file({f"x_{k}": v for k, v in tensors.items()}, other)
    with pytest.raises(UserError, match="doesn't fit this base"):
        verify(other, DrawConfig(base=str(base)), lambda event: None)
