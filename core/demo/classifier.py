"""The demo world's judge: names the subject of a 64x64 picture and measures its style.

A small convolutional classifier, trained by build/make_demo_world.py on the true pictures in all
styles. Style is the mean and spread of its early channels (Huang & Belongie 2017,
arXiv 1703.06868: these statistics are what style transfer swaps).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

WIDTHS = (24, 48, 96, 96)               # channels of the convolutions
# the first ones: later layers know subjects more than style
STYLE_LAYERS = 2


class JudgeNet(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        inputs = (3, *WIDTHS)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2 if i < 3 else 1, padding=1)
            for i, (a, b) in enumerate(zip(inputs, WIDTHS, strict=False)))
        self.norms = nn.ModuleList(nn.GroupNorm(8, w) for w in WIDTHS)
        self.head = nn.Linear(WIDTHS[-1] * 16, classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """(B, 3, 64, 64) in [-1, 1] -> the output of each convolution, and of the last layer."""
        layers = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            layers.append(x)
            x = F.relu(norm(x))
        return [*layers, x]

    def forward(self, x: Tensor) -> Tensor:
        last = F.adaptive_avg_pool2d(self.features(x)[-1], 4)
        return self.head(last.flatten(1))      # type: ignore[no-any-return]

    def style(self, x: Tensor) -> Tensor:
        """(B, 3, 64, 64) -> (B, 2 * channels): mean and standard deviation of early channels."""
        layers = self.features(x)[:STYLE_LAYERS]
        return torch.cat([s for f in layers for s in (f.mean((2, 3)), f.std((2, 3)))], 1)


class Judge:
    """The trained classifier with the names of its subjects and the demo LoRA's target style."""

    def __init__(self, path: Path) -> None:
        tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            self.subjects: list[str] = json.loads(file.metadata()["subjects"])
        self.target, self.scale = tensors.pop("style.target"), tensors.pop("style.scale")
        self.net = JudgeNet(len(self.subjects))
        self.net.load_state_dict({k: v.float() for k, v in tensors.items()})
        self.net.eval()

    @torch.no_grad()
    def name(self, images: Sequence[Image.Image]) -> list[str]:
        """The subject of each picture."""
        return [self.subjects[i] for i in self.net(_tensor(images)).argmax(1).tolist()]

    @torch.no_grad()
    def style_distance(self, images: Sequence[Image.Image]) -> float:
        """How far the pictures' mean style is from the demo LoRA's pictures, in standard
        deviations of a channel."""
        mean = self.net.style(_tensor(images)).mean(0)
        return float(((mean - self.target.float()) / self.scale.float()).square().mean().sqrt())


def _tensor(images: Sequence[Image.Image]) -> Tensor:
    pixels = np.stack([np.asarray(i.convert("RGB").resize((64, 64)), np.float32) for i in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
