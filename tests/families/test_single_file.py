"""Full-size random weights in the layout of v1-5-pruned: loaded offline, trained, proven."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from core import families
from core.errors import UserError
from core.importers import load_train_config
from core.jobs.control import Control
from core.jobs.events import Step
from core.training.run import train
from core.weights.precision import choose
from tests import tiny
from tests.config.test_config import FIRST
from tests.tiny import ldm_layout

Models = dict[str, nn.Module]
pytestmark = pytest.mark.xdist_group("sd15")        # gigabytes, made once


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Models]]:
    path = tmp_path_factory.mktemp("models") / "v1-5-pruned.safetensors"
    models = ldm_layout.full_size()
    ldm_layout.write(path, models)
    yield path, models
    path.unlink()


@pytest.mark.thorough
def test_every_weight_arrives(checkpoint: tuple[Path, Models]) -> None:
    path, models = checkpoint
    assert families.detect(path) == "sd15"
    parts = families.get("sd15").load(path, choose("fp16", "cpu"))
    assert (parts.native_size, parts.bucket_step, parts.objective) == (512, 64, "epsilon")
    loaded = {"unet": parts.denoiser, "vae": parts.vae, "text": parts.text["text_encoder"]}
    for name, model in models.items():
        expected = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
        found = {k.removeprefix("text_model."): v for k, v in loaded[name].state_dict().items()}
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            want = value.half() if value.is_floating_point() else value
            assert torch.equal(found[key].to(want.dtype), want), f"{name}.{key}"


@pytest.mark.thorough
def test_described_config_trains_on_it(checkpoint: tuple[Path, Models], tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The first described YAML, word for word; only resolution and steps are cut, for time."""
    path, models = checkpoint
    models.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/Stable-diffusion").mkdir(parents=True)
    (tmp_path / "models/Stable-diffusion/v1-5-pruned.safetensors").symlink_to(path)
    data = tiny.pictures(tmp_path / "data/style_train", count=4, size=(80, 64), captions=False)
    (data / "metadata.csv").write_text("".join(
        f"{p.name},my style number {i}\n" for i, p in enumerate(sorted(data.glob("*.png")))))
    (tmp_path / "my.yaml").write_text(FIRST)
    config = load_train_config(tmp_path / "my.yaml",
                               {"max_resolution": "64,64", "max_train_steps": "1"})
    assert (config.learning_rate, config.save_steps, config.epochs) == (2e-4, 100, 10)
    steps: list[Step] = []
    result = train(config, lambda e: steps.append(e) if isinstance(e, Step) else None, Control())
    assert result["proof"]["matched"] == result["proof"]["modules"] == 128
    assert steps[-1].loss == pytest.approx(1.0, abs=0.5)        # random weights predict nothing
    # the described claim "about 3 million parameters" is not what rank 8 on attention counts to
    assert result["parameters"] == 1_594_368


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    cases = {"lora_unet_a.lora_down.weight": "a LoRA",
             "double_blocks.0.img_attn.norm.key_norm.scale": "video model",
             "encoder.conv_in.weight": "a VAE"}
    for key, what in cases.items():
        path = tmp_path / f"{what.split()[-1]}.safetensors"
        save_file({key: torch.zeros(1)}, path)
        with pytest.raises(UserError, match=f"{what}.*not Stable Diffusion 1"):
            families.get("sd15").load(path, choose("fp32", "cpu"))
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02pickle")
    with pytest.raises(UserError, match="pickle"):
        families.get("sd15").load(tmp_path / "old.ckpt", choose("fp32", "cpu"))
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="can't be read"):
        families.get("sd15").load(tmp_path / "torn.safetensors", choose("fp32", "cpu"))
