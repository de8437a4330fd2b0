"""Single files of each family, written in the original code's names, and read back."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import lora_conversion_utils
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GemmaTokenizer, T5Tokenizer

from core import families, paths
from core.adapters import lora
from core.config import TrainConfig
from core.errors import UserError
from core.families import loading
from core.families.components.lookup import ComponentFiles
from core.families.lumina2.model import GEMMA
from core.families.registry import SPECS
from core.inference import generate
from core.lora_files import formats
from core.weights.precision import Precision, choose
from tests.tiny import families as tiny_families
from tests.tiny.ldm_layout import behind, clip, open_clip, original, vae

FP32 = choose("fp32", "cpu")


def batch_normed_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flux.2's."""
    found = vae(state, 3)
    del found["bn.num_batches_tracked"]
    return {re.sub("^quant_conv", "encoder.quant_conv", name).replace(
        "post_quant_conv", "decoder.post_quant_conv"): value for name, value in found.items()}


FILM = {"conv_in": "conv1", "conv_out": "head.2", "norm_out": "head.0", "norm1": "residual.0",
        "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6", "quant_conv": "conv1",
        "conv_shortcut": "shortcut", "post_quant_conv": "conv2", "mid_block.resnets.0": "middle.0",
        "mid_block.attentions.0": "middle.1", "mid_block.resnets.1": "middle.2",
        "down_blocks": "downsamples"}


def film_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Wan's, three layers a level."""
    def place(match: re.Match[str]) -> str:
        within = 3 if match[2] == "upsamplers" else int(match[3])
        return f"upsamples.{4 * int(match[1]) + within}"
    words = re.compile("|".join(rf"(?<![^.]){re.escape(one)}(?![^.])" for one in FILM))
    return {words.sub(lambda found: FILM[found[0]], re.sub(
        r"up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)", place, name)): value
        for name, value in state.items()}


VAES = {"qwen": film_vae, "flux2": batch_normed_vae, "krea2": film_vae}


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
         ) -> tuple[str, Path, Any]:
    """A tiny base as a folder, whose configs stand for those that ship."""
    name = request.param
    folder = tiny_families.base(name, tmp_path / "folder")
    for path in folder.rglob("*config.json"):
        place = tmp_path / "families" / name / "configs" / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    monkeypatch.setattr(paths, "FAMILIES", tmp_path / "families")
    return name, folder, families.get(name).load(folder, FP32)


def compare(name: str, folder: Any, file: Any) -> None:
    pairs = [(folder.denoiser, file.denoiser), (folder.vae, file.vae),
             *((folder.text[k], file.text[k]) for k in folder.text if k.startswith("text_"))]
    for one, other in pairs:
        ours, theirs = one.state_dict(), other.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


@pytest.mark.parametrize("made", ["sdxl"], indirect=True)
def test_sdxl(made: tuple[str, Path, Any], tmp_path: Path) -> None:
    name, _, parts = made
    unet = original(SPECS[name].naming[0], parts.denoiser.state_dict())
    tensors = (behind("model.diffusion_model.", unet)
               | behind("first_stage_model.", vae(parts.vae.state_dict(), 3))
               | behind("conditioner.embedders.0.transformer.",
                        clip(parts.text["text_encoder"].state_dict()))
               | behind("conditioner.embedders.1.model.",
                        open_clip(parts.text["text_encoder_2"].state_dict())))
    path = tmp_path / "noob.safetensors"
    save_file(tensors | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, path)
    found = families.get(families.detect(path)).load(path, FP32)
    compare(name, parts, found)
    assert found.objective == "v_prediction"
    assert found.scheduler["rescale_betas_zero_snr"]
    assert found.text["tokenizer_2"].pad_token == "!"
    del tensors[next(key for key in tensors if "input_blocks.0.0.bias" in key)]
    save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        families.get(name).load(path, FP32, frozenset({"denoiser"}))
    assert caught.value.code == "families.weights_missing"
    assert "conv_in.bias" in str(caught.value)


@pytest.mark.parametrize("made", ["sd3"], indirect=True)
def test_sd3_beside_its_text_encoders(made: tuple[str, Path, Any], tmp_path: Path) -> None:
    """The transformer and VAE in one file; encoders and T5's tokenizer beside it."""
    name, _, parts = made
    state = parts.denoiser.state_dict()
    grid = state.pop("pos_embed.pos_embed")
    own = original(SPECS[name].naming[0], state) | {"pos_embed": grid}
    for key in own:                         # the last block's text ends there: two rows of shifts
        if key.startswith("joint_blocks.1.context_block.adaLN_modulation"):
            own[key] = own[key].roll(len(own[key]) // 2, 0)
    models = tmp_path / "models"
    (models / "clip").mkdir(parents=True)
    path = models / "sd3.safetensors"
    save_file(behind("model.diffusion_model.", own)
              | behind("first_stage_model.", vae(parts.vae.state_dict(), 3)), path)
    family = families.get(families.detect(path))
    with pytest.raises(UserError, match="CLIP-L") as caught:
        family.load(path, FP32, frozenset({"text_encoder"}))
    assert caught.value.code == "families.companion_missing"
    assert family.load(path, FP32, frozenset({"text_encoder_3"})).text == {}    # works without
    save_file(behind("", parts.text["text_encoder_3"].state_dict()),
              models / "clip" / "t5xxl.safetensors")
    with pytest.raises(UserError) as caught:     # the app's own tokenizer is that of the whole T5
        family.load(path, FP32, frozenset({"text_encoder_3"}))
    assert caught.value.code == "families.tokenizer_too_large"
    kept = models / "tokenizers" / "t5"
    T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581red", -1.0),
                       ("\u2581disc", -1.0)], extra_ids=0).save_pretrained(kept)
    family = families.get(name, ComponentFiles(tokenizer=kept))
    found = family.load(path, FP32, frozenset({"denoiser", "vae", "text_encoder_3"}))
    assert len(found.text["tokenizer_3"](["red disc"]).input_ids[0]) == 3
    ours = parts.text["text_encoder_3"].state_dict()
    assert all(torch.equal(value, ours[key])
               for key, value in found.text["text_encoder_3"].state_dict().items())
    for one, other in ((parts.denoiser, found.denoiser), (parts.vae, found.vae)):
        assert all(torch.equal(value, other.state_dict()[key])
                   for key, value in one.state_dict().items())


@pytest.mark.parametrize("made", list(VAES), indirect=True)
def test_a_denoiser_with_vae_and_text_encoder_beside_it(made: tuple[str, Path, Any],
                                                        tmp_path: Path) -> None:
    """The encoder's file holds a vision tower or a head, too: neither is there once loaded."""
    name, folder, parts = made
    models = tmp_path / "models"
    (models / "text_encoders").mkdir(parents=True)
    path = models / "base.safetensors"
    state = original(SPECS[name].naming[0], parts.denoiser.state_dict())
    save_file(behind("model.diffusion_model.", state), path)
    family = families.get(families.detect(path))
    with pytest.raises(UserError, match="VAE"):
        family.load(path, FP32, frozenset({"vae"}))
    save_file(behind("", VAES[name](parts.vae.state_dict())), models / "vae.safetensors")
    reader = folder / "text_encoder" / "model.safetensors"
    assert any("visual." in key or key.startswith("lm_head.") for key in load_file(reader))
    shutil.copyfile(reader, models / "text_encoders" / "reader.safetensors")
    family = families.get(name, ComponentFiles(tokenizer=folder / "tokenizer"))
    found = family.load(path, FP32)
    compare(name, parts, found)
    weights = found.text["text_encoder"].state_dict()
    assert not any("visual" in key or "head" in key for key in weights)
    _same_picture(folder, family, parts)
    half = choose("bf16", "cpu")            # Krea 2 keeps its norms in fp32 then
    numbers = [{key: value.dtype for key, value in one.denoiser.state_dict().items()} for one in (
        load(source, replace(half, device=torch.device(device)), frozenset({"denoiser"}))
        for load, device in ((family.load, "cpu"), (family.skeleton, "meta"))
        for source in (folder, path))]
    assert all(one == numbers[0] for one in numbers)


def _same_picture(folder: Path, family: Any, parts: Any) -> None:
    """As diffusers' own pipeline with the encoder's whole class."""
    shot = generate.SampleRequest("", "", 5, 2, 3.0, (32, 32))
    texts = {"prompt": "red disc, flat"}
    drawn = [np.asarray(generate.draw(pipeline, parts, shot, texts, FP32), dtype=float)
             for pipeline in (DiffusionPipeline.from_pretrained(folder), family.pipeline(parts))]
    assert np.abs(drawn[0] - drawn[1]).mean() < 0.05


@pytest.mark.parametrize("made", ["flux2", "krea2"], indirect=True)
def test_distilled_bases_and_negative_prompts(made: tuple[str, Path, Any]) -> None:
    """A folder says that its base is distilled; klein's pipeline knows no negative prompt."""
    name, folder, parts = made
    family = families.get(name)
    shot = generate.SampleRequest("", "", 5, 2, 3.0, (32, 32))
    drawn = [np.asarray(generate.draw(family.pipeline(parts), parts, shot, {
        "prompt": "red disc", "negative_prompt": negative}, FP32)) for negative in ("", "blue")]
    assert not np.array_equal(*drawn)
    index = folder / "model_index.json"
    index.write_text(index.read_text("utf-8").replace('"is_distilled": false',
                                                      '"is_distilled": true'), "utf-8")
    turbo = family.load(folder, FP32, frozenset())
    assert turbo.distilled is not None
    assert parts.distilled is None
    assert family.pipeline(turbo).config.is_distilled == (name == "krea2")     # klein: cfg decides
    assert turbo.flow == parts.flow         # learned as the base model is


@pytest.mark.parametrize(("name", "spelling", "reader"), [
    ("qwen", "kohya", "_convert_non_diffusers_qwen_lora_to_diffusers"),
    ("qwen", "comfyui", "_convert_non_diffusers_qwen_lora_to_diffusers"),
    ("flux2", "kohya", "_convert_kohya_flux2_lora_to_diffusers"),
    ("flux2", "comfyui", "_convert_non_diffusers_flux2_lora_to_diffusers"),
    ("krea2", "comfyui", "_convert_non_diffusers_krea2_lora_to_diffusers"),
])
def test_diffusers_reads_the_same_lora_in_other_spellings(name: str, spelling: str, reader: str
                                                          ) -> None:
    """By its own tables of the original code's names, which our loading does without."""
    model = tiny_families.MADE[name]().transformer
    sizes = lora.choose(model, TrainConfig(lora_rank=2, target_modules="attention+ff"),
                        families.get(name).spec)
    made = formats.from_tensors({
        f"transformer.{path}.lora_{half}.weight": torch.randn(
            (2, layer.in_features) if half == "A" else (layer.out_features, 2))
        for path in sizes for half in "AB" for layer in [model.get_submodule(path)]}, name)
    spelled = formats.spell(made, spelling)
    if spelling == "comfyui":               # some of its readers know no alpha, which is the rank
        spelled = {key: value for key, value in spelled.items() if not key.endswith(".alpha")}
    theirs, ours = (_products(one) for one in (
        getattr(lora_conversion_utils, reader)(dict(spelled)),
        formats.spell(made, "diffusers")))
    assert theirs.keys() == ours.keys()
    for path, product in ours.items():
        torch.testing.assert_close(theirs[path], product)


def _products(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"]
            for key in (name.removesuffix(".lora_A.weight") for name in state
                        if name.endswith(".lora_A.weight"))}


@pytest.mark.parametrize("name", ["sdxl", "sd2", "flux", "sd3", "flux2", "qwen", "krea2", "chroma",
                                  "lumina2", "sana"])
def test_full_size_names_and_shapes(name: str) -> None:
    """Of the shipped configs: the published shapes' names go there and back, without weights."""
    family: Any = families.get(name)
    component = next(p for p in family.components if p.part == "denoiser")
    config = loading.configs_in(paths.family_configs(name), family.components)[component.name]
    with torch.device("meta"):
        model = loading.create(component, config)
    state = model.state_dict()
    grid = state.pop("pos_embed.pos_embed", None)
    native = original(SPECS[name].naming[0], state)
    native |= {} if grid is None else {"pos_embed": grid}
    found = component.convert(native, config)
    expected = model.state_dict()
    assert expected.keys() <= found.keys()
    assert all(found[key].shape == value.shape for key, value in expected.items())
    count = sum(p.numel() for p in model.parameters())
    assert count == {"sdxl": 2_567_463_684, "sd2": 865_910_724, "flux": 11_901_408_320,
                     "sd3": 2_028_328_000, "flux2": 3_875_544_576,
                     "qwen": 20_430_401_088, "krea2": 12_820_073_036,
                     "chroma": 8_899_983_424, "lumina2": 2_609_769_152,
                     "sana": 1_604_462_752}[name]


@pytest.mark.parametrize("name", [name for name in families.SPECS if name != "qwen"])
def test_our_tables_of_single_files_are_those_of_diffusers(name: str) -> None:
    """Of the published sizes, which theirs know alone; ours take diffusers' own names, too. Every
    row of every weight has a number of its own."""
    family: Any = families.get(name)
    component = family.components[0]
    config = loading.configs_in(paths.family_configs(name), family.components)[component.name]
    with torch.device("meta"):
        state = loading.create(component, config).state_dict()
    rows: dict[str, Tensor] = {}
    for number, (key, value) in enumerate(state.items()):
        rows[key] = torch.arange(value.shape[0]) + 100_000 * number
        if key.endswith("scale_shift_table") and name == "krea2":
            rows[key] = torch.arange(value.numel()).view(value.shape)
    grid = rows.pop("pos_embed.pos_embed", None)
    native = original(SPECS[name].naming[0], rows) | ({} if grid is None else {"pos_embed": grid})
    if name == "sd3":
        last = f"joint_blocks.{config['num_layers'] - 1}.context_block.adaLN_modulation.1"
        native |= {key: native[key].roll(len(native[key]) // 2, 0)
                   for key in (f"{last}.weight", f"{last}.bias")}
        rows["pos_embed.pos_embed"] = native["pos_embed"]
    unused = {"pos_embed": torch.zeros(1), "y_embedder.y_embedding": torch.zeros(1)}
    theirs = SINGLE_FILE_LOADABLE_CLASSES[component.cls.__name__]["checkpoint_mapping_fn"](
        checkpoint=behind(UNET if "unet" in component.name else "", native)
        | (unused if name == "sana" else {}), config=config)
    for tensors in (native, rows):
        ours = component.convert(dict(tensors), config)
        assert ours.keys() == theirs.keys() == rows.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in rows)
        assert all(torch.equal(ours[key], value) for key, value in rows.items())


UNET = "model.diffusion_model."


@pytest.mark.parametrize("made", [name for name in tiny_families.MADE if name != "sd2"],
                         indirect=True)
def test_diffusers_own_names_in_a_single_file(made: tuple[str, Path, Any], tmp_path: Path
                                              ) -> None:
    """As finetunes are spread; sizes follow from the shapes."""
    name, _, parts = made
    path = tmp_path / "finetune.safetensors"
    for prefix in ("", "model.diffusion_model.", "transformer."):
        save_file(behind(prefix, parts.denoiser.state_dict()), path)
        assert families.detect(path) == name
        _same_denoiser(families.get(name), path, parts.denoiser)


def _same_denoiser(family: Any, path: Path, wanted: Any) -> None:
    found = family.load(path, FP32, frozenset({"denoiser"})).denoiser
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    sizes = [{key: list(value) if isinstance(value, tuple) else value
              for key, value in one.config.items() if key[0] != "_"} for one in (found, wanted)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("made", ["sdxl", "sd3", "zimage", "lumina2", "qwen", "flux2", "sana"],
                         indirect=True)
def test_vaes_of_diffusers_beside_and_inside(made: tuple[str, Path, Any], tmp_path: Path) -> None:
    """As they lie in a base's folder under `vae`, those of 2022 among them."""
    name, _, parts = made
    family, state = families.get(name), parts.vae.state_dict()
    path, beside = tmp_path / "models" / "base.safetensors", tmp_path / "models" / "vae"
    beside.mkdir(parents=True)
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    states = [state]
    if any(".to_out.0." in key for key in state) and name in ("sdxl", "sd3"):
        states.append({re.sub("|".join(map(re.escape, old)), lambda one: old[one[0]], key): value
                       for key, value in state.items()})
        assert states[0].keys() != states[1].keys()
    base = behind("", parts.denoiser.state_dict())
    for one in states:
        for files in ({path: base, beside / "own.safetensors": behind("", one)},
                      {path: {f"transformer.{key}": value for key, value in base.items()}
                       | behind("vae.", one)}):
            for file, tensors in files.items():
                save_file(tensors, file)
            found = family.load(path, FP32, frozenset({"vae"})).vae.state_dict()
            assert found.keys() == state.keys()
            assert all(torch.equal(found[key], value) for key, value in state.items())
            (beside / "own.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize("made", ["zimage"], indirect=True)
def test_a_text_encoder_in_the_same_file_as_comfyui_writes_it(made: tuple[str, Path, Any],
                                                              tmp_path: Path) -> None:
    name, folder, parts = made
    path = tmp_path / "all.safetensors"
    save_file(behind("model.diffusion_model.", parts.denoiser.state_dict())
              | behind("text_encoders.qwen3_4b.transformer.model.",
                       parts.text["text_encoder"].state_dict()), path)
    family = families.get(name, ComponentFiles(tokenizer=folder / "tokenizer"))
    found = family.load(path, FP32, frozenset({"text"})).text["text_encoder"].state_dict()
    assert all(torch.equal(value, found[key])
               for key, value in parts.text["text_encoder"].state_dict().items())


@pytest.mark.parametrize(("name", "width"), [("sd15", 768), ("sd2", 1024)])
def test_unets_of_diffusers_in_a_single_file(name: str, width: int, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, and as one program writes all parts: each behind its own name."""
    shutil.copytree(paths.family_configs(name), tmp_path / "families" / name / "configs")
    unet, clip_text = tiny_families.unet(width), tiny_families.clip(width=width)
    vae_own = tiny_families.vae()
    unet.save_config(tmp_path / "families" / name / "configs" / "unet")
    vae_own.save_config(tmp_path / "families" / name / "configs" / "vae")
    (tmp_path / "families" / name / "configs" / "text_encoder/config.json").write_text(
        clip_text.config.to_json_string(), "utf-8")
    monkeypatch.setattr(paths, "FAMILIES", tmp_path / "families")
    whole, family = tmp_path / "whole.safetensors", families.get(name)
    save_file(behind("unet.", unet.state_dict()) | behind("vae.", vae_own.state_dict())
              | behind("text_encoder.", clip(clip_text.state_dict())), whole)
    alone = tmp_path / "alone" / "unet.safetensors"
    alone.parent.mkdir()
    save_file(unet.state_dict(), alone)
    for path in (whole, alone):
        assert families.detect(path) == name
        _same_denoiser(family, path, unet)
    found = family.load(whole, FP32)
    for one, other in ((vae_own, found.vae), (clip_text, found.text["text_encoder"])):
        assert all(torch.equal(value, other.state_dict()[key])
                   for key, value in one.state_dict().items())


@pytest.mark.parametrize("made", ["flux", "chroma", "flux2"], indirect=True)
def test_norms_that_are_called_weight(made: tuple[str, Path, Any], tmp_path: Path) -> None:
    """As newer files of the original code's names have them."""
    name, _, parts = made
    path = tmp_path / "newer.safetensors"
    state = original(SPECS[name].naming[0], parts.denoiser.state_dict())
    newer = {re.sub(r"\.scale$", ".weight", key): value for key, value in state.items()}
    assert newer.keys() != state.keys()
    save_file(behind("", newer), path)
    assert families.detect(path) == name
    _same_denoiser(families.get(name), path, parts.denoiser)


@pytest.mark.parametrize("made", ["flux", "sd3", "sana", "zimage"], indirect=True)
def test_names_that_are_not_known_are_told(made: tuple[str, Path, Any], tmp_path: Path) -> None:
    """The first of them, and never that the file is to be downloaded again."""
    name, _, parts = made
    state = parts.denoiser.state_dict()
    path = tmp_path / "other.safetensors"
    renamed = next(key for key in state if key.endswith("to_out.0.weight"))
    state["brand.new.matrix"] = state.pop(renamed)
    save_file(behind("", state), path)
    with pytest.raises(UserError, match=r"brand\.new\.matrix") as caught:
        families.get(name).load(path, FP32, frozenset({"denoiser"}))
    assert caught.value.code == "families.names_unknown"
    assert renamed in str(caught.value)
    assert "ownload" not in str(caught.value)
    del state["brand.new.matrix"]
    save_file(behind("", state), path)
    with pytest.raises(UserError) as caught:
        families.get(name).load(path, FP32, frozenset({"denoiser"}))
    assert caught.value.code == "families.weights_missing"


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture],
          deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("made", ["flux", "sd3", "zimage", "flux2", "krea2", "lumina2", "sana",
                                  "sdxl"], indirect=True)
def test_a_file_that_is_not_the_models_is_never_a_damaged_download(
        made: tuple[str, Path, Any], tmp_path: Path, data: st.DataObject) -> None:
    """Weights that are left out, renamed or of other sizes, in both spellings."""
    name, _, parts = made
    state = parts.denoiser.state_dict()
    grid = state.pop("pos_embed.pos_embed", None)
    if data.draw(st.booleans(), "original"):
        own = {} if grid is None else {"pos_embed": grid}
        state = original(SPECS[name].naming[0], state) | own
    elif grid is not None:
        state["pos_embed.pos_embed"] = grid
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=2,
                                  unique=True)):
        value = state.pop(key)
        change = data.draw(st.sampled_from(["leave out", "rename", "cut", "flatten"]))
        if change != "leave out":
            state["some.other.name" if change == "rename" else key] = {
                "cut": value[:-1], "flatten": value.flatten()}.get(change, value)
    path = tmp_path / "other.safetensors"
    save_file(behind("", state), path)
    assert refusal(path) in (
        "", "families.names_unknown", "families.weights_missing", "families.other_sizes",
        "families.not_a_base", "families.not_understood")


def refusal(path: Path) -> str:
    """The code of what a file is refused for; empty: it was read."""
    try:
        families.get(families.detect(path)).load(path, FP32, frozenset({"denoiser"}))
    except UserError as fault:
        return fault.code
    return ""


@pytest.mark.parametrize(("made", "name"), [
    ("sd3", "pos_embed.proj.weight"), ("flux2", "context_embedder.weight"),
    ("lumina2", "time_caption_embed.caption_embedder.0.weight"),
    ("sana", "patch_embed.proj.weight")], indirect=["made"])
def test_sizes_that_no_weight_tells(made: tuple[str, Path, Any], name: str, tmp_path: Path
                                    ) -> None:
    family, _, parts = made
    path = tmp_path / "cut.safetensors"
    state = parts.denoiser.state_dict()
    del state[name]
    marks = {"sd3": {"joint_blocks.0.x": torch.zeros(1)}, "lumina2": {
        "cap_embedder.0.weight.x": torch.zeros(1)}}.get(family, {})
    save_file(behind("", state | marks), path)
    with pytest.raises(UserError) as caught:
        families.get(family).load(path, FP32, frozenset({"denoiser"}))
    assert caught.value.code in ("families.names_unknown", "families.other_model")
    assert "ownload" not in str(caught.value)


def gemma_folder(folder: Path) -> None:
    """A tokenizer of Gemma's own class."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", "r", "e", "d"]
    GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)


@pytest.mark.parametrize("made", ["lumina2", "sana"], indirect=True)
def test_gemma_reads_for_a_single_file(made: tuple[str, Path, Any], tmp_path: Path) -> None:
    """Lumina 2 as ComfyUI publishes it, all in one file; Sana's transformer with Gemma beside it.
    Another model's language model is no Gemma."""
    name, _, parts = made
    (tmp_path / "models" / "text_encoders").mkdir(parents=True)
    path = tmp_path / "models" / f"{name}.safetensors"
    own = original(SPECS[name].naming[0], parts.denoiser.state_dict())
    gemma = parts.text["text_encoder"].state_dict()
    beside = tmp_path / "models" / "text_encoders"
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)},
              beside / "another.safetensors")
    if name == "sana":
        save_file(behind("model.", gemma), beside / "gemma.safetensors")
        save_file(behind("", own), path)
    else:
        save_file(behind("model.diffusion_model.", own) | behind("vae.", vae(
            parts.vae.state_dict(), 4)) | behind(f"{GEMMA}model.", gemma), path)
    family = families.get(families.detect(path))
    with pytest.raises(UserError, match="Gemma") as caught:
        family.load(path, FP32, frozenset({"text"}))
    assert caught.value.code == "families.tokenizer_missing"
    kept = tmp_path / "models" / "tokenizers" / "gemma"
    gemma_folder(kept)
    with pytest.raises(UserError,
                       match=re.escape(str(kept))) as caught:     # too few words for Gemma 2
        family.load(path, FP32, frozenset({"text"}))
    assert caught.value.code == "families.tokenizer_other"
    family = families.get(name, ComponentFiles(tokenizer=kept))
    only = {"denoiser", "text"} | ({"vae"} if name == "lumina2" else set())
    found = family.load(path, FP32, frozenset(only))
    found.vae = found.vae or parts.vae
    compare(name, parts, found)
    half = Precision(torch.device("cpu"), torch.float16, torch.float16, torch.float32)
    encoder = family.load(path, half, frozenset({"text"}))
    with torch.autocast("cpu", torch.bfloat16):
        cond = family.encode_text(encoder, ["red", ""])
    assert cond["text"].dtype == encoder.text["text_encoder"].dtype == torch.bfloat16
    assert cond["mask"].sum(1)[0] > cond["mask"].sum(1)[1]


def test_a_damaged_index_is_told_and_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    """It says which layers of Krea 2's text encoder are read: others would be trained on."""
    folder, family = tiny_families.base("krea2", tmp_path / "base"), families.get("krea2")
    parts = family.load(folder, FP32)
    assert family.pipe_options(parts)["text_encoder_select_layers"]
    (folder / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index\.json"):
        family.pipe_options(parts)
