"""The frozen base in fewer bits: weights are kept as int8, fp8 or nf4 and read back when used.

Plain torch, so that it works on CUDA, MPS and the CPU alike. Only the frozen weights are kept
small: every product is computed in the run's own numbers, forward and backward.

    int8  one scale an output channel       error <= absmax of the channel / 254
    fp8   e4m3, one scale an output channel error <= absmax of the channel / 28
    nf4   one scale a block of 64 weights   error <= 0.152 * absmax of the block + 3e-8

Stay as they are: what lies outside the repeated blocks (first and last layers, embeddings of
time and text), norms, biases, layers of fewer than 4096 weights, and layers whose number of
weights is no multiple of 64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from statistics import NormalDist
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_unary

from core.errors import Fix, UserError

Kind = Literal["same", "int8", "fp8", "nf4"]

SMALLEST = 4096                             # weights; smaller layers cost nothing as they are
BLOCK = 64                                  # weights that share a scale in nf4
_FP8_MAX = 448.0                            # the largest e4m3 number
_FP8_SHIFT = 2.0**8                         # between the exponents of e4m3 and fp16


def _nf4_levels() -> list[float]:
    """The 16 levels of NormalFloat4: quantiles of N(0, 1) that hold equal shares of it, 7 below
    zero and 8 above, scaled to [-1, 1] (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
    end = 1 - (1 / 32 + 1 / 30) / 2
    normal = NormalDist()
    above = [normal.inv_cdf(end + (0.5 - end) * i / 8) for i in range(8)]
    below = [-normal.inv_cdf(end + (0.5 - end) * i / 7) for i in range(7)]
    return [level / above[0] for level in sorted([*below, 0.0, *above])]


NF4 = _nf4_levels()


# --- numbers: (rows of weights) <-> (codes, scales) ---

def _write_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return (rows / scales).round_().clamp_(-127, 127).to(torch.int8), scales


def _read_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype, native: bool) -> Tensor:
    return codes.to(dtype).mul_(scales)


def _write_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The codes are held as int8: Apple's GPUs know no 8-bit floats."""
    scales = (rows.abs().amax(1, keepdim=True) / _FP8_MAX).clamp(min=1e-30)
    codes = (rows / scales).clamp_(-_FP8_MAX, _FP8_MAX)
    if codes.device.type == "mps":
        codes = codes.cpu()
    return codes.to(torch.float8_e4m3fn).view(torch.int8).to(rows.device), scales


def _read_fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype, native: bool) -> Tensor:
    """CUDA converts e4m3 by itself. Elsewhere its bits are moved to where fp16 has them, which is
    the same number divided by 2^8, subnormal ones included; CPUs take ten times longer natively."""
    if native:
        return codes.view(torch.float8_e4m3fn).to(dtype).mul_(scales)
    bits = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)
    return bits.view(torch.float16).to(dtype).mul_(scales * _FP8_SHIFT)


def _write_nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Two codes a byte; scales in fp16, which saves what the paper's second quantisation saves but
    for 0.12 bit a weight."""
    blocks = rows.reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True).half()
    levels = torch.tensor(NF4, device=rows.device)
    middles = (levels[1:] + levels[:-1]) / 2
    shares = blocks / scales.float().clamp(min=1e-30)
    codes = torch.bucketize(shares, middles, out_int32=True).to(torch.uint8).view(-1, 2)
    return codes[:, 0] * 16 + codes[:, 1], scales


def _read_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype, native: bool) -> Tensor:
    pairs = _pairs(dtype, codes.device)
    wide = {2: torch.int32, 4: torch.int64}.get(dtype.itemsize)
    if wide is None or codes.device.type == "mps":
        found = pairs.index_select(0, codes.int())
    else:                                   # a pair as one wide number: ten times faster on CPUs
        found = pairs.view(wide).flatten().index_select(0, codes.int()).view(dtype)
    return found.view(-1, BLOCK).mul_(scales)


@functools.cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 2): the two levels that each byte stands for."""
    levels = torch.tensor(NF4)
    byte = torch.arange(256)
    return torch.stack([levels[byte // 16], levels[byte % 16]], 1).to(device, dtype)


_WRITE: dict[Kind, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "int8": _write_int8, "fp8": _write_fp8, "nf4": _write_nf4}

_READ: dict[Kind, Callable[[Tensor, Tensor, torch.dtype, bool], Tensor]] = {
    "int8": _read_int8, "fp8": _read_fp8, "nf4": _read_nf4}


def _codes_without_numbers(kind: Kind, shape: torch.Size) -> tuple[Tensor, Tensor]:
    codes, scales = _shapes_of_codes(kind, shape)
    return torch.empty_like(codes), torch.empty_like(scales)


@functools.cache
def _shapes_of_codes(kind: Kind, shape: torch.Size) -> tuple[Tensor, Tensor]:
    return _WRITE[kind](torch.empty(shape[0], shape.numel() // shape[0], device="meta"))


# --- layers ---

class Frozen(nn.Module):
    """What FrozenLinear and FrozenConv2d share: a weight that is kept elsewhere than in `weight`.

    A layer becomes frozen in place (`freeze_`), so that whoever holds the module goes on with it.
    """

    codes: Tensor | None                    # None: away (core/weights/offload.py)
    scales: Tensor | None                   # None: kind "same"
    away: Callable[[], Tensor] | None
    kind: Kind
    native: bool
    dtype: torch.dtype                      # of `weight`
    shape: torch.Size
    last: bool                              # channels_last

    @property
    def weight(self) -> Tensor:
        """The weight in full, made anew each time: peft reads its shape, dtype and device."""
        return self.read(self.dtype)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, on the device of the run."""
        codes = self.away() if self.away else self.codes
        assert codes is not None
        if self.scales is None:
            return codes.to(dtype)
        # One rounding: CUDA's kernels scale in fp32 whatever the numbers, others are told to.
        inner = dtype if self.native else torch.float32
        flat = _READ[self.kind](codes, self.scales, inner, self.native).to(dtype)
        if not self.last:
            return flat.view(self.shape)
        out, channels, height, width = self.shape
        return flat.view(out, height, width, channels).permute(0, 3, 1, 2)

    def write(self, weight: Tensor) -> None:
        """Takes `weight` (of `shape`) over into codes and scales, on the codes' device."""
        assert self.codes is not None
        where = self.codes.device
        if self.scales is None:
            self.codes = weight.to(where, self.dtype)
            return
        if weight.is_meta:
            self.codes, self.scales = _codes_without_numbers(self.kind, weight.shape)
            return
        flat = weight.detach().permute(0, 2, 3, 1) if self.last else weight.detach()
        codes, scales = _WRITE[self.kind](flat.reshape(self.shape[0], -1).float())
        self.codes, self.scales = codes.to(where), scales.to(where)


class FrozenLinear(Frozen, nn.Linear):      # type: ignore[override]
    def __new__(cls, *args: Any, **options: Any) -> Any:
        return _plain(nn.Linear, cls, args, options)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self)


class FrozenConv2d(Frozen, nn.Conv2d):      # type: ignore[override]
    def __new__(cls, *args: Any, **options: Any) -> Any:
        return _plain(nn.Conv2d, cls, args, options)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self)


def _plain(plain: type[nn.Module], frozen: type[nn.Module], args: Any, options: Any) -> nn.Module:
    """A new layer is a plain one: peft makes an adapter's layers of the base layer's type.
    Without arguments it is `copy` that asks."""
    return plain(*args, **options) if args or options else object.__new__(frozen)


def linear(x: Tensor, layer: FrozenLinear) -> Tensor:
    """x (..., in) -> (..., out); keeps neither weight nor input for the backward pass.

    Open to torch's function modes, as F.linear is: core/memory/meta_tensors.py imitates autocast
    there.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(linear, (x,), x, layer)
    return _Linear.apply(x.to(_compute(x)), layer)              # type: ignore[no-any-return]


def conv2d(x: Tensor, layer: FrozenConv2d) -> Tensor:
    """x (B, in, H, W) -> (B, out, h, w); otherwise as `linear`."""
    if has_torch_function_unary(x):
        return handle_torch_function(conv2d, (x,), x, layer)
    return _Conv2d.apply(x.to(_compute(x)), layer)              # type: ignore[no-any-return]


def _compute(x: Tensor) -> torch.dtype:
    kind = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


class _Linear(torch.autograd.Function):
    """The weight is read again in the backward pass: kept, it would be there in full for every
    layer at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.read(x.dtype), _bias(layer, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.read(grad.dtype), None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenConv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        ctx.layout = (torch.channels_last if x.is_contiguous(memory_format=torch.channels_last)
                      else torch.contiguous_format)
        return F.conv2d(x, layer.read(x.dtype), _bias(layer, x.dtype), layer.stride,
                        layer.padding, layer.dilation, layer.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layer: FrozenConv2d = ctx.layer
        like = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device,
                           memory_format=ctx.layout)            # only its shape is read
        found: Tensor = torch.ops.aten.convolution_backward(
            grad, like, layer.read(grad.dtype), None, layer.stride, layer.padding,
            layer.dilation, False, (0, 0), layer.groups, (True, False, False))[0]
        return found, None


def _bias(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


# --- models ---

def quantize_(model: nn.Module, kind: Kind, device: torch.device | None = None) -> int:
    """Quantises the blocks' layers in place, each weight freed as its codes come. -> layers.

    `device` is where the model will run: the arithmetic is done there, the codes stay where the
    weight was. Before adapters are attached. Works on meta tensors. Raises UserError where nothing
    of the model is in few bits then: it would take the memory of the whole.
    """
    if kind == "same":
        return 0
    count, done = 0, False
    for layer in repeated_layers(model):
        if isinstance(layer, Frozen):
            done = True
        elif layer.weight.numel() % BLOCK == 0:
            freeze_(layer, kind, device or layer.weight.device)
            count += 1
    if not count and not done:
        raise UserError("precision.nothing_quantised", kind=kind, model=type(model).__name__,
                        why=_why_nothing(model), fixes=[
                        Fix("fixes.without_key", {"base_precision": "same"})])
    return count


def _why_nothing(model: nn.Module) -> dict[str, object]:
    """A part of a sentence; what `repeated_layers` asks of layers, in the same order."""
    inside = [layer for part in repeated_blocks(model) for layer in part.modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d))]
    if not inside:
        return {"say": "precision.no_blocks"}
    largest = max(layer.weight.numel() for layer in inside)
    if largest < SMALLEST:
        return {"say": "precision.small_layers", "largest": largest, "smallest": SMALLEST}
    return {"say": "precision.other_layers", "layer": type(max(
        inside, key=lambda layer: layer.weight.numel())).__name__, "block": BLOCK}


def freeze_(layer: nn.Linear | nn.Conv2d, kind: Kind, device: torch.device) -> Frozen:
    """Turns a plain layer into a frozen one; "same" keeps the weight as it is."""
    weight = layer.weight.detach()
    del layer.weight
    layer.__class__ = FrozenLinear if isinstance(layer, nn.Linear) else FrozenConv2d
    assert isinstance(layer, Frozen)
    layer.kind, layer.native, layer.away = kind, device.type == "cuda", None
    layer.dtype, layer.shape = weight.dtype, weight.shape
    layer.last = weight.ndim == 4 and weight.stride(1) == 1 and (
        weight.stride(3) == weight.shape[1])
    layer.register_buffer("codes", weight if kind == "same" else weight.new_empty(0))
    layer.register_buffer("scales", None if kind == "same" else weight.new_empty(0))
    if kind != "same":
        layer.write(weight if weight.is_meta else weight.to(device))
    return layer


def fill_(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype,
          device: torch.device, by: torch.device | None = None) -> list[str]:
    """Puts weights into a model on the meta device, quantising as they come: never is more than
    one of them in memory in full. For loaders: `tensors` are (name in the model, weight), read
    one by one from a file, and copied. They stay on `device` in the numbers that the empty
    model has, buffers in `dtype`; `by` quantises them.
    -> names that the model doesn't have; what stays on meta wasn't there.
    """
    unknown = []
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            unknown.append(name)
            continue
        if isinstance(module, Frozen) and leaf == "weight":
            module.codes = torch.empty(0, device=device)
            module.write(tensor.to(by or device, module.dtype))
        elif leaf in module._parameters or leaf in module._buffers:
            _place(module, leaf, tensor, dtype, device)
        else:
            unknown.append(name)
    return unknown


def _place(module: nn.Module, leaf: str, tensor: Tensor, dtype: torch.dtype,
           device: torch.device) -> None:
    held = getattr(module, leaf)
    layout = (torch.channels_last if tensor.ndim == 4 and held.stride(1) == 1
              else torch.contiguous_format)
    dtype = held.dtype if leaf in module._parameters else dtype
    value = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True,
                      memory_format=layout)
    if leaf in module._parameters:
        value = nn.Parameter(value, requires_grad=False)
    setattr(module, leaf, value)


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated part of a model: its ModuleLists, and a UNet's middle; a text encoder has them
    a level further in."""
    found = [child for name, child in model.named_children()
             if isinstance(child, nn.ModuleList) or name == "mid_block"]
    yield from found
    for child in () if found else model.children():
        yield from repeated_blocks(child)


def repeated_layers(module: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    """The frozen layers of the repeated blocks that are large enough to matter."""
    for part in list(repeated_blocks(module)):
        yield from heavy_layers(part)


def heavy_layers(module: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    """Plain and frozen layers; not those of subclasses, which may do more than their weight."""
    for layer in list(module.modules()):
        if isinstance(layer, Frozen):
            yield layer                     # type: ignore[misc]
        elif (isinstance(layer, (nn.Linear, nn.Conv2d)) and _is_plain(layer)
              and layer.weight.numel() >= SMALLEST and not layer.weight.requires_grad):
            yield layer


def _is_plain(layer: nn.Linear | nn.Conv2d) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear
