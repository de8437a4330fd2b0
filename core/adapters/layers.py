"""What peft's layers lack: DoRA as the community's files mean it, PiSSA on an untouched base,
dropout by rank and by layer, and OFT on a layer's outputs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class Product(LoraVariant):  # type: ignore[misc]
    """LoRA's product with dropout of ranks and of whole layers, and with a start that isn't zero.

    `start` are frozen copies of A and B: what they give is taken away again, so that the base
    stays as it is: on disk, in fewer bits or in RAM.
    """

    def __init__(self, rank_dropout: float = 0.0, module_dropout: float = 0.0,
                 start: tuple[nn.Module, nn.Module] | None = None) -> None:
        self.rank_dropout, self.module_dropout, self.start = rank_dropout, module_dropout, start

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor,
                **options: Any) -> Tensor:
        if module.training and dropped(self.module_dropout):
            return result
        x = module.lora_dropout[active_adapter](x)
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        mask: Tensor | None = None
        if module.training and self.rank_dropout:
            rank, middle = a.weight.shape[0], [1] * (x.ndim - 2)
            # one mask for all places of a picture: (B, 1 ..., r), a convolution's (B, r, 1, 1)
            spatial = isinstance(module.get_base_layer(), nn.Conv2d)
            shape = (len(x), rank, *middle) if spatial else (len(x), *middle, rank)
            keep = torch.rand(len(x), rank, device=x.device) >= self.rank_dropout
            mask = keep.view(shape) / (1 - self.rank_dropout)
        product = _product(a, b, x, mask)
        if self.start:
            product = product - _product(*self.start, x, mask)
        scaling: float = module.scaling[active_adapter]
        return result + product * scaling


def _product(a: nn.Module, b: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    inner = a(x)
    product: Tensor = b(inner if mask is None else inner * mask)
    return product


def dropped(share: float) -> bool:
    """True with probability `share`, by torch's CPU generator: no wait for the device."""
    return share > 0 and float(torch.rand(())) < share


def start_at_principal(layer: Any, adapter: str) -> tuple[nn.Module, nn.Module]:
    """PiSSA (Meng et al. 2024, arXiv 2404.02948): A and B become the largest singular parts of
    the frozen weight. -> copies of them, for `Product`.

    The paper takes them out of the base; here they are taken out of the product, which is the
    same function, exact in any number format.
    """
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    weight = layer.get_base_layer().weight.detach().float().flatten(1)
    rank, scale = a.weight.shape[0], layer.scaling[adapter]
    if not weight.is_meta:
        most = min(rank, *weight.shape)
        # eight directions more than wanted: the last ones of a randomised SVD are inexact
        svd = torch.svd_lowrank(weight, q=min(most + 8, *weight.shape), niter=16)
        left, values, right = (part[..., :most] for part in svd)
        roots = (values / scale).sqrt()
        with torch.no_grad():
            a.weight.zero_()[:most] = (roots[:, None] * right.T).view(most, *a.weight.shape[1:])
            b.weight.zero_()[:, :most] = (left * roots).view(-1, most, *b.weight.shape[2:])
    return (copy.deepcopy(a).requires_grad_(False), copy.deepcopy(b).requires_grad_(False))


class Magnitude(nn.Module):
    """DoRA's length of each column (1, in, ...), or of each row (out, 1, ...) in some files."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Decomposed(LoraVariant):  # type: ignore[misc]
    """DoRA (Liu et al. 2024, arXiv 2402.09353): W' = m * (W + BA) / |W + BA|, the norm without
    gradient (section 4.3).

    Lengths are those of columns, one for each input: A1111, Forge, ComfyUI and LyCORIS mean the
    same by such a `dora_scale`. What peft trains, one for each output, A1111 can't read and
    ComfyUI divides by the base's lengths instead. A weight of s gives W + s (W' - W), as theirs.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale                  # of BA, whatever the weight

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor,
                **options: Any) -> Tensor:
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        base = module.base_layer
        # `result` holds the base's own output only for the first of several adapters
        first = module.active_adapters[0] == active_adapter
        plain = result if first else base(x)
        # no gradient through the norm, and fp32: half numbers would round the small change away
        with torch.no_grad(), torch.autocast(
                a.weight.device.type if not a.weight.is_meta else "cpu", enabled=False):
            weight = module.get_base_layer().weight
            merged = (b.weight.flatten(1).float() @ a.weight.flatten(1).float()).view(weight.shape)
            norm = lengths(merged.mul_(self.scale).add_(weight), by_row(magnitude))
        factor = magnitude / norm
        drop = module.lora_dropout[active_adapter]
        if by_row(magnitude):
            # the factor belongs to the weight: a bias keeps its length
            bias = _shaped(module.get_base_layer().bias, plain)
            free = plain if bias is None else plain - bias
            turned = _shaped(factor.flatten(), plain) * (free + b(a(drop(x))) * self.scale)
            turned = turned if bias is None else turned + bias
        else:
            x = x * (factor if x.ndim == 4 and factor.ndim == 4 else factor.flatten())
            turned = base(x) + b(a(drop(x))) * self.scale
        strength: float = module.scaling[active_adapter] / self.scale
        moved: Tensor = turned if strength == 1 and first else result + strength * (turned - plain)
        return moved


def lengths(weight: Tensor, rows: bool = False) -> Tensor:
    """The lengths of a weight's columns or rows, fp32: (out, in, ...) -> (1, in, 1 ...) or
    (out, 1, ...)."""
    side = 0 if rows else 1
    norm: Tensor = torch.linalg.vector_norm(
        weight, dim=[d for d in range(weight.ndim) if d != side], keepdim=True,
        dtype=torch.float32)
    return norm


def by_row(magnitude: Tensor) -> bool:
    """Whether DoRA's lengths are those of rows, as in files of peft."""
    return magnitude.shape[0] > 1


def _shaped(vector: Tensor | None, like: Tensor) -> Tensor | None:
    """One number for each output, in the shape that fits a convolution's outputs (B, C, H, W)."""
    if vector is None or like.ndim != 4:
        return vector
    return vector.view(1, -1, 1, 1)


def decompose(layer: Any, adapter: str) -> None:
    """Makes a fresh LoRA layer a DoRA; its magnitudes begin as the base's own."""
    weight = layer.get_base_layer().weight.detach()
    layer.lora_magnitude_vector[adapter] = Magnitude(lengths(weight))
    layer.lora_variant[adapter] = Decomposed(layer.scaling[adapter])


class Rotation(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """OFT (Qiu et al. 2023, arXiv 2306.07280) as kohya's and LyCORIS' files hold it (diag-oft):
    outputs are turned, block by block, by R = (I + Q) / (I - Q), Q = blocks - blocks^T.

    peft's own OFT turns the inputs, which no such file can say. A weight of s gives
    W + s (R^T W - W). The base's weight is never read: it may be in fewer bits, or in RAM.
    """

    adapter_layer_names = ("oft_blocks", "oft_rescale")
    other_param_names = ("scaling", "constraint", "module_dropout")
    active_adapters: Any                                # these three are BaseTunerLayer's
    disable_adapters: bool
    get_base_layer: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.oft_blocks: Any = nn.ParameterDict()       # (blocks, size, size)
        self.oft_rescale: Any = nn.ParameterDict()      # (out, 1 ...): only read, never trained
        self.scaling: dict[str, float] = {}
        self.constraint: dict[str, float] = {}          # largest |Q|; 0: none
        self.module_dropout: dict[str, float] = {}
        self.merged_adapters: list[str] = []

    def add(self, adapter: str, blocks: Tensor, constraint: float = 0.0,
            rescale: Tensor | None = None, module_dropout: float = 0.0) -> None:
        self.oft_blocks[adapter] = nn.Parameter(blocks)
        if rescale is not None:
            self.oft_rescale[adapter] = nn.Parameter(rescale, requires_grad=False)
        self.scaling[adapter], self.constraint[adapter] = 1.0, constraint
        self.module_dropout[adapter] = module_dropout
        self._active_adapter = [adapter]

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **options)
        if self.disable_adapters:
            return result
        for adapter in self.active_adapters:
            if adapter not in self.oft_blocks or (
                    self.training and dropped(self.module_dropout[adapter])):
                continue
            # a bias is not turned; outputs are (B, ..., out) or a convolution's (B, out, H, W)
            bias = _shaped(self.get_base_layer().bias, result)
            y = result if bias is None else result - bias
            channels = y.movedim(1, -1) if y.ndim == 4 else y
            blocks = self.change(adapter)
            split = channels.view(*channels.shape[:-1], *blocks.shape[:2])
            added = torch.einsum("...kn,knm->...km", split, blocks.to(split.dtype)).flatten(-2)
            if adapter in self.oft_rescale:
                rescale = self.oft_rescale[adapter].flatten()
                added = rescale * added + (rescale - 1) * channels
            added = added.movedim(-1, 1) if y.ndim == 4 else added
            result = result + (added * self.scaling[adapter]).to(result.dtype)
        return result

    def change(self, adapter: str) -> Tensor:
        """R - I = 2 Q / (I - Q) of each block, fp32."""
        blocks = self.oft_blocks[adapter]
        with torch.autocast(blocks.device.type if not blocks.is_meta else "cpu", enabled=False):
            skew = blocks - blocks.mT
            if limit := self.constraint[adapter]:
                skew = skew * (limit / (skew.norm() + 1e-8)).clamp(max=1)
            unit = torch.eye(blocks.shape[1], device=blocks.device)
            # skew + skew^T = 0, so I - Q is never singular; inv_ex doesn't wait for the device
            inverse = torch.linalg.inv_ex(unit - skew)[0]
            change: Tensor = 2 * (skew @ inverse)
            return change


def pose(layer: Any) -> None:
    """Gives a layer around a convolution the convolution's sizes: peft's LoRA, laid around another
    adapter's layer, asks for them."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        for name in ("groups", "stride", "padding", "dilation", "kernel_size"):
            setattr(layer, name, getattr(base, name))


def rotate(model: nn.Module, path: str) -> Rotation:
    """Puts a Rotation around a layer, or finds the one that is there."""
    parent, _, leaf = path.rpartition(".")
    layer = model.get_submodule(path)
    if not isinstance(layer, Rotation):
        layer = Rotation(layer)
        pose(layer)
        setattr(model.get_submodule(parent) if parent else model, leaf, layer)
    return layer


def full_kronecker(layer: Any, adapter: str) -> None:
    """Sets the scale of a LoKr with both factors in full to 1, as LyCORIS does: it has no rank, so
    no alpha / rank."""
    if adapter in layer.lokr_w1 and adapter in layer.lokr_w2:
        layer.alpha[adapter], layer.scaling[adapter] = float(layer.r[adapter]), 1.0


def unit_scale(layer: BaseTunerLayer, adapter: str) -> float:
    """alpha / rank, or what stands for it, at weight 1."""
    if isinstance(layer, LoraLayer):
        rank = layer.r[adapter]
        root = rank ** 0.5 if layer.use_rslora.get(adapter) else rank
        return float(layer.lora_alpha[adapter] / root)
    return float(layer.alpha[adapter] / layer.r[adapter])
