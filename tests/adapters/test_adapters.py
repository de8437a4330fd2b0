"""Each kind of adapter against its paper's formula, LyCORIS' own reading of its file, and itself
through a file, a resume and the plan."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core import families
from core.adapters import from_file, lora
from core.config import TrainConfig, parse_train_config
from core.errors import UserError
from core.families import lora_signs
from core.inference import generate
from core.jobs.control import Control
from core.jobs.events import Event, Note
from core.lora_files import files as lora_file
from core.lora_files import formats
from core.memory import plan
from core.training.checkpoint import FOLDER
from core.training.run import train
from core.weights.quantization import quantize_
from tests import tiny
from tests.tiny import families as tiny_families

KINDS = ("lora", "rslora", "dora", "pissa", "loha", "lokr", "oft")
SPEC = families.get("sd15").spec
OUT, IN = 12, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(IN, OUT)
        self.conv1 = nn.Conv2d(IN, OUT, 3, padding=1)
        self.proj_in = nn.Conv2d(IN, OUT, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, IN) -> (B, OUT)"""
        grid = x[:, :, None, None].expand(-1, -1, 4, 4)
        return self.to_q(x) + (self.conv1(grid) + self.proj_in(grid)).mean((2, 3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mid_block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x) + self.blocks[1](x) + self.mid_block(x)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"lora_rank": 4, "lora_alpha": 6.0, "conv_rank": 2,
                                       "target_modules": ["to_q", "proj_in"]} | changes)


def trained(kind: str, **changes: Any) -> nn.Module:
    """An adapter with random weights, as if trained."""
    model = Net()
    lora.attach(model, config(adapter=kind, **changes), SPEC)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in lora.trainable(model):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    lora.set_training(model, False)
    return model


def weight_of(layer: nn.Module, base: nn.Module | None = None) -> Tensor:
    """What a layer does to its input, as a weight of its base's shape."""
    base = base or base_of(layer)
    with torch.no_grad():
        if isinstance(base, nn.Linear):
            return (layer(torch.eye(IN)) - layer(torch.zeros(1, IN))).T
        side = base.weight.shape[-1]
        points = torch.zeros(IN * side * side, IN, side, side)
        for n in range(len(points)):
            points[n].view(-1)[n] = 1
        middle = side // 2
        found = layer(points) - layer(torch.zeros(1, IN, side, side))
        return found[:, :, middle, middle].T.reshape(base.weight.shape)


def base_of(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


# --- what each kind computes ---

def formula(kind: str, layer: Any, base: Tensor) -> Tensor:
    """The paper's weight for the layer's own numbers."""
    flat, name = base.flatten(1), lora.ADAPTER
    value = {end: getattr(layer, end)[name] for end in layer.adapter_layer_names
             if name in getattr(layer, end)}
    rank = 2 if base.shape[-1] == 3 else 4
    alpha = 2.0 if rank == 2 else 6.0           # conv_alpha: conv_rank
    scale = alpha / (math.sqrt(rank) if kind == "rslora" else rank)
    if kind in ("lora", "rslora", "dora", "pissa"):
        product = value["lora_B"].weight.flatten(1) @ value["lora_A"].weight.flatten(1)
        if kind == "pissa":
            a, b = layer.lora_variant[name].start
            product = product - b.weight.flatten(1) @ a.weight.flatten(1)
        whole = flat + scale * product
        if kind == "dora":
            whole = whole.view(base.shape)
            sides = [d for d in range(base.ndim) if d != 1]
            whole = whole / torch.linalg.vector_norm(whole, dim=sides, keepdim=True) * value[
                "lora_magnitude_vector"].weight
        return whole.reshape(base.shape)
    if kind == "loha":
        product = (value["hada_w1_a"] @ value["hada_w1_b"]) * (
            value["hada_w2_a"] @ value["hada_w2_b"])
        return base + (scale * product).view(base.shape)
    if kind == "lokr":
        first, full = value["lokr_w1"], "lokr_w2" in value
        second = (value["lokr_w2"].flatten(1) if full
                  else value["lokr_w2_a"] @ value["lokr_w2_b"])
        grid = torch.kron(first, second.view(len(second), -1, *base.shape[2:])
                          if base.ndim == 2 else second)
        return base + ((1.0 if full else scale) * grid).reshape(base.shape)
    blocks = value["oft_blocks"]
    skew = blocks - blocks.transpose(1, 2)
    unit = torch.eye(blocks.shape[1])
    turn = (unit + skew) @ torch.linalg.inv(unit - skew)
    return (torch.block_diag(*turn).T @ flat).view(base.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_the_papers_formula(kind: str) -> None:
    plain = dict(Net().named_modules())
    found = dict(lora.layers(trained(kind)))
    assert len(found) == 9
    for path, layer in found.items():
        base = plain[path].weight.detach()
        expected = formula(kind, layer, base)
        assert (expected - base).abs().max() > 0.05
        close(weight_of(layer), expected.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_starts_as_nothing_and_reaches_every_weight(kind: str) -> None:
    x, plain = torch.randn(3, IN), Net()
    model = Net()
    parameters = lora.attach(model, config(adapter=kind), SPEC)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
    rule = torch.optim.SGD(parameters, 0.05)
    before = [p.detach().clone() for p in parameters]
    for _ in range(3):
        model(x).square().sum().backward()
        rule.step()
        rule.zero_grad()
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_goes_straight_from_the_base_to_the_adapter(kind: str) -> None:
    """DoRA's and OFT's as well: W + s (W' - W)."""
    model, plain = trained(kind), dict(Net().named_modules())
    for path, layer in lora.layers(model):
        base, full = plain[path].weight.detach(), weight_of(layer)
        for share in (0.0, 0.3, 0.8, 1.0, -0.5, 1.5):
            lora.set_weight(model, share)
            close(weight_of(layer), base + share * (full - base))
        lora.set_weight(model, 1.0)


def test_pissa_leaves_the_base_alone_and_starts_at_its_largest_parts() -> None:
    model, plain = Net(), dict(Net().named_modules())
    lora.attach(model, config(adapter="pissa", lora_rank=100), SPEC)      # more than there are
    for path, layer in lora.layers(model):
        assert torch.equal(layer.get_base_layer().weight, plain[path].weight)
    scale = 6.0 / 100
    layer = model.mid_block.to_q
    product = layer.lora_B[lora.ADAPTER].weight @ layer.lora_A[lora.ADAPTER].weight
    torch.testing.assert_close(product * scale, plain["mid_block.to_q"].weight, rtol=1e-3,
                               atol=1e-4)
    model = tiny.tiny_unet()
    lora.attach(model, config(adapter="pissa", target_modules="attention", conv_rank=0), SPEC)
    for _, layer in lora.layers(model):
        weight = layer.get_base_layer().weight
        product = 1.5 * layer.lora_B[lora.ADAPTER].weight @ layer.lora_A[lora.ADAPTER].weight
        least = torch.linalg.svdvals(weight)[4:].norm()         # Eckart & Young
        assert least <= (weight - product).norm() * 1.0001 <= least * 1.001


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", ["int8", "nf4"])
def test_the_base_may_be_in_fewer_bits(kind: str, kept: Any) -> None:
    """The same function as on the read-back base in full."""
    models = []
    for quantised in (True, False):
        torch.manual_seed(0)
        model = tiny.tiny_unet().eval().requires_grad_(False)
        quantize_(model, kept)
        if not quantised:               # what int8 reads back, as a plain layer
            full = tiny.tiny_unet().eval().requires_grad_(False)
            values = {n: m.weight.detach() for n, m in model.named_modules()
                      if getattr(m, "weight", None) is not None}
            for name, module in full.named_modules():
                if name in values:
                    module.weight = nn.Parameter(values[name].clone(), requires_grad=False)
                    if module.bias is not None:
                        module.bias = model.get_submodule(name).bias
            model = full
        lora.attach(model, config(adapter=kind, target_modules="attention"), SPEC)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in lora.trainable(model):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        models.append(model)
    x = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 32)
    with torch.no_grad():
        a, b = (model(*x).sample for model in models)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# --- which layers, which sizes, which rates ---

def ranks(**changes: Any) -> dict[str, tuple[int, float]]:
    return {path: (size.rank, size.alpha)
            for path, size in lora.choose(Net(), config(**changes), SPEC).items()}


def test_convolutions_come_with_their_own_rank() -> None:
    assert len(ranks(conv_rank=0)) == 6
    found = ranks()
    assert found["blocks.0.conv1"] == (2, 2.0)
    assert found["blocks.0.to_q"] == found["blocks.0.proj_in"] == (4, 6.0)
    assert ranks(conv_alpha=1.0)["mid_block.conv1"] == (2, 1.0)


def test_block_ranks_keep_the_scale_and_the_last_match_counts() -> None:
    found = ranks(block_ranks={"blocks.*": 8, "blocks.1.to_q": 2, "mid_block": 0})
    assert found["blocks.0.to_q"] == (8, 12.0)
    assert found["blocks.1.to_q"] == (2, 3.0)
    assert found["blocks.0.conv1"] == (8, 8.0)
    assert not any(path.startswith("mid_block") for path in found)
    model = trained("lora", block_ranks={"blocks.1.to_q": 2})
    layer = model.blocks[1].to_q
    assert layer.lora_A[lora.ADAPTER].weight.shape == (2, IN)
    assert layer.scaling[lora.ADAPTER] == model.blocks[0].to_q.scaling[lora.ADAPTER] == 1.5


@given(st.lists(st.sampled_from(["a", "b1", "c", "0", "10"]), min_size=1, max_size=5),
       st.data())
def test_block_names_are_whole_names_in_a_row(parts: list[str], data: Any) -> None:
    start = data.draw(st.integers(0, len(parts) - 1))
    end = data.draw(st.integers(start + 1, len(parts)))
    path = ".".join(parts)
    assert lora._within(".".join(parts[start:end]), path)
    assert lora._within(".".join("*" for _ in parts[start:end]), path)
    assert not lora._within(f"{parts[start]}0", path) or f"{parts[start]}0" in parts
    assert not lora._within("x", path)


@pytest.mark.parametrize(("changes", "code"), [
    ({"block_ranks": {"mid_blok": 2}}, "engine.no_such_block"),
    ({"block_rates": {"blocks.7": 2}}, "engine.no_such_block"),
    ({"block_ranks": {"blocks": 0, "mid_block": 0}}, "engine.no_layer_left"),
    ({"adapter": "oft", "lora_plus_ratio": 16}, "engine.adapter_lacks"),
    ({"adapter": "dora", "rank_dropout": 0.1}, "engine.adapter_lacks"),
    ({"adapter": "loha", "lora_dropout": 0.1}, "engine.adapter_lacks"),
    ({"lokr_factor": 4}, "engine.adapter_lacks"),
    ({"adapter": "dora", "save_format": "peft"}, "engine.format_lacks"),
])
def test_what_cannot_be_is_one_sentence(changes: dict[str, Any], code: str) -> None:
    def start(chosen: TrainConfig) -> None:
        model = Net()
        lora.attach(model, chosen, SPEC)
        lora.groups(model, chosen)

    with pytest.raises(UserError) as caught:
        start(config(**changes))
    assert caught.value.code == code
    assert "{" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_maps_are_read_from_text_and_yaml() -> None:
    assert TrainConfig(block_ranks="mid_block: 4, attn2: 2").block_ranks == {
        "mid_block": 4, "attn2": 2}
    found = parse_train_config("block_rates: {up_blocks: 0.5}\noptimizer_args: {eps: 1e-7}", "x")
    assert found.block_rates == {"up_blocks": 0.5}
    assert found.optimizer_args == {"eps": 1e-7}
    for bad in ("block_ranks: 'mid_block'", "block_ranks: {a: -1}", "block_rates: '{[: 2'",
                "optimizer: adamm", "adapter: lohaa"):
        with pytest.raises(UserError) as caught:
            parse_train_config(bad, "x.yaml")
        assert caught.value.params["line"] == 1


def test_lora_plus_and_block_rates_are_factors_of_the_rate() -> None:
    model = Net()
    chosen = config(lora_plus_ratio=16, block_rates={"mid_block": 0.5})
    lora.attach(model, chosen, SPEC)
    factor = {id(p): g["factor"] for g in lora.groups(model, chosen) for p in g["params"]}
    assert len(factor) == len(lora.trainable(model))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert factor[id(parameter)] == (16 if "lora_B" in name else 1) * (
                0.5 if name.startswith("mid_block") else 1)


# --- dropout ---

@pytest.mark.parametrize("kind", ["lora", "rslora", "pissa", "loha", "lokr"])
def test_rank_dropout_leaves_the_mean_alone(kind: str) -> None:
    model = trained(kind, rank_dropout=0.2, conv_rank=0)
    x = torch.randn(2, IN)
    with torch.no_grad():
        expected = model(x)
        lora.set_training(model, True)
        torch.manual_seed(0)
        thrown = torch.stack([model(x) for _ in range(1500)])
    assert thrown.std(0).max() > 0.05
    error = (thrown.mean(0) - expected).abs() / (thrown.std(0) / 1500 ** 0.5 + 1e-6)
    assert error.max() < 5


@pytest.mark.parametrize("kind", ["lora", "pissa", "loha", "lokr", "oft"])
def test_module_dropout_leaves_out_whole_layers(kind: str) -> None:
    model = trained(kind, module_dropout=0.25, conv_rank=0)
    layer, x = model.blocks[0].to_q, torch.randn(2, IN)
    with torch.no_grad():
        full, base = layer(x), layer.get_base_layer()(x)
        lora.set_training(model, True)
        torch.manual_seed(0)
        found = [layer(x) for _ in range(800)]
    without = sum(torch.equal(y, base) for y in found)
    assert without + sum(torch.equal(y, full) for y in found) == 800
    assert 140 < without < 260


@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_no_dice_are_thrown(kind: str) -> None:
    model = trained(kind)
    lora.set_training(model, True)
    before = torch.get_rng_state()
    model(torch.randn(2, IN, generator=torch.Generator()))
    assert torch.equal(before, torch.get_rng_state())


# --- files ---

def file_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = from_file.tensors(model, lora.state(model), dtype)
    return formats.spell(formats.from_tensors(tensors, "sd15"), "kohya")


def load(model: nn.Module, tensors: dict[str, Tensor], name: str = "a") -> list[str]:
    return from_file.load({"unet": model}, formats.from_tensors(tensors, "sd15"), name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_same_weights(kind: str) -> None:
    model = trained(kind)
    fresh = Net()
    assert load(fresh, file_of(model)) == []
    assert lora.count([fresh], "a") == 9
    lora.use([fresh], {"a": 1.0})
    for path, layer in lora.layers(model):
        close(weight_of(fresh.get_submodule(path)), weight_of(layer))
    lora.use([fresh], {"a": 0.7})
    lora.set_weight(model, 0.7)
    x = torch.randn(2, IN)
    close(fresh(x).detach(), model(x).detach())
    lora.use([fresh], {})
    assert torch.equal(fresh(x), Net()(x))


def test_files_of_every_kind_work_together_in_any_order() -> None:
    """Additive kinds: the effects add up; a rotation turns what is there."""
    x, files = torch.randn(2, IN), {kind: file_of(trained(kind)) for kind in KINDS}
    plain = Net()(x)
    adding = ("lora", "loha", "lokr", "pissa")
    for order in (adding, adding[::-1]):
        model, effects = Net(), 0
        for kind in order:
            load(model, files[kind], kind)
        for kind in order:
            lora.use([model], {kind: 0.6})
            effects += model(x) - plain
        lora.use([model], dict.fromkeys(order, 0.6))
        close((model(x) - plain).detach(), torch.as_tensor(effects).detach())
    model = Net()
    for kind in ("oft", "dora", "lora"):
        load(model, files[kind], kind)
    for kind in ("lora", "dora", "oft"):
        alone = Net()
        load(alone, files[kind], kind)
        lora.use([alone], {kind: 0.8})
        lora.use([model], {kind: 0.8})
        close(model(x).detach(), alone(x).detach())


def test_pissa_is_a_plain_lora_of_twice_the_rank() -> None:
    found = file_of(trained("pissa"))
    assert lora_signs.detect_format(found) == "kohya"
    down = found["lora_unet_mid_block_to_q.lora_down.weight"]
    assert down.shape == (8, IN)
    assert float(found["lora_unet_mid_block_to_q.alpha"]) / 8 == 1.5


@pytest.mark.parametrize(("kind", "format_"), [
    ("lora", "kohya"), ("rslora", "kohya"), ("dora", "lycoris-dora"), ("loha", "lycoris-loha"),
    ("lokr", "lycoris-lokr"), ("oft", "lycoris-oft")])
def test_files_have_the_communitys_names(kind: str, format_: str, tmp_path: Path) -> None:
    tensors = file_of(trained(kind), torch.float16)
    assert lora_signs.detect_format(tensors) == format_
    assert all(t.dtype == torch.float32 for k, t in tensors.items()
               if k.endswith(("alpha", "dora_scale")))
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "a.safetensors")
    assert lora_file.describe(tmp_path / "a.safetensors").modules == {"unet": 9}
    assert generate.modules_in(tmp_path / "a.safetensors") == 9


@pytest.mark.parametrize("kind", KINDS)
def test_lycoris_reads_the_same_weights(kind: str) -> None:
    """Its own modules, made from our tensors. It makes a DoRA by rows unless told otherwise, so
    that this one goes through its formula."""
    modules = pytest.importorskip("lycoris.modules")
    functional = pytest.importorskip("lycoris.functional.general")
    model, plain = trained(kind), dict(Net().named_modules())
    tensors = file_of(model)
    for path, layer in lora.layers(model):
        name, base = f"lora_unet_{path.replace('.', '_')}", plain[path]
        scale = tensors.get(f"{name}.dora_scale")
        own = {k: v for k, v in tensors.items() if not k.endswith("dora_scale")}
        kind_, values = modules.get_module(own, name)
        made = modules.make_module(kind_, values, name, base).eval()
        theirs = weight_of(made, base)
        if scale is not None:
            theirs = functional.weight_decompose(theirs, scale, 1, False)
        close(weight_of(layer), theirs.detach())


def test_lycoris_files_of_other_shapes_are_read() -> None:
    """CP-decomposed LoHa, LoKr with both factors split, OFT with rescale and constraint, DoRA by
    rows: never written here, met outside."""
    modules = pytest.importorskip("lycoris.modules")
    base = Net().mid_block
    torch.manual_seed(9)
    made = {
        "conv1": [modules.LohaModule("x", base.conv1, 1, 2, 1, use_tucker=True),
                  modules.LokrModule("x", base.conv1, 1, 1, 0.5, use_tucker=True),
                  modules.LoConModule("x", base.conv1, 1, 2, 3, weight_decompose=True)],
        "to_q": [modules.LokrModule("x", base.to_q, 1, 1, 0.5, decompose_both=True),
                 modules.DiagOFTModule("x", base.to_q, 1, 4, constraint=0.01, rescaled=True),
                 modules.LoConModule("x", base.to_q, 1, 2, 3, weight_decompose=True)]}
    for leaf, some in made.items():
        for module in some:
            with torch.no_grad():
                for parameter in module.parameters():
                    if not any(parameter is p for p in base.parameters()):
                        parameter.add_(0.3 * torch.randn_like(parameter))
                tensors = {f"lora_unet_mid_block_{leaf}.{k}": v.detach().clone()
                           for k, v in module.custom_state_dict().items()} if hasattr(
                    module, "custom_state_dict") and module.custom_state_dict() else {
                    f"lora_unet_mid_block_{leaf}.{k}": v.detach().clone()
                    for k, v in module.state_dict().items()}
                expected = weight_of(module.eval(), getattr(base, leaf))
            fresh = Net()
            assert load(fresh, tensors) == [], type(module)
            lora.use([fresh], {"a": 1.0})
            close(weight_of(fresh.get_submodule(f"mid_block.{leaf}")), expected)


def test_strange_keys_are_told_and_wrong_shapes_refused() -> None:
    found = file_of(trained("loha"))
    assert load(Net(), found | {"lora_unet_nowhere.hada_w1_a": torch.ones(2, 2),
                                "junk": torch.ones(1)}) == ["junk", "unet.nowhere"]
    for kind in ("dora", "loha", "lokr", "oft"):
        bad = {k: (torch.ones(5, 5, 5) if v.ndim > 1 else v)
               for k, v in file_of(trained(kind)).items()}
        with pytest.raises((RuntimeError, ValueError, KeyError, TypeError, UserError)):
            load(Net(), bad)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 9), st.floats(0.5, 20),
       st.sampled_from([0, 1, 3]))
def test_any_size_survives_its_file(kind: str, rank: int, alpha: float, conv: int) -> None:
    model = trained(kind, lora_rank=rank, lora_alpha=alpha, conv_rank=conv)
    fresh = Net()
    assert load(fresh, file_of(model)) == []
    lora.use([fresh], {"a": 1.0})
    x = torch.randn(2, IN)
    torch.testing.assert_close(fresh(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module", params=["flux", "zimage"])
def fused(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, tiny_families.MADE[request.param]()


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "oft"])
def test_families_with_fused_layers_have_files_of_every_kind(
        kind: str, fused: tuple[str, Any], tmp_path: Path) -> None:
    """What the family's own format can't say goes into kohya's, of layers that aren't fused."""
    family, pipe = fused[0], copy.deepcopy(fused[1])
    spec, model = families.get(family).spec, copy.deepcopy(pipe.transformer)
    chosen = config(adapter=kind, target_modules="attention", conv_rank=0)
    lora.attach(model, chosen, spec)
    with torch.no_grad():
        for parameter in lora.trainable(model):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    found = formats.from_tensors(from_file.tensors(
        model, lora.state(model), torch.float32, "transformer"), family)
    format_ = lora.file_format(chosen, spec)
    path = formats.save(found, format_, tmp_path / "a.safetensors")
    generate.load_adapter(pipe, path, "a", family)
    lora.use([pipe.transformer], {"a": 1.0})
    lora.set_training(model, False)
    for name, layer in lora.layers(model):
        unit = torch.eye(layer.get_base_layer().in_features)
        there = pipe.transformer.get_submodule(name)
        close((there(unit) - there(0 * unit)).detach(), (layer(unit) - layer(0 * unit)).detach())
        assert not torch.allclose(layer(unit), layer.get_base_layer()(unit), atol=1e-3)


def test_state_of_another_adapter_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        lora.load_state(trained("loha"), lora.state(trained("lokr")))
    assert caught.value.code == "engine.other_adapter"
    model, other = trained("dora"), Net()
    lora.attach(other, config(adapter="dora"), SPEC)
    lora.load_state(other, lora.state(model))
    x = torch.randn(2, IN)
    assert torch.equal(model(x), other(x))


# --- runs: proven, and resumed to the bit ---

RUNS = [("lora", {"optimizer": "schedulefree", "lora_plus_ratio": 4.0, "sample_every": 2,
                  "sample_prompts": ["red"], "sample_inference_steps": 1}),
        ("rslora", {"optimizer": "lion", "rank_dropout": 0.2, "module_dropout": 0.1}),
        ("dora", {"optimizer": "prodigy", "learning_rate": 1.0, "lora_dropout": 0.1,
                  "optimizer_args": {"d0": 1e-3}}),
        ("pissa", {"optimizer": "adafactor", "lr_scheduler": "cosine_with_restarts",
                   "lr_cycles": 2}),
        ("loha", {"optimizer": "came", "lr_scheduler": "warmup_stable_decay"}),
        ("lokr", {"optimizer": "torch.optim.NAdam", "lr_scheduler": "polynomial"}),
        ("oft", {"optimizer": "adamw", "module_dropout": 0.2})]


DAILY = ("lora", "dora", "lokr")             # the others with `-m slow`


@pytest.mark.parametrize(("kind", "changes"), [
    pytest.param(kind, changes, id=kind, marks=[] if kind in DAILY else [pytest.mark.slow])
    for kind, changes in RUNS])
def test_runs_are_proven_and_resume_to_the_bit(kind: str, changes: dict[str, Any], base: Path,
                                               tmp_path: Path) -> None:
    pictures = tiny.pictures(tmp_path / "pictures", 4)
    chosen = TrainConfig.model_validate({
        "base_model": str(base), "train_data_dir": str(pictures), "output_name": "ink",
        "output_dir": str(tmp_path / "whole"), "adapter": kind, "lora_rank": 4, "conv_rank": 2,
        "batch_size": 2, "max_train_steps": 4, "save_steps": 2, "learning_rate": 3e-3,
        "device": "cpu"} | changes)
    whole, resumed = _run(chosen), None
    assert whole["proof"]["ok"], whole["proof"]
    assert whole["proof"]["matched"] == whole["proof"]["modules"] > 20
    assert whole["proof"]["from_memory"] < 0.5
    half = f"{FOLDER}/ink-000002"
    shutil.copytree(tmp_path / "whole" / half, tmp_path / "broken" / half)
    notes: list[Event] = []
    resumed = _run(chosen.with_changes(output_dir=str(tmp_path / "broken"), resume=True), notes)
    assert any(isinstance(e, Note) and e.key == "engine.resumed" for e in notes)
    first, second = load_file(whole["lora"]), load_file(resumed["lora"])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def _run(chosen: TrainConfig, events: list[Event] | None = None) -> dict[str, Any]:
    seen: list[Event] = [] if events is None else events
    return train(chosen, seen.append, Control())


def test_another_optimizers_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    chosen = TrainConfig(
        base_model=str(base), train_data_dir=str(tiny.pictures(tmp_path / "p", 2)),
        output_dir=str(tmp_path / "out"), max_train_steps=1, lora_rank=2, optimizer="lion",
        device="cpu")
    _run(chosen)
    with pytest.raises(UserError) as caught:
        _run(chosen.with_changes(optimizer="came", resume=True, max_train_steps=2))
    assert caught.value.code == "precision.other_optimizer"
    assert caught.value.params["there"] == "lion"


# --- the plan ---

def settings_of(**changes: Any) -> dict[str, Any]:
    machine = plan.Machine("cpu", "CPU", 0, 0)
    return plan.step_settings(TrainConfig.model_validate(changes), machine, (64, 64))


def test_what_an_adapter_holds_is_part_of_the_plans_key() -> None:
    plain = settings_of()
    assert not {"adapter", "rule"} & plain.keys()           # traces made before stay good
    for change in ({"adapter": "loha"}, {"conv_rank": 4}, {"block_ranks": {"mid_block": 16}},
                   {"rank_dropout": 0.1}, {"optimizer": "came"}):
        assert settings_of(**change) != plain
    assert settings_of(rank_dropout=0.1) == settings_of(rank_dropout=0.3)
    assert settings_of(lora_plus_ratio=16) == plain


@pytest.mark.parametrize(("kind", "changes"), [
    ("loha", {"optimizer": "prodigy", "learning_rate": 1.0}),
    ("dora", {"optimizer": "came", "lora_rank": 32}), ("oft", {"optimizer": "adafactor"}),
    ("pissa", {"optimizer": "schedulefree", "conv_rank": 16})])
def test_plans_are_what_a_step_holds(kind: str, changes: dict[str, Any], base: Path) -> None:
    from tests.bench.plan import compare
    row = compare("tiny", base, "64,64", False, {"adapter": kind, "batch_size": 2,
                                                 "target_modules": "all-linear"} | changes)
    assert abs(row.error) < 0.06, row       # the smaller a base, the more its small change weighs


