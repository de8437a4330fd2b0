"""Every verb of `darkroom lora` on every format, number type, family and kind of LoRA.

Each gives a file that adds what its source adds, or one sentence; and what the sentence advises is
done here, and works."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.families.registry import SPECS, naming
from core.lora_files import formats
from core.lora_files.layers import Layer, Lora, as_product, kind_of, rank_of
from core.lora_files.merge import Cut, merge, resize
from core.safetensors_header import read_header
from tests.cli.test_commands import Run, run  # noqa: F401  (a fixture)
from tests.lora_files.deltas import delta, weight
from tests.lora_files.test_formats import OTHER_KINDS

FAMILIES = {
    "sd15": ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
             "text_encoder.encoder.layers.0.mlp.fc1"),
    "sdxl": ("unet.down_blocks.2.attentions.0.transformer_blocks.5.attn1.to_q",
             "text_encoder_2.encoder.layers.0.mlp.fc1"),
    "flux": ("transformer.transformer_blocks.0.attn.to_q",
             "transformer.single_transformer_blocks.0.proj_out")}
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
         "fp8": torch.float8_e4m3fn}
# A part of a refusal -> the options that do what it advises; None: it asks for no other call.
ADVICE = {"Use kohya or comfyui as the format": ("--to", "kohya"),
          "Draw with both files instead": None, "Use the file as it is": None}


def file_of(folder: Path, family: str, kind: str, format_: str, dtype: str) -> Path:
    torch.manual_seed(3)
    lora = Lora({path: OTHER_KINDS[kind]() for path in FAMILIES[family]}, naming(family),
                {"ss_steps": "7"})
    path = formats.save(lora, format_, folder / formats.file_name(f"{kind}-{dtype}", format_))
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        tensors = {key: value if "alpha" in key else value.to(TYPES[dtype])
                   for key, value in load_file(file).items()}
        save_file(tensors, file, read_header(file).metadata)
    return path


SOURCES = [(family, kind, format_, dtype)
           for number, (family, kind, format_) in enumerate(itertools.product(
               FAMILIES, sorted(OTHER_KINDS), formats.FORMATS))
           if kind in formats.HOLDS[format_]
           # every type with every kind of SD 1.5's, else in turns
           for dtype in (TYPES if family == "sd15" and format_ in ("kohya", "peft")
                         else [[*TYPES][number % 4]])]


@pytest.mark.parametrize(("family", "kind", "format_", "dtype"), SOURCES,
                         ids=["-".join(source) for source in SOURCES])
def test_every_verb(run: Run, tmp_path: Path, family: str, kind: str,  # noqa: F811
                    format_: str, dtype: str) -> None:
    source = file_of(tmp_path, family, kind, format_, dtype)
    before = formats.read(source, family)
    calls = [["convert", source, "--to", to, "--family", family] for to in formats.FORMATS]
    calls += [["merge", f"{source}:0.5", f"{source}:0.5"], ["merge", source, "--rank", "64"],
              ["resize", source, "--rank", "64"]]
    for number, call in enumerate(calls):
        # a file has the very name that is asked for; PEFT's format is a folder
        folder = "peft" in call or (call[0] == "resize" and format_ == "peft")
        out = tmp_path / f"out-{number}{'' if folder else '.safetensors'}"
        told = run("lora", *call, "--out", out)
        if told.code:
            assert told.code == 2
            assert "Traceback" not in told.err
            assert not out.exists()
            advice = next(options for part, options in ADVICE.items() if part in told.err)
            if advice is None:
                assert kind in ("dora", "oft")
                continue
            out = tmp_path / f"advised-{number}.safetensors"
            told = run("lora", *call, *advice, "--out", out)
        assert told.code == 0, told.err
        assert out.is_dir() == (folder and "advised" not in out.name)
        after = formats.read(out, family)
        # q, k and v of Flux are one matrix in the original code's names
        assert before.layers.keys() <= after.layers.keys(), call
        for path, one in before.layers.items():
            changed = after.layers[path]
            if kind in ("dora", "oft"):
                assert kind_of(changed) == kind
            else:
                torch.testing.assert_close(weight(changed), weight(one), rtol=0.02, atol=0.02)
    assert run("lora", "info", source).code == 0
    told = run("lora", "verify", source, "--json")
    assert told.code == 0
    assert told.json["modules"] == len(before.layers)


def test_an_embedding_is_no_lora(run: Run, tmp_path: Path) -> None:  # noqa: F811
    save_file({"emb_params": torch.randn(2, 768)}, tmp_path / "a.safetensors")
    for call in (["convert", "a.safetensors", "--to", "kohya"], ["merge", "a.safetensors"],
                 ["resize", "a.safetensors", "--rank", "2"], ["verify", "a.safetensors"]):
        told = run("lora", *call)
        assert told.code == 2
        assert "embedding" in told.err
    assert run("lora", "info", "a.safetensors").code == 0


def test_pefts_folder_is_no_file(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """Both ways out that the sentence names are ways out."""
    source = file_of(tmp_path, "sd15", "lora", "kohya", "fp16")
    call = ["lora", "convert", source, "--out", "a.safetensors", "--to"]
    told = run(*call, "peft")
    assert told.code == 2
    assert "--out a)" in told.err
    assert "--to diffusers" in told.err
    assert run(*call[:3], "--to", "peft", "--out", "a").code == 0
    assert run(*call, "diffusers").code == 0
    assert Path("a.safetensors").is_file()
    # of a folder that is there, the file gets a name in it
    assert run("lora", "resize", source, "--rank", "1", "--out", "a").code == 0
    assert Path("a", "lora-fp16-r1.safetensors").is_file()


def test_a_resize_of_pefts_folder_into_a_file_is_a_file(run: Run,  # noqa: F811
                                                        tmp_path: Path) -> None:
    source = file_of(tmp_path, "flux", "lora", "peft", "fp16")
    assert run("lora", "resize", source, "--rank", "1", "--out", "a.safetensors").code == 0
    assert Path("a.safetensors").is_file()


@pytest.mark.parametrize("keys", [
    ("lokr_w1 2 3", "lokr_w2 4 5"), ("lokr_w1 3 2", "lokr_w2_a 4 2", "lokr_w2_b 2 6"),
    ("lokr_w1_a 3 1", "lokr_w1_b 1 2", "lokr_w2 5 4"),
    ("hada_w1_a 6 2", "hada_w1_b 2 9", "hada_w2_a 6 2", "hada_w2_b 2 9")])
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_factors_as_a_product(keys: tuple[str, ...], alpha: float | None) -> None:
    layer = {name: torch.randn(int(rows), int(columns)) for name, rows, columns in (
        key.split() for key in keys)} | ({} if alpha is None else {"alpha": torch.tensor(alpha)})
    torch.testing.assert_close(delta(as_product("x", layer)), weight(layer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "sides"), [
    ("loha", ("hada_w1_b 2 45", "hada_w1_a 6 2", "hada_w2_b 2 45", "hada_w2_a 6 2")),
    ("loha", ("hada_w1_b 2 5", "hada_w1_a 2 6", "hada_w2_b 2 5", "hada_w2_a 2 6",
              "hada_t1 2 2 3 3", "hada_t2 2 2 3 3")),
    ("lokr", ("lokr_w1 2 1", "lokr_w2_a 3 2", "lokr_w2_b 2 45")),
    ("lokr", ("lokr_w1 2 1", "lokr_w2 3 5 3 3")),
    ("lokr", ("lokr_w1 2 1", "lokr_t2 2 2 3 3", "lokr_w2_a 2 3", "lokr_w2_b 2 5"))])
def test_factors_of_kernels_are_those_of_lycoris(kind: str, sides: tuple[str, ...]) -> None:
    functional = pytest.importorskip(f"lycoris.functional.{kind}")
    names = {"loha": "hada_w1_b hada_w1_a hada_w2_b hada_w2_a hada_t1 hada_t2",
             "lokr": "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"}[kind]
    layer: Layer = {name: torch.randn(*map(int, numbers)) for name, *numbers in map(
        str.split, sides)}
    wanted = functional.diff_weight(*(layer.get(name) for name in names.split()),
                                    gamma=float(layer["lokr_w2_a"].shape[1])
                                    if "lokr_w2_a" in layer else 1.0)
    found = delta(as_product("unet.mid_block.resnets.0.conv1", layer))
    torch.testing.assert_close(found.float(), wanted.reshape(6, 5, 3, 3), atol=1e-5, rtol=1e-4)


def test_sums_of_kinds_and_what_is_too_wide() -> None:
    """A LoHa, a LoKr and a plain layer make one; a whole LoKr needs a rank."""
    torch.manual_seed(1)
    path, sd1 = FAMILIES["sd15"][0], SPECS["sd15"].naming
    kinds = [OTHER_KINDS[kind]() for kind in ("loha", "lokr", "lora")]
    merged = merge([(Lora({path: layer}, sd1), 0.5) for layer in kinds]).layers[path]
    assert kind_of(merged) == "lora"
    torch.testing.assert_close(delta(merged), sum(0.5 * weight(layer) for layer in kinds),
                               atol=1e-5, rtol=1e-5)
    full = merge([(Lora({path: OTHER_KINDS[kind]()}, sd1), 1.0) for kind in ("full", "lora")])
    assert kind_of(full.layers[path]) == "full"
    resized = resize(Lora({path: kinds[1]}, sd1), Cut(1)).lora.layers[path]
    assert (kind_of(resized), rank_of(resized)) == ("lora", 1)


def test_a_lokr_as_large_as_its_base_asks_for_a_rank(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = FAMILIES["sd15"][0]
    layer = {"lokr_w1": torch.randn(20, 20), "lokr_w2": torch.randn(20, 20)}
    file = formats.save(Lora({path: layer}, SPECS["sd15"].naming), "kohya",
                        tmp_path / "a.safetensors")
    told = run("lora", "merge", file)
    assert told.code == 2
    assert "--rank 64" in told.err
    assert run("lora", "merge", file, "--rank", "64", "--out", "b").code == 0


def test_layers_that_kohyas_scripts_leave_out_are_told(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """Blocks are read by all; conv_in by others alone; a LoHa of Flux goes by LyCORIS' names."""
    for family, path, kind, unread in (
            ("sd15", "unet.conv_in", "lora", True),
            ("sd15", "unet.time_embedding.linear_1", "lora", True),
            ("sd15", FAMILIES["sd15"][0], "lora", False),
            ("sd15", FAMILIES["sd15"][1], "lora", False),
            ("flux", FAMILIES["flux"][0], "loha", True),
            ("flux", FAMILIES["flux"][0], "lora", False)):
        others = FAMILIES[family][0] if family == "sd15" else FAMILIES[family][1]
        layers = {name: OTHER_KINDS[kind]() for name in (path, others)}
        file = formats.save(Lora(layers, naming(family)), "kohya", tmp_path / "a.safetensors")
        told = run("lora", "verify", file)
        assert told.code == 0
        assert (path in told.out) == unread
        told = run("lora", "convert", file, "--to", "kohya", "--family", family)
        assert ("kohya's own scripts" in told.err) == unread
        file.unlink()


SQUARE = {"lora_down.weight": torch.ones(2, 5), "lora_up.weight": torch.ones(6, 2)}
FLUX_Q = "transformer.transformer_blocks.0.attn.to_"


@pytest.mark.parametrize(("family", "layers", "call", "advice", "mend"), [
    ("sd15", {0: SQUARE | {"dora_scale": torch.ones(1, 5)}}, ["--to", "peft"],
     "Convert to kohya or comfyui", ["--to", "kohya"]),
    ("sd15", {0: SQUARE, "unet.mid_block.attentions.0.proj_in": {"hada_w1_a": None}},
     ["--to", "peft"], "Convert it to kohya or comfyui", ["--to", "comfyui"]),
    ("sd15", {0: SQUARE | {"lora_up.weight": torch.full((6, 2), 1e6)}},
     ["--to", "comfyui", "--precision", "fp16"], "Save as float32",
     ["--to", "comfyui", "--precision", "fp32"]),
    ("flux", {f"{FLUX_Q}q": SQUARE, f"{FLUX_Q}k": SQUARE | {"lora_up.weight": torch.ones(4, 2)}},
     ["--to", "kohya"], "Convert to diffusers or peft", ["--to", "diffusers"]),
    ("", {}, ["--to", "kohya"], "Name one with --family: sd15", ["--to", "kohya", "--family",
                                                                "sd15"]),
    ("sd15", {0: SQUARE}, [], "with --to: kohya", ["--to", "kohya"])],
    ids=["columns", "mixed", "fp16", "fused", "family", "target"])
def test_what_a_refusal_advises_works(run: Run, tmp_path: Path, family: str,  # noqa: F811
                                      layers: dict[Any, Any], call: list[str], advice: str,
                                      mend: list[str]) -> None:
    if family:
        found = {path if isinstance(path, str) else FAMILIES[family][path]:
                 OTHER_KINDS["loha"]() if "hada_w1_a" in layer else layer
                 for path, layer in layers.items()}
        file = formats.save(Lora(found, naming(family)), "diffusers" if family == "flux" else
                            "kohya", tmp_path / "a.safetensors")
    else:
        file = tmp_path / "a.safetensors"
        save_file({f"diffusion_model.blocks.0.self_attn.q.lora_{half}.weight": torch.ones(2, 2)
                   for half in "AB"}, file)
    named = ["--family", family] if family else []
    told = run("lora", "convert", file, *call, *named)
    assert told.code == 2
    assert advice in told.err
    assert run("lora", "convert", file, *mend, *named).code == 0
