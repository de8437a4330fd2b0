"""The frozen base in fewer bits: weights are stored as int8, fp8 or nf4 and read back when used.

It is plain torch, so that it works on CUDA, MPS and the CPU alike. Only the frozen weights are
quantised: every product is computed in the run's own dtype, forward and backward.

    int8  one scale per output channel        error <= absmax of the channel / 254
    fp8   e4m3, one scale per output channel  error <= absmax of the channel / 28
    nf4   one scale per block of 64 weights   error <= 0.152 * absmax of the block + 3e-8

Not quantised are: what lies outside the repeated blocks (first and last layers, embeddings of
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

Quantization = Literal["same", "int8", "fp8", "nf4"]

SMALLEST = 4096                             # weights; smaller layers take next to no memory
BLOCK = 64                                  # weights that share a scale in nf4
_FP8_MAX = 448.0                            # the largest e4m3 number
_FP8_SHIFT = 2.0**8                         # between the exponents of e4m3 and fp16


def _nf4_levels() -> list[float]:
    """The 16 levels of NormalFloat4: zero, 7 quantiles of N(0, 1) below it and 8 above, with equal
    shares between them, scaled to [-1, 1] (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
    end = 1 - (1 / 32 + 1 / 30) / 2
    normal = NormalDist()
    above = [normal.inv_cdf(end + (0.5 - end) * i / 8) for i in range(8)]
    below = [-normal.inv_cdf(end + (0.5 - end) * i / 7) for i in range(7)]
    return [level / above[0] for level in sorted([*below, 0.0, *above])]


NF4 = _nf4_levels()


# --- rows of weights <-> codes and scales ---

def _write_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return (rows / scales).round_().clamp_(-127, 127).to(torch.int8), scales


def _read_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype, native: bool) -> Tensor:
    return codes.to(dtype).mul_(scales)


def _write_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = (rows.abs().amax(1, keepdim=True) / _FP8_MAX).clamp(min=1e-30)
    codes = (rows / scales).clamp_(-_FP8_MAX, _FP8_MAX)
    # Apple's GPUs know no 8-bit floats: the bits are stored as int8.
    if codes.device.type == "mps":
        codes = codes.cpu()
    return codes.to(torch.float8_e4m3fn).view(torch.int8).to(rows.device), scales


def _read_fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype, native: bool) -> Tensor:
    """`native`: torch converts e4m3 itself, as CUDA can. On CPUs that takes ten times longer than
    the other way, and Apple's GPUs can't."""
    if native:
        return codes.view(torch.float8_e4m3fn).to(dtype).mul_(scales)
    # Moved to where fp16 has them, the bits are the same number divided by 2^8, also where it is
    # subnormal. The mask clears the copy of the sign that lands in the exponent.
    bits = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)
    return bits.view(torch.float16).to(dtype).mul_(scales * _FP8_SHIFT)


def _write_nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Two codes are stored in a byte. The scales are in fp16: without the paper's second
    quantisation a weight takes 0.12 bit more."""
    blocks = rows.reshape(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True).half()
    levels = torch.tensor(NF4, device=rows.device)
    middles = (levels[1:] + levels[:-1]) / 2
    shares = blocks / scales.float().clamp(min=1e-30)
    codes = torch.bucketize(shares, middles, out_int32=True).to(torch.uint8).view(-1, 2)
    return codes[:, 0] * 16 + codes[:, 1], scales


def _read_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype, native: bool) -> Tensor:
    pairs = _nf4_pairs(dtype, codes.device)
    pair_dtype = {2: torch.int32, 4: torch.int64}.get(dtype.itemsize)
    if pair_dtype is None or codes.device.type == "mps":
        levels = pairs.index_select(0, codes.int())
    else:
        # To look a pair up as one integer of twice the width is ten times faster on CPUs.
        levels = pairs.view(pair_dtype).flatten().index_select(0, codes.int()).view(dtype)
    return levels.view(-1, BLOCK).mul_(scales)


@functools.cache
def _nf4_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 2): the two levels that each byte stands for."""
    levels = torch.tensor(NF4)
    byte = torch.arange(256)
    return torch.stack([levels[byte // 16], levels[byte % 16]], 1).to(device, dtype)


# A quantisation -> from rows (channels, weights) to codes and scales.
_WRITE: dict[Quantization, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "int8": _write_int8, "fp8": _write_fp8, "nf4": _write_nf4}

# A quantisation -> from codes, scales, a dtype and `native` back to the weights, in any shape.
_READ: dict[Quantization, Callable[[Tensor, Tensor, torch.dtype, bool], Tensor]] = {
    "int8": _read_int8, "fp8": _read_fp8, "nf4": _read_nf4}


@functools.cache
def _empty_codes(quantization: Quantization, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The codes and scales of a weight, on the meta device."""
    return _WRITE[quantization](torch.empty(shape[0], shape.numel() // shape[0], device="meta"))


# --- layers ---

class Frozen(nn.Module):
    """What FrozenLinear and FrozenConv2d share: a weight that is stored as codes and scales.

    `freeze_` changes a layer's class in place, so that whoever holds the layer keeps it.
    """

    codes: Tensor | None                    # None: in RAM (core/weights/offload.py)
    scales: Tensor | None                   # None: quantization "same", codes are the weight
    fetch: Callable[[], Tensor] | None      # gives the codes where they are in RAM
    quantization: Quantization
    native: bool                            # the run's device is CUDA
    dtype: torch.dtype                      # of `weight`
    shape: torch.Size
    channels_last: bool

    @property
    def weight(self) -> Tensor:
        """The weight in full, made anew each time; peft reads its shape, dtype and device."""
        return self.read(self.dtype)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, on the device of the run."""
        codes = self.fetch() if self.fetch else self.codes
        assert codes is not None
        if self.scales is None:
            return codes.to(dtype)
        # So that it is rounded once: CUDA's kernels scale in fp32 in any dtype, others don't.
        scaled_in = dtype if self.native else torch.float32
        flat = _READ[self.quantization](codes, self.scales, scaled_in, self.native).to(dtype)
        if not self.channels_last:
            return flat.view(self.shape)
        out, channels, height, width = self.shape
        return flat.view(out, height, width, channels).permute(0, 3, 1, 2)

    def write(self, weight: Tensor) -> None:
        """Stores `weight` (of `shape`) as codes and scales, on the device of the codes."""
        assert self.codes is not None
        device = self.codes.device
        if self.scales is None:
            self.codes = weight.to(device, self.dtype)
            return
        if weight.is_meta:
            self.codes, self.scales = map(
                torch.empty_like, _empty_codes(self.quantization, weight.shape))
            return
        flat = weight.detach().permute(0, 2, 3, 1) if self.channels_last else weight.detach()
        codes, scales = _WRITE[self.quantization](flat.reshape(self.shape[0], -1).float())
        self.codes, self.scales = codes.to(device), scales.to(device)


class FrozenLinear(Frozen, nn.Linear):      # type: ignore[override]
    def __new__(cls, *args: Any, **options: Any) -> Any:
        return _new(cls, nn.Linear, args, options)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self)


class FrozenConv2d(Frozen, nn.Conv2d):      # type: ignore[override]
    def __new__(cls, *args: Any, **options: Any) -> Any:
        return _new(cls, nn.Conv2d, args, options)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self)


def _new(frozen: type[nn.Module], plain: type[nn.Module], args: Any, options: Any) -> nn.Module:
    """peft makes an adapter's layers of the base layer's type, but they are plain ones. Without
    arguments it is `copy` that calls."""
    return plain(*args, **options) if args or options else object.__new__(frozen)


def linear(x: Tensor, layer: FrozenLinear) -> Tensor:
    """x (..., in) -> (..., out); keeps neither weight nor input for the backward pass."""
    # Torch's function modes see it as they see F.linear: core/memory/meta_tensors.py imitates
    # autocast in one.
    if has_torch_function_unary(x):
        return handle_torch_function(linear, (x,), x, layer)
    return _Linear.apply(x.to(_compute(x)), layer)              # type: ignore[no-any-return]


def conv2d(x: Tensor, layer: FrozenConv2d) -> Tensor:
    """x (B, in, H, W) -> (B, out, h, w); otherwise the same as `linear`."""
    if has_torch_function_unary(x):
        return handle_torch_function(conv2d, (x,), x, layer)
    return _Conv2d.apply(x.to(_compute(x)), layer)              # type: ignore[no-any-return]


def _compute(x: Tensor) -> torch.dtype:
    """The dtype in which a layer computes: autocast's where it is on."""
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class _Linear(torch.autograd.Function):
    """Reads the weight again in the backward pass. If it were kept, the weights of all layers
    would be in memory in full at once."""

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
        # Only the shape and layout of the input are read for its gradient.
        like = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device,
                           memory_format=ctx.layout)
        grad_input: Tensor = torch.ops.aten.convolution_backward(
            grad, like, layer.read(grad.dtype), None, layer.stride, layer.padding,
            layer.dilation, False, (0, 0), layer.groups, (True, False, False))[0]
        return grad_input, None


def _bias(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


# --- models ---

def quantize_(model: nn.Module, quantization: Quantization,
              device: torch.device | None = None) -> int:
    """Quantises the layers of the repeated blocks in place. Returns how many.

    `device` is where the model will run: the arithmetic is done there, the codes stay where the
    weight was. It must be called before adapters are attached. Works on meta tensors. Raises
    UserError for a model of which nothing can be quantised: it would take its full memory.
    """
    if quantization == "same":
        return 0
    count, is_done = 0, False
    for layer in repeated_layers(model):
        if isinstance(layer, Frozen):
            is_done = True
        elif layer.weight.numel() % BLOCK == 0:
            freeze_(layer, quantization, device or layer.weight.device)
            count += 1
    if count or is_done:
        return count
    # Which of the conditions of `repeated_layers` and BLOCK no layer meets, in their order.
    layers = [layer for part in repeated_blocks(model) for layer in part.modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d))]
    largest = max(layers, key=lambda layer: layer.weight.numel(), default=None)
    why: dict[str, object] = {"say": "precision.no_blocks"}
    if largest is not None and largest.weight.numel() < SMALLEST:
        why = {"say": "precision.small_layers", "largest": largest.weight.numel(),
               "smallest": SMALLEST}
    elif largest is not None:
        why = {"say": "precision.other_layers", "layer": type(largest).__name__, "block": BLOCK}
    raise UserError("precision.nothing_quantised", kind=quantization, model=type(model).__name__,
                    why=why, fixes=[Fix("fixes.without_key", {"base_precision": "same"})])


def freeze_(layer: nn.Linear | nn.Conv2d, quantization: Quantization,
            device: torch.device) -> Frozen:
    """Turns a plain layer into a frozen one, in place; "same" keeps the weight as it is."""
    weight = layer.weight.detach()
    del layer.weight
    layer.__class__ = FrozenLinear if isinstance(layer, nn.Linear) else FrozenConv2d
    assert isinstance(layer, Frozen)
    layer.quantization, layer.native, layer.fetch = quantization, device.type == "cuda", None
    layer.dtype, layer.shape = weight.dtype, weight.shape
    layer.channels_last = weight.ndim == 4 and weight.stride(1) == 1 and (
        weight.stride(3) == weight.shape[1])
    layer.register_buffer("codes", weight if quantization == "same" else weight.new_empty(0))
    layer.register_buffer("scales", None if quantization == "same" else weight.new_empty(0))
    if quantization != "same":
        layer.write(weight if weight.is_meta else weight.to(device))
    return layer


def fill_(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype,
          device: torch.device, quantize_on: torch.device | None = None) -> None:
    """Puts weights into a model on the meta device and quantises them one after the other, so that
    only one of them is in memory in full.

    `tensors` are (name in the model, weight), read one by one from a file; they are copied to
    `device`. Parameters keep the dtype of the empty model, buffers get `dtype`. The device
    `quantize_on` does the arithmetic. What was not among `tensors` stays on the meta device.
    """
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, Frozen) and leaf == "weight":
            module.codes = torch.empty(0, device=device)
            module.write(tensor.to(quantize_on or device, module.dtype))
            continue
        empty, is_parameter = getattr(module, leaf), leaf in module._parameters
        layout = (torch.channels_last if tensor.ndim == 4 and empty.stride(1) == 1
                  else torch.contiguous_format)
        float_dtype = empty.dtype if is_parameter else dtype
        value = tensor.to(device, float_dtype if tensor.is_floating_point() else tensor.dtype,
                          copy=True, memory_format=layout)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def repeated_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated part of a model: its ModuleLists, and a UNet's middle block. A text encoder has
    them one level further in."""
    blocks = [child for name, child in model.named_children()
              if isinstance(child, nn.ModuleList) or name == "mid_block"]
    yield from blocks
    for child in () if blocks else model.children():
        yield from repeated_blocks(child)


def repeated_layers(module: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    """The layers of the repeated blocks that are large enough to matter."""
    for part in list(repeated_blocks(module)):
        yield from heavy_layers(part)


def heavy_layers(module: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    """The frozen layers, and those large ones that `freeze_` can freeze."""
    for layer in list(module.modules()):
        if isinstance(layer, Frozen):
            yield layer                     # type: ignore[misc]
        # Not of a subclass, which may compute more than its weight does.
        elif isinstance(layer, (nn.Linear, nn.Conv2d)) and type(layer) in (nn.Linear, nn.Conv2d):
            is_simple = isinstance(layer, nn.Linear) or (
                layer.padding_mode == "zeros" and not isinstance(layer.padding, str))
            if is_simple and layer.weight.numel() >= SMALLEST and not layer.weight.requires_grad:
                yield layer
