"""Rows of the keys that name a base's companions."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from core import families
from core.families.base import Parts
from core.families.components import lookup
from core.families.components.lookup import ComponentFiles
from core.hashes import fingerprint
from core.weights.precision import choose
from tests.keys.lab import Lab, row
from tests.tiny import families as tiny_families
from tests.tiny import ldm_layout


@functools.cache
def flux(folder: Path) -> Path:
    return tiny_families.base("flux", folder / "flux")


def read(lab: Lab, **changes: object) -> Parts:
    """T5 and its tokenizer, as a run with that config reads them."""
    family = families.get("flux", lookup.files_from_config(lab.config(**changes)))
    return family.load(flux(lab.folder), choose("fp32", "cpu"), frozenset({"text_encoder_2"}))


@row("vae")
def _(lab: Lab) -> None:
    """Of another file than the base's: other latents, and the LoRA tells its name."""
    _, _, parts = lab.parts()
    other = {name: value.clone() for name, value in parts.vae.state_dict().items()}
    other["quant_conv.weight"] *= 1000
    path = lab.folder / "own_vae.safetensors"
    save_file(ldm_layout.behind("", ldm_layout.vae(other, 3)), path)
    run = lab.run(vae=str(path), output_dir=str(lab.folder / "with_vae"), max_train_steps=1)
    assert run.metadata["ss_vae_name"] == path.name
    assert "ss_vae_name" not in lab.plain_run.metadata
    assert run.result["companions"]["vae"]["path"] == str(path)
    assert path.name in run.notes("families.companions_taken")[0].params["files"]
    assert run.notes("families.latents_scale")      # no scale that a base has learned with
    assert not lab.plain_run.notes("families.latents_scale")
    family = families.get("sd15", lookup.files_from_config(run.config))
    loaded = family.load(lab.base, choose("fp32", "cpu"), frozenset({"vae"}))
    pixels = torch.rand(1, 3, 32, 32)
    (mine, bases) = (family.encode_image(one, pixels) for one in (loaded, parts))
    assert not torch.allclose(mine, bases)
    assert family.weight_files(lab.base, "vae") == [(path, "")]     # what the cache goes by


@row("text_encoders")
def _(lab: Lab) -> None:
    state = load_file(flux(lab.folder) / "text_encoder_2" / "model.safetensors")
    path = lab.folder / "own_t5.safetensors"
    save_file({name: value * 2 for name, value in state.items()}, path)
    plain, named = (read(lab, text_encoders=files).text["text_encoder_2"].state_dict()
                    for files in ([], [str(path)]))
    assert torch.equal(named["shared.weight"], plain["shared.weight"] * 2)


@row("tokenizer")
def _(lab: Lab) -> None:
    """A folder of the same words in another order."""
    path = lab.folder / "own_tokenizer"
    shutil.copytree(flux(lab.folder) / "tokenizer_2", path)
    told = (path / "tokenizer.json").read_text("utf-8")
    for a, b in (('"red"', '"swap"'), ('"blue"', '"red"'), ('"swap"', '"blue"')):
        told = told.replace(a, b)
    (path / "tokenizer.json").write_text(told, "utf-8")
    ids = [read(lab, tokenizer=folder).text["tokenizer_2"](["red disc"]).input_ids[0]
           for folder in ("", str(path))]
    assert ids[0][1:] == ids[1][1:]
    assert ids[0][0] != ids[1][0]
    caches = {fingerprint(families.get("flux", ComponentFiles(tokenizer=folder)).weight_files(
        flux(lab.folder), "text")) for folder in (None, path)}
    assert len(caches) == 2                 # texts that were read by the other don't count
