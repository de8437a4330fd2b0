"""Going on from an existing LoRA, of any format; final files of every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core import families
from core.adapters import init, lora
from core.config import TrainConfig
from core.errors import UserError
from core.families.sd15.spec import NAMING as SD1
from core.importers import load_train_config
from core.jobs.events import Event, Note
from core.lora_files import formats
from core.lora_files.files import describe
from core.lora_files.layers import Layer, Lora
from tests import tiny
from tests.lora_files.deltas import delta
from tests.lora_files.test_formats import layer
from tests.training.test_trainer import Make, make, run, trainer_of  # noqa: F401  (a fixture)

SPEC = families.get("sd15").spec
ATTENTION = [path for path, module in tiny.tiny_unet().named_modules()
             if path.endswith(("to_q", "to_k", "to_v", "to_out.0"))]


def file_of(folder: Path, rank: int = 4, alpha: float = 2.0, to: str = "kohya",
            paths: list[str] = ATTENTION, extra: dict[str, Layer] | None = None) -> Path:
    unet = tiny.tiny_unet()
    layers = {}
    for path in paths:
        weight = unet.get_submodule(path).weight
        kernel = weight.shape[2] if weight.ndim == 4 else 0
        layers[f"unet.{path}"] = layer(rank, weight.shape[0], weight.shape[1], kernel, alpha)
    return formats.save(Lora(layers | (extra or {}), SD1), to,
                        folder / f"start{'' if to == 'peft' else '.safetensors'}")


def started(path: Path, **changes: Any) -> tuple[Any, list[Note]]:
    config = TrainConfig.model_validate({"init_lora_weights": str(path), "lora_rank": 4} | changes)
    unet = tiny.tiny_unet()
    lora.attach(unet, config, SPEC)
    notes: list[Event] = []
    init.start({"unet": unet}, config, SPEC, notes.append)
    return unet, [one for one in notes if isinstance(one, Note)]


def deltas(unet: Any) -> dict[str, torch.Tensor]:
    return {f"unet.{name}": one.get_delta_weight(lora.ADAPTER).detach().double()
            for name, one in lora.layers(unet)}


def agree(unet: Any, wanted: Lora) -> None:
    """Tolerance: float32."""
    found = deltas(unet)
    for path, one in wanted.layers.items():
        torch.testing.assert_close(found[path], delta(one).view_as(found[path]),
                                   rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", formats.FORMATS)
@pytest.mark.parametrize("alpha", [None, 1.0, 16.0])
def test_every_format_starts_with_its_delta(tmp_path: Path, to: str, alpha: float | None) -> None:
    path = file_of(tmp_path, to=to)
    unet, notes = started(path, lora_alpha=alpha)
    agree(unet, formats.read(path))
    assert [one.key for one in notes] == ["lora_init.started"]
    assert notes[0].params["fresh"] == 0


def test_convolutions_and_projections(tmp_path: Path) -> None:
    unet = tiny.tiny_unet()
    paths = [name for name, module in unet.named_modules()
             if name.endswith(("proj_in", "conv1", "ff.net.2"))]
    path = file_of(tmp_path, paths=paths)
    unet, _ = started(path, target_modules=["proj_in", "conv1", "ff.net.2"])
    agree(unet, formats.read(path))


def test_another_rank_needs_to_be_asked_for(tmp_path: Path) -> None:
    path = file_of(tmp_path, rank=6, alpha=3.0)
    with pytest.raises(UserError, match="init_lora_resize") as caught:
        started(path)
    assert [fix.changes for fix in caught.value.fixes] == [
        {"init_lora_resize": True}, {"lora_rank": 6, "lora_alpha": 3.0}]
    for fix in caught.value.fixes:                    # what is offered works
        started(path, **fix.changes)
    agree(started(path, **caught.value.fixes[1].changes)[0], formats.read(path))


def test_a_lower_rank_is_the_nearest_and_a_higher_one_is_exact(tmp_path: Path) -> None:
    path = file_of(tmp_path, rank=6)
    whole = formats.read(path)
    found = deltas(started(path, init_lora_resize=True, lora_rank=2)[0])
    for name, one in whole.layers.items():
        values = torch.linalg.svdvals(delta(one))
        assert float((found[name] - delta(one)).norm()) == pytest.approx(
            float(values[2:].norm()), rel=1e-3)
    unet, _ = started(path, init_lora_resize=True, lora_rank=16)
    agree(unet, whole)
    for _, one in lora.layers(unet):                  # the new directions can learn
        a, b = one.lora_A[lora.ADAPTER].weight, one.lora_B[lora.ADAPTER].weight
        assert (a[6:].flatten(1).norm(dim=1) > 0).all()
        assert not b[:, 6:].any()


def test_layers_that_would_be_lost_are_a_fault_whose_fix_works(tmp_path: Path) -> None:
    extra = [name for name, _ in tiny.tiny_unet().named_modules() if name.endswith("conv1")]
    for paths, preset in (([*ATTENTION, "mid_block.attentions.0.proj_in"], "all-linear"),
                          ([*ATTENTION, *extra], None)):
        path = file_of(tmp_path, paths=paths)
        with pytest.raises(UserError, match="target_modules") as caught:
            started(path)
        changes = caught.value.fixes[0].changes
        assert preset in (None, changes["target_modules"])
        agree(started(path, **changes)[0], formats.read(path))


def test_the_text_encoder_is_told_and_fresh_layers_start_at_zero(tmp_path: Path) -> None:
    text = {"text_encoder.encoder.layers.0.mlp.fc1": layer(4, 64, 32)}
    path = file_of(tmp_path, paths=ATTENTION[:2], extra=text)
    unet, notes = started(path)
    assert [one.key for one in notes] == ["lora_init.started", "lora_init.left_out"]
    assert (notes[0].params["layers"], notes[1].params["count"]) == (2, 1)
    zero = [name for name, value in deltas(unet).items() if not value.any()]
    assert len(zero) == notes[0].params["fresh"] == len(ATTENTION) - 2


def test_a_trained_text_encoder_goes_on_as_well(make: Make, tmp_path: Path) -> None:  # noqa: F811
    path = file_of(tmp_path, extra={
        f"text_encoder.{name}": layer(4, 32, 32, alpha=2.0) for name in (
            "encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.v_proj")})
    trainer = trainer_of(make(init_lora_weights=str(path), text_encoder_lr=1e-4))
    assert trainer.text is not None
    found = {f"text_encoder.{name}": one.get_delta_weight(lora.ADAPTER).detach().double()
             for name, one in lora.layers(trainer.text.models["text_encoder"])}
    for name, one in formats.read(path).layers.items():
        if name in found:
            torch.testing.assert_close(found.pop(name), delta(one), rtol=1e-5, atol=1e-5)
    assert found
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize(("path", "made", "code"), [
    ("unet.nowhere.to_q", layer(4), "lora_init.none_fit"),
    (f"unet.{ATTENTION[0]}", layer(4, 32, 32, dora=True), "lora_init.other_kind"),
    (f"unet.{ATTENTION[0]}", layer(4, 48, 32), "lora_init.other_base")])
def test_what_does_not_fit_is_one_sentence(tmp_path: Path, path: str, made: Layer,
                                           code: str) -> None:
    file = formats.save(Lora({path: made}, SD1), "kohya", tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        started(file)
    assert caught.value.code == code
    assert "{" not in str(caught.value)


# --- whole runs --------------------------------------------------------------------------------

@pytest.mark.parametrize("to", ["peft", "comfyui"])
def test_a_run_writes_and_proves_every_format(make: Make, tmp_path: Path,  # noqa: F811
                                              to: str) -> None:
    """Going on from a file: with next to no steps it is that file again (tolerance: float32), in
    the format that is asked for; checkpoints stay kohya's."""
    start = file_of(tmp_path, to="diffusers")
    result, events = run(make(save_precision="fp32", save_format=to, init_lora_weights=str(start),
                              lora_alpha=1.0, learning_rate=1e-12, max_train_steps=1))
    assert any(isinstance(e, Note) and e.key == "lora_init.started" for e in events)
    path = Path(result["lora"])
    assert result["proof"]["ok"], result["proof"]
    assert result["proof"]["matched"] == result["proof"]["modules"] == len(ATTENTION)
    assert path.name == ("ink" if to == "peft" else "ink.safetensors")
    found, wanted = formats.read(path), formats.read(start)
    kept = next((tmp_path / "out" / "checkpoints").rglob("ink-*.safetensors"))
    for name, one in wanted.layers.items():
        torch.testing.assert_close(delta(found.layers[name]), delta(one), rtol=1e-5, atol=1e-6)
        assert torch.equal(delta(found.layers[name]), delta(formats.read(kept).layers[name]))
    assert describe(kept).format == "kohya"
    assert load_train_config(formats.weights_file(path)).save_format == to
