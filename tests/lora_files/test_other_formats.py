"""LoRAs of others work here: in Inference, in `lora convert` and as `init_lora_weights`.

Files are made by their formats' rules, written down here, or by lycoris-lora itself; none of them
by core's own writing code. Networks are tiny, of the real classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core import families
from core.adapters import init, lora
from core.config import TrainConfig
from core.inference import generate
from core.jobs.events import Event
from core.lora_files import formats
from tests import tiny
from tests.tiny import families as tiny_families

RANK, ALPHA = 2, 3.0


@cache
def made(family: str) -> Any:
    torch.manual_seed(5)
    if family == "sd15":
        return SimpleNamespace(unet=tiny.tiny_unet().eval(), text_encoder=tiny_families.clip())
    return tiny_families.MADE[family]()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_base(tmp_path_factory.mktemp("base"))


def layer_of(pipe: Any, path: str) -> Any:
    """Files have one name for the two ways in which transformers nests its CLIP."""
    part, _, inner = path.partition(".")
    model = getattr(pipe, part)
    return model.get_submodule(f"text_model.{inner}" if hasattr(model, "text_model") else inner)


class File:
    """Tensors by a format's rules, and what they are meant to change: path -> (out, in, ...)."""

    def __init__(self, family: str) -> None:
        self.family, self.tensors = family, dict[str, Tensor]()
        self.wanted: dict[str, Tensor] = {}

    def weight(self, path: str) -> Tensor:
        return layer_of(made(self.family), path).weight.detach()

    def add(self, paths: str | list[str], name: str, ends: str = "lora_down.weight lora_up.weight",
            alpha: bool = True) -> None:
        """A plain LoRA of one layer, or of several that the format has in rows of one matrix."""
        weights = [self.weight(path) for path in ([paths] if isinstance(paths, str) else paths)]
        rows, first = sum(len(one) for one in weights), weights[0]
        down = torch.randn(RANK, *first.shape[1:])
        up = torch.randn(rows, RANK, *[1] * (first.ndim - 2))
        a, b = ends.split()
        self.tensors |= {f"{name}.{a}": down, f"{name}.{b}": up}
        if alpha:
            self.tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
        whole = up.flatten(1) @ down.flatten(1) * ((ALPHA if alpha else RANK) / RANK)
        self._wants(paths, weights, whole)

    def other(self, paths: str | list[str], name: str, kind: str) -> None:
        """LoHa or LoKr, as LyCORIS writes them."""
        weights = [self.weight(path) for path in ([paths] if isinstance(paths, str) else paths)]
        rows, width = sum(len(one) for one in weights), weights[0][0].numel()
        if kind == "loha":
            one, two = ((torch.randn(rows, RANK), torch.randn(RANK, width)) for _ in range(2))
            whole = (one[0] @ one[1]) * (two[0] @ two[1]) * ALPHA / RANK
            ends = {"hada_w1_a": one[0], "hada_w1_b": one[1], "hada_w2_a": two[0],
                    "hada_w2_b": two[1], "alpha": torch.tensor(ALPHA)}
        else:
            high = 4 * len(weights)
            first, a, b = (torch.randn(high, 2), torch.randn(rows // high, RANK),
                           torch.randn(RANK, width // 2))
            whole = torch.kron(first, a @ b) * ALPHA / RANK
            ends = {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
        self.tensors |= {f"{name}.{end}": value for end, value in ends.items()}
        self._wants(paths, weights, whole)

    def _wants(self, paths: str | list[str], weights: list[Tensor], whole: Tensor) -> None:
        pieces = torch.split(whole, [len(one) for one in weights])
        for path, piece, weight in zip([paths] if isinstance(paths, str) else paths, pieces,
                                       weights, strict=True):
            self.wanted[path] = piece.view_as(weight)

    def write(self, folder: Path) -> Path:
        save_file({key: value.contiguous() for key, value in self.tensors.items()},
                  folder / "theirs.safetensors")
        return folder / "theirs.safetensors"


# --- the spellings -----------------------------------------------------------------------------

MID = "mid_block.attentions.0.transformer_blocks.0"
Q, K, FF = f"unet.{MID}.attn1.to_q", f"unet.{MID}.attn2.to_k", f"unet.{MID}.ff.net.0.proj"
TEXT = "encoder.layers.1.self_attn.q_proj"
PEFT = "lora_A.weight lora_B.weight"
BLOCK, ALONE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"


def flat(path: str) -> str:
    return path.partition(".")[2].replace(".", "_")


def kohya_sd1(f: File) -> None:
    for path in (Q, K, FF, "unet.down_blocks.0.resnets.0.conv1",
                 "unet.mid_block.attentions.0.proj_in"):
        f.add(path, f"lora_unet_{flat(path)}")
    f.add(f"text_encoder.{TEXT}", f"lora_te_text_model_{TEXT.replace('.', '_')}")


def compvis_sd1(f: File) -> None:
    """Some SD 1 files have the original code's names, as SDXL's."""
    inner = flat(f"x.{MID}").removeprefix("mid_block_attentions_0_")
    f.add(Q, f"lora_unet_middle_block_1_{inner}_attn1_to_q")
    f.add("unet.mid_block.resnets.0.conv1", "lora_unet_middle_block_0_in_layers_2")
    f.add(f"text_encoder.{TEXT}", f"lora_te1_text_model_{TEXT.replace('.', '_')}")


def peft_sd1(f: File) -> None:
    for path in (Q, FF):
        f.add(path, path, PEFT, alpha=False)
    f.add(f"text_encoder.{TEXT}", f"text_encoder.text_model.{TEXT}", PEFT, alpha=False)


def peft_bare(f: File) -> None:
    for path in (Q, K):
        f.add(path, f"base_model.model.{path[5:]}", PEFT, alpha=False)


def old_diffusers(f: File) -> None:
    """Before PEFT: attention's layers after their processors."""
    f.add(Q, f"unet.{MID}.attn1.processor.to_q_lora", "down.weight up.weight", alpha=False)
    f.add(f"unet.{MID}.attn1.to_out.0", f"unet.{MID}.attn1.processor.to_out_lora",
          "down.weight up.weight", alpha=False)


def comfyui_sd1(f: File) -> None:
    f.add(Q, "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q", PEFT)
    f.add(FF, "diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj", PEFT)
    f.add(f"text_encoder.{TEXT}", f"text_encoders.clip_l.transformer.text_model.{TEXT}", PEFT)


def simpletuner_sd1(f: File) -> None:
    f.other(Q, f"lycoris_{flat(Q)}", "lokr")
    f.add(K, f"lycoris_{flat(K)}")


def kohya_sdxl(f: File) -> None:
    at, inner = "down_blocks.1.attentions.0.transformer_blocks.0", "input_blocks_4_1"
    f.add(f"unet.{at}.attn2.to_v", f"lora_unet_{inner}_transformer_blocks_0_attn2_to_v")
    f.add("unet.down_blocks.0.downsamplers.0.conv", "lora_unet_input_blocks_3_0_op")
    f.add("unet.up_blocks.1.resnets.0.time_emb_proj", "lora_unet_output_blocks_3_0_emb_layers_1")
    for part, te in (("text_encoder", "te1"), ("text_encoder_2", "te2")):
        f.add(f"{part}.{TEXT}", f"lora_{te}_text_model_{TEXT.replace('.', '_')}")


def diffusers_sdxl(f: File) -> None:
    """kohya's keys of diffusers' names, as OneTrainer and converters write them."""
    for path in (Q, FF, "unet.mid_block.resnets.1.conv2"):
        f.add(path, f"lora_unet_{flat(path)}")


def loha_sdxl(f: File) -> None:
    f.other(Q, "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", "loha")
    f.other(FF, f"lora_unet_{flat(FF)}", "loha")


def _of(at: str, names: str) -> list[str]:
    return [f"{at}.{name}" for name in names.split()]


QKV, ADDED = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"


def kohya_flux(f: File) -> None:
    f.add(_of(BLOCK, QKV), "lora_unet_double_blocks_0_img_attn_qkv")
    f.add(_of(BLOCK, ADDED), "lora_unet_double_blocks_0_txt_attn_qkv")
    f.add(f"{BLOCK}.ff.net.2", "lora_unet_double_blocks_0_img_mlp_2")
    f.add(_of(ALONE, f"{QKV} proj_mlp"), "lora_unet_single_blocks_0_linear1")
    f.add(f"{ALONE}.proj_out", "lora_unet_single_blocks_0_linear2")
    f.add(f"text_encoder.{TEXT}", f"lora_te1_text_model_{TEXT.replace('.', '_')}")


def comfyui_flux(f: File) -> None:
    f.add(_of(BLOCK, QKV), "diffusion_model.double_blocks.0.img_attn.qkv", PEFT, alpha=False)
    f.add(f"{BLOCK}.attn.to_out.0", "diffusion_model.double_blocks.0.img_attn.proj", PEFT)


def peft_flux(f: File) -> None:
    for path in (*_of(BLOCK, QKV), f"{ALONE}.proj_mlp", f"{ALONE}.proj_out"):
        f.add(path, path, PEFT, alpha=False)


def diffsynth_flux(f: File) -> None:
    """Bare names, peft's adapter among them."""
    for path in _of(BLOCK, QKV):
        f.add(path, path.partition(".")[2], "lora_A.default.weight lora_B.default.weight",
              alpha=False)


def onetrainer_flux(f: File) -> None:
    for path in (*_of(BLOCK, ADDED), f"{ALONE}.proj_out"):
        f.add(path, f"lora_transformer_{flat(path)}")


def simpletuner_flux(f: File) -> None:
    for path in _of(BLOCK, "attn.to_q attn.to_out.0"):
        f.other(path, f"lycoris_{flat(path)}", "loha")


def lycoris_flux(f: File) -> None:
    """LyCORIS below kohya: factors of a fused matrix."""
    f.other(_of(BLOCK, QKV), "lora_unet_double_blocks_0_img_attn_qkv", "loha")
    f.other(_of(BLOCK, ADDED), "lora_unet_double_blocks_0_txt_attn_qkv", "lokr")
    f.add(f"{ALONE}.proj_out", "lora_unet_single_blocks_0_linear2")


def kohya_sd3(f: File) -> None:
    f.add(_of(BLOCK, QKV), "lora_unet_joint_blocks_0_x_block_attn_qkv")
    f.add(_of(BLOCK, ADDED), "lora_unet_joint_blocks_0_context_block_attn_qkv")
    f.add(f"{BLOCK}.ff.net.0.proj", "lora_unet_joint_blocks_0_x_block_mlp_fc1")


def peft_sd3(f: File) -> None:
    for path in (*_of(BLOCK, QKV), f"{BLOCK}.ff_context.net.2"):
        f.add(path, path, PEFT, alpha=False)


def aitoolkit_zimage(f: File) -> None:
    """ComfyUI's prefix before diffusers' own names."""
    for path in _of("transformer.layers.0", "attention.to_q attention.to_out.0 feed_forward.w1"):
        f.add(path, f"diffusion_model.{path.partition('.')[2]}", PEFT, alpha=False)


def kohya_zimage(f: File) -> None:
    f.add(_of("transformer.layers.0", "attention.to_q attention.to_k attention.to_v"),
          "lora_unet_layers_0_attention_qkv")
    f.add("transformer.layers.0.attention.to_out.0", "lora_unet_layers_0_attention_out")


SPELLINGS: dict[str, tuple[Callable[[File], None], ...]] = {
    "sd15": (kohya_sd1, compvis_sd1, peft_sd1, peft_bare, old_diffusers, comfyui_sd1,
             simpletuner_sd1),
    "sdxl": (kohya_sdxl, diffusers_sdxl, loha_sdxl),
    "flux": (kohya_flux, comfyui_flux, peft_flux, diffsynth_flux, onetrainer_flux,
             simpletuner_flux, lycoris_flux),
    "sd3": (kohya_sd3, peft_sd3), "zimage": (aitoolkit_zimage, kohya_zimage)}
CASES = [pytest.param((family, spelling), id=spelling.__name__)
         for family, some in SPELLINGS.items() for spelling in some]


@pytest.fixture
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[File, Path]:
    family, spelling = request.param
    torch.manual_seed(7)
    file = File(family)
    spelling(file)
    return file, file.write(tmp_path)


def added(layer: Any) -> Tensor:
    """What the adapter adds to its layer's weight."""
    base = layer.get_base_layer()
    found: Tensor = layer.get_delta_weight(layer.active_adapters[0]).detach()
    return found.view_as(base.weight)


# --- tests -------------------------------------------------------------------------------------

class Pipe:
    """A pipeline whose networks may be wrapped: copies of them, the loader of the real class."""

    def __new__(cls, family: str, base: Path) -> Any:
        from diffusers import StableDiffusionPipeline
        if family == "sd15":
            pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
            own = made(family)
            pipe.unet.load_state_dict(own.unet.state_dict())
            return pipe
        return copy.deepcopy(made(family))


@pytest.mark.parametrize("theirs", CASES, indirect=True)
def test_inference_draws_with_them(theirs: tuple[File, Path], base: Path) -> None:
    """Each layer is changed by what its format's rule says. Tolerance: float32."""
    file, path = theirs
    pipe = Pipe(file.family, base)
    generate.load_adapter(pipe, path, "theirs", file.family)
    lora.use(pipe.components.values(), {"theirs": 1.0})
    assert lora.count(pipe.components.values(), "theirs") == len(file.wanted)
    assert generate.modules_in(path, file.family) == len(file.wanted)
    for name, wanted in file.wanted.items():
        torch.testing.assert_close(added(layer_of(pipe, name)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("theirs", CASES, indirect=True)
def test_convert_takes_every_key(theirs: tuple[File, Path], tmp_path: Path) -> None:
    file, path = theirs
    found = formats.read(path, file.family)
    assert found.unknown == ()
    assert found.layers.keys() == file.wanted.keys()
    for to in ("kohya", "comfyui"):
        again = formats.read(formats.save(found, to, tmp_path / f"{to}.safetensors"),
                             file.family)
        assert again.unknown == ()
        # a fused matrix has rows for layers that the file lacks: they stay as they are
        more = again.layers.keys() - file.wanted.keys()
        assert again.layers.keys() >= file.wanted.keys()
        assert not any(again.layers[name]["lora_up.weight"].any() for name in more)


@pytest.mark.parametrize("theirs", [case for case in CASES if not any(
    word in case.id for word in ("loha", "lycoris", "simpletuner"))], indirect=True)
def test_training_goes_on_from_them(theirs: tuple[File, Path]) -> None:
    """Text encoders as well. Whole paths name these layers and no others; a higher rank than
    theirs keeps all of it."""
    file, path = theirs
    spec = families.get(file.family).spec
    pipe = SimpleNamespace(**{part: copy.deepcopy(getattr(made(file.family), part))
                              for part in {name.partition(".")[0] for name in file.wanted}})
    models = dict(sorted(vars(pipe).items(), key=lambda item: item[0].startswith("text")))
    config = TrainConfig(init_lora_weights=str(path), lora_rank=RANK * 4, init_lora_resize=True)
    for part, model in models.items():
        targets = [name.partition(".")[2] for name in file.wanted if name.startswith(f"{part}.")]
        lora.attach(model, config.with_changes(target_modules=targets),
                    replace(spec, lora_aliases={}))
    told: list[Event] = []
    init.start(models, config, spec, told.append)
    assert [one.key for one in told] == ["lora_init.started"]
    assert told[0].params["layers"] == len(file.wanted)
    for name, wanted in file.wanted.items():
        torch.testing.assert_close(added(layer_of(pipe, name)), wanted, rtol=1e-4, atol=1e-4)


# --- files by lycoris-lora itself --------------------------------------------------------------

ALGORITHMS: dict[str, dict[str, Any]] = {
    "plain": {}, "dora": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
    "dora by columns": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"}, "lokr": {"algo": "lokr", "factor": 4},
    "full lokr": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "oft": {"algo": "diag-oft"}, "conv": {"conv_dim": 2, "conv_alpha": 1}}


@torch.no_grad()
def predicted(unet: nn.Module) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    return unet(torch.randn(1, 4, 8, 8, generator=rng), torch.tensor([500]),
                torch.randn(1, 7, 32, generator=rng)).sample


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_what_lycoris_saves_draws_the_same(algorithm: str, base: Path, tmp_path: Path) -> None:
    """Its network on our UNet, its file, our loader: the same prediction. Tolerance: float32."""
    lycoris = pytest.importorskip("lycoris")
    unet = copy.deepcopy(made("sd15").unet)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel"] + [
        "ResnetBlock2D"] * (algorithm == "conv")})
    torch.manual_seed(11)
    options = {"algo": "lora", "conv_dim": 0, **ALGORITHMS[algorithm]}
    network = lycoris.create_lycoris(unet, 1.0, linear_dim=4, linear_alpha=2, **options)
    plain = predicted(unet)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.eval().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    wanted = predicted(unet)
    assert (wanted - plain).abs().max() > 1e-2
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    pipe = Pipe("sd15", base)
    generate.load_adapter(pipe, tmp_path / "a.safetensors", "theirs", "sd15")
    lora.use(pipe.components.values(), {"theirs": 1.0})
    torch.testing.assert_close(predicted(pipe.unet), wanted, rtol=1e-3, atol=1e-4)
