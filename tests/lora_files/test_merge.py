"""Merging, lower ranks, extraction: against the full matrices that the code never makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from core import i18n
from core.errors import UserError
from core.families.layer_names import to_native
from core.families.sd15.spec import NAMING as SD1
from core.lora_files import formats
from core.lora_files.extract import extract
from core.lora_files.layers import Layer, Lora, rank_of
from core.lora_files.merge import Cut, merge, resize
from tests import tiny
from tests.lora_files.deltas import delta
from tests.lora_files.test_formats import OTHER_KINDS, layer

NAME = "unet.mid_block.attentions.0.proj_in"


@pytest.fixture(autouse=True)
def _english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(i18n, "language", lambda: "en")


def one(found: Layer) -> Lora:
    return Lora({NAME: found}, SD1)


# --- resize ------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 1, 3]),
       st.sampled_from([0.25, 1.0, 7.0, -2.0]), st.integers(0, 99))
def test_a_lower_rank_is_the_nearest_there_is(rank: int, wanted: int, kernel: int, alpha: float,
                                              seed: int) -> None:
    """Eckart and Young: what is lost is the energy of the singular values that are cut.
    Tolerance: float32."""
    torch.manual_seed(seed)
    lora = one(layer(rank, 12, 11, kernel, alpha))
    whole = delta(lora.layers[NAME])
    resized = resize(lora, Cut(wanted))
    found = resized.lora.layers[NAME]
    values = torch.linalg.svdvals(whole.flatten(1))
    lost = (delta(found) - whole).flatten(1).norm()
    assert rank_of(found) == min(rank, wanted)
    assert float(lost) == pytest.approx(float(values[wanted:].norm()),
                                        rel=1e-4, abs=1e-5 * float(values[0]))
    assert resized.kept == pytest.approx(
        float(values[:wanted].square().sum() / values.square().sum()), abs=1e-6)
    assert found["lora_down.weight"].shape[1:] == lora.layers[NAME]["lora_down.weight"].shape[1:]


@settings(deadline=None, max_examples=40)
@given(st.floats(0.05, 0.999), st.integers(2, 8), st.integers(0, 99))
def test_energy_keeps_the_fewest_ranks_that_hold_it(energy: float, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    lora = one(layer(rank, 12, 11, 0, 3.0))
    values = torch.linalg.svdvals(delta(lora.layers[NAME]))
    shares = (values.square().cumsum(0) / values.square().sum()).numpy()
    kept = rank_of(resize(lora, Cut(energy=energy)).lora.layers[NAME])
    assert kept == 1 + int(np.searchsorted(shares, energy))
    assert rank_of(resize(lora, Cut(1, energy)).lora.layers[NAME]) == 1


def test_layers_that_are_small_enough_stay_to_the_bit() -> None:
    lora = one(layer(4, alpha=1.0, dtype=torch.float16))
    assert resize(lora, Cut(4)).lora.layers[NAME] is not None
    for end, value in resize(lora, Cut(8)).lora.layers[NAME].items():
        assert torch.equal(value, lora.layers[NAME][end])


def test_zero_layers_and_types_survive() -> None:
    found = layer(4, dtype=torch.bfloat16)
    found["lora_up.weight"].zero_()
    resized = resize(one(found), Cut(2))
    assert resized.lora.layers[NAME]["lora_down.weight"].dtype == torch.bfloat16
    assert not delta(resized.lora.layers[NAME]).any()


def test_dora_keeps_magnitudes_in_a_lower_rank() -> None:
    found = layer(4, dora=True)
    resized = resize(one(found), Cut(2)).lora.layers[NAME]
    assert torch.equal(resized["dora_scale"], found["dora_scale"])
    assert rank_of(resized) == 2


def test_a_rotation_has_no_lower_rank() -> None:
    with pytest.raises(UserError, match="oft"):
        resize(one(OTHER_KINDS["oft"]()), Cut(1))


def test_whole_differences_stay_beside_lower_ranks() -> None:
    lora = Lora({NAME: OTHER_KINDS["full"](), "unet.conv_in": layer(4)}, SD1)
    resized = resize(lora, Cut(2))
    assert resized.lora.layers[NAME] is lora.layers[NAME]
    assert resized.ranks == (2, 2)


# --- merge -------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 4), st.floats(-2, 2), st.floats(0.25, 8, width=32)),
                min_size=1, max_size=3), st.sampled_from([0, 3]), st.integers(0, 99))
def test_a_merge_is_the_weighted_sum(given_: list[tuple[int, float, float]], kernel: int,
                                     seed: int) -> None:
    """Tolerance: float32. Layers that only one file has are merged as well."""
    torch.manual_seed(seed)
    loras = [(one(layer(rank, 6, 5, kernel, alpha)), weight) for rank, weight, alpha in given_]
    loras[0][0].layers["unet.conv_in"] = layer(2, alpha=1.0)
    merged = merge(loras)
    wanted = sum(weight * delta(lora.layers[NAME]) for lora, weight in loras)
    torch.testing.assert_close(delta(merged.layers[NAME]), wanted, rtol=1e-5, atol=1e-5)
    assert rank_of(merged.layers[NAME]) == sum(rank for rank, _, _ in given_)
    torch.testing.assert_close(delta(merged.layers["unet.conv_in"]),
                               loras[0][1] * delta(loras[0][0].layers["unet.conv_in"]),
                               rtol=1e-5, atol=1e-5)


def test_a_merge_to_a_rank_is_the_best_of_the_sum() -> None:
    loras = [(one(layer(3, alpha=3.0)), 0.8), (one(layer(2, alpha=1.0)), 0.5)]
    whole = sum(weight * delta(lora.layers[NAME]) for lora, weight in loras)
    found = delta(resize(merge(loras), Cut(2)).lora.layers[NAME])
    values = torch.linalg.svdvals(whole)
    assert float((found - whole).norm()) == pytest.approx(float(values[2:].norm()), rel=1e-4)


def test_whole_differences_are_added_up() -> None:
    first, second = OTHER_KINDS["full"](), OTHER_KINDS["full"]()
    merged = merge([(one(first), 0.5), (one(second), 2.0)]).layers[NAME]
    for end in first:
        torch.testing.assert_close(merged[end], 0.5 * first[end] + 2 * second[end])


@pytest.mark.parametrize(("first", "second", "code"), [
    (layer(2), OTHER_KINDS["oft"](), "lora_convert.no_merge"),
    (layer(2), layer(2, dora=True), "lora_convert.no_merge"),
    (OTHER_KINDS["loha"](), layer(2, out=7), "lora_convert.other_shapes"),
    (layer(2), layer(2, out=7), "lora_convert.other_shapes")])
def test_what_has_no_sum_is_refused(first: Layer, second: Layer, code: str) -> None:
    with pytest.raises(UserError) as caught:
        merge([(one(first), 1.0), (one(second), 1.0)])
    assert caught.value.code == code
    assert "{" not in str(caught.value)


# --- lycoris, the community's own library ------------------------------------------------------

@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 3, 3)])
def test_lycoris_sees_the_same_delta_after_every_conversion(tmp_path: Path, kind: str,
                                                            shape: tuple[int, ...]) -> None:
    functional = pytest.importorskip(f"lycoris.functional.{'locon' if kind == 'lora' else kind}")
    torch.manual_seed(1)
    weights = functional.weight_gen(torch.randn(shape), rank=2)
    names = {"lora": ("lora_down.weight", "lora_up.weight", "lora_mid.weight"),
             "loha": ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2"),
             "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
                      "lokr_t2")}[kind]
    own = {name: torch.randn_like(value) for name, value in zip(names, weights, strict=True)
           if value is not None}
    lora = one(own | {"alpha": torch.tensor(1.0)})
    path = formats.save(lora, "comfyui", tmp_path / "a.safetensors")
    again = formats.read(path, "sd15").layers[NAME]

    def diff(found: Layer) -> torch.Tensor:
        return functional.diff_weight(*(found.get(name) for name in names), gamma=0.5)
    assert torch.equal(diff(again), diff(own))
    if kind == "lora":
        torch.testing.assert_close(diff(again).flatten(1).double(),
                                   delta(again).flatten(1), rtol=1e-5, atol=1e-6)


# --- extract -----------------------------------------------------------------------------------

def models(tmp_path: Path, rank: int) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base, the same with known differences of this rank, and those differences."""
    base = tiny.tiny_base(tmp_path / "base")
    tuned = tiny.tiny_base(tmp_path / "tuned")
    torch.manual_seed(5)
    known = {}
    for part, chosen in (("unet", ("to_q.weight", "conv1.weight", "proj_in.weight")),
                         ("text_encoder", ("fc1.weight",))):
        file = next((tuned / part).glob("*.safetensors"))
        tensors = load_file(file)
        for key, value in tensors.items():
            if key.endswith(chosen):
                flat = value.flatten(1)
                change = 0.3 * torch.randn(flat.shape[0], rank) @ torch.randn(rank, flat.shape[1])
                known[f"{part}.{key}".replace("text_model.", "")] = change.view_as(value)
                tensors[key] = value + change.view_as(value)
        save_file(tensors, file, {"format": "pt"})
    return base, tuned, known


def test_extraction_gives_a_known_difference_back(tmp_path: Path) -> None:
    """Tolerance: what float32 leaves of base + difference - base."""
    base, tuned, known = models(tmp_path, 3)
    found = extract(tuned, base, 3)
    assert {f"{path}.weight" for path in found.lora.layers} == known.keys()
    for path, one_ in found.lora.layers.items():
        torch.testing.assert_close(delta(one_).float(), known[f"{path}.weight"],
                                   rtol=1e-4, atol=1e-4)
    assert found.kept == pytest.approx(1)
    less = extract(tuned, base, 2, conv_rank=0)
    assert less.kept < 1
    assert not any("conv1" in path for path in less.lora.layers)
    assert less.rest == sum("conv1" in path for path in known)


def test_large_matrices_by_chance_directions_are_as_good(monkeypatch: pytest.MonkeyPatch,
                                                         tmp_path: Path) -> None:
    base, tuned, known = models(tmp_path, 3)
    monkeypatch.setattr("core.lora_files.extract._SMALL", 0)
    monkeypatch.setattr("core.lora_files.extract._OVERSAMPLING", 4)
    first, second = extract(tuned, base, 3), extract(tuned, base, 3)
    for path, one_ in first.lora.layers.items():
        torch.testing.assert_close(delta(one_).float(), known[f"{path}.weight"],
                                   rtol=1e-3, atol=1e-4)
        assert all(torch.equal(one_[end], second.lora.layers[path][end]) for end in one_)


def single_file(folder: Path, out: Path) -> Path:
    """The tiny base as one file with the original code's names."""
    tensors = {}
    for key, value in load_file(next((folder / "unet").glob("*.safetensors"))).items():
        module, _, end = key.rpartition(".")
        tensors[f"model.diffusion_model.{to_native(SD1[0], module).name}.{end}"] = value
    for key, value in load_file(next((folder / "text_encoder").glob("*.safetensors"))).items():
        key = key if key.startswith("text_model.") else f"text_model.{key}"
        tensors[f"cond_stage_model.transformer.{key}"] = value
    save_file(tensors, out)
    return out


def test_folders_and_single_files_are_compared_with_each_other(tmp_path: Path) -> None:
    base, tuned, known = models(tmp_path, 2)
    for pair in ((single_file(tuned, tmp_path / "t.safetensors"), base),
                 (tuned, single_file(base, tmp_path / "b.safetensors"))):
        found = extract(*pair, 2)
        assert {f"{path}.weight" for path in found.lora.layers} == known.keys()


def test_models_that_are_no_pair_are_refused(tmp_path: Path) -> None:
    base, _, _ = models(tmp_path, 2)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2)},
              tmp_path / "other.safetensors")
    for first, second, code in ((base, base, "same_models"),
                                (tmp_path / "other.safetensors", base, "other_models"),
                                (tmp_path, base, "no_weights"),
                                (tmp_path / "gone.safetensors", base, "missing")):
        with pytest.raises(UserError) as caught:
            extract(first, second, 2)
        assert caught.value.code.endswith(code)
        assert "{" not in str(caught.value)
