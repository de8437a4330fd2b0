"""Runs a model without numbers and counts what its tensors would hold: meta tensors, real shapes.

A meta tensor has a shape, a dtype and a storage of a size, but no memory: a whole training step,
backward pass included, takes a second. Two things differ between devices and are imitated here:
which kernel attention runs on (flash: nothing of size length x length is kept), and what autocast
turns into which numbers (the op lists of torch's autocast documentation).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from core.weights import quantization

Kind = Literal["cuda", "mps", "cpu"]
META = torch.device("meta")
GRAIN = {"cuda": 512, "mps": 256, "cpu": 64}        # bytes that an allocation is rounded up to

# The ops that autocast runs in 16 bits.
_HALF: set[Callable[..., Any]] = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
    torch.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm,
    torch.mm, Tensor.mm, torch.addmm, torch.baddbmm, F.scaled_dot_product_attention,
    quantization.linear, quantization.conv2d}
_FULL: dict[str, set[Callable[..., Any]]] = {       # computed in fp32 under autocast
    "cuda": {F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax,
             F.log_softmax, torch.exp, Tensor.exp, torch.pow, Tensor.pow, F.mse_loss},
    "cpu": {F.mse_loss}}
_FULL["mps"] = _FULL["cuda"]
# The place of the input among a convolution's arguments; the weight follows.
_CONVOLUTIONS = {torch.ops.aten.convolution.default: 0,
                 torch.ops.aten.convolution_backward.default: 1}


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live and peak bytes of the tensors made while it is on. Weights of `known` modules are
    not counted: they were there before."""

    def __init__(self, kind: Kind, known: Iterable[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._kind, self._grain = kind, GRAIN[kind]
        self._seen = {t.untyped_storage()._cdata for module in known
                      for t in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copies = 0
        if func in _CONVOLUTIONS:
            place = _CONVOLUTIONS[func]
            # A convolution keeps the layout of its input or weight, and copies what is laid out
            # otherwise; torch's meta kernel knows no device and leaves both out.
            if any(suggest_memory_format(t) == torch.channels_last
                   for t in (args[place], *args[1:2])):
                if isinstance(out, Tensor):
                    out = torch.empty_like(out, memory_format=torch.channels_last)
                copies = sum(t.numel() * t.element_size() for t in args[:3]
                             if isinstance(t, Tensor) and t.ndim == 4 and not t.is_contiguous(
                                 memory_format=torch.channels_last))
            if self._kind == "cpu":
                weight = args[place + 1]                # oneDNN works on a copy laid out anew
                copies += weight.numel() * weight.element_size()
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if (key := storage._cdata) in self._seen:           # a view
                continue
            size = -(-storage.nbytes() // self._grain) * self._grain
            self._seen.add(key)
            self.live += size
            weakref.finalize(storage, self._drop, key, size)
        self.peak = max(self.peak, self.live + copies)
        return out

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class DeviceEmulation(TorchFunctionMode):
    """Attention and autocast as `kind` would have them."""

    def __init__(self, kind: Kind, compute: torch.dtype) -> None:
        super().__init__()
        self.kind, self.compute, self.full = kind, compute, _FULL[kind]
        self.casting = False
        # Trainable weights are cast once a pass, as autocast's own cache has it.
        self._casts: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.casting and (func in _HALF or func in self.full):
            dtype = self.compute if func in _HALF else torch.float32
            args = tuple(self._cast(a, dtype) for a in args)
            kwargs = {k: self._cast(v, dtype) for k, v in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.group_norm and self.kind == "cpu":
            return _group_norm(*args, **kwargs)
        return func(*args, **kwargs)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """What torch.autocast does, within."""
        self.casting = self.compute != torch.float32
        try:
            yield
        finally:
            self.casting = False
            self._casts.clear()

    def checkpoint(self, module: nn.Module, *args: Any) -> Any:
        """Activation checkpointing as diffusers has it."""
        # Within a backward pass torch switches function modes off: the recomputation brings this
        # one along, in the state that it had in the forward pass.
        casting = self.casting

        @contextmanager
        def again() -> Iterator[None]:
            before, self.casting = self.casting, casting
            try:
                with self:
                    yield
            finally:
                self.casting = before
                self._casts.clear()

        return checkpoint(module.__call__, *args, use_reentrant=False,
                          context_fn=lambda: (nullcontext(), again()))

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._cast(item, dtype) for item in value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(dtype)
        return self._casts[id(value)]


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
               enable_gqa: bool = False) -> Tensor:
    """Flash attention, which keeps query, key, value, output and one number a row."""
    if enable_gqa and key.shape[1] != query.shape[1]:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    out: Tensor = flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask,
                        scale=scale)[0]
    return out


class _GroupNorm(torch.autograd.Function):
    """The CPU's group norm, which keeps channels_last. torch's meta kernel is CUDA's, which makes
    the input contiguous first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, *affine: Tensor) -> Tensor:
        statistics = x.new_empty(2, x.shape[0], groups)
        ctx.save_for_backward(x, statistics, *affine)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return torch.empty_like(grads[0]), None, *[None] * (len(ctx.saved_tensors) - 2)


def _group_norm(x: Tensor, num_groups: int, weight: Tensor | None = None,
                bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    layout = torch.channels_last if x.ndim == 4 and x.is_contiguous(
        memory_format=torch.channels_last) else torch.contiguous_format
    affine = [t for t in (weight, bias) if t is not None]
    out: Tensor = _GroupNorm.apply(x.contiguous(memory_format=layout), num_groups, *affine)
    return out


@contextmanager
def traced(kernels: DeviceEmulation, known: Iterable[nn.Module]) -> Iterator[StorageTracker]:
    """Within: tensors made on the meta device are counted."""
    tally = StorageTracker(kernels.kind, known)
    with kernels, tally:
        yield tally


def size_of(module: nn.Module) -> int:
    """Bytes of a module's weights and buffers, each storage once, as the CPU hands them out."""
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes()
             for t in (*module.parameters(), *module.buffers())}
    return sum(-(-size // GRAIN["cpu"]) * GRAIN["cpu"] for size in sizes.values())
