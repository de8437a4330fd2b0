"""The demo world as its captioners see it: scenes, what can be seen on them, what is held out.

Held out: a tenth of all (subject with colour, background, style) triples, chosen by hash, is never
trained on; the duskprint inks neither, though other random inks are, as "print style".
"""

from __future__ import annotations

import argparse
import hashlib
import random
from dataclasses import dataclass

import demo_pictures as pictures
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
PRINT = "print"                             # one word for prints in all inks
STYLE_WORDS = (*pictures.STYLES, PRINT)
# Styles in which a red car looks red.
IN_COLOUR = ("flat", "pastel", "outline", "poster")
# Styles in which all backgrounds differ.
OWN_GROUND = (*IN_COLOUR, "negative")
STYLE_SHARE = {"flat": 0.32, PRINT: 0.2}    # the other nine share the rest
WORDS: dict[str, tuple[str, ...]] = {
    "subject": tuple(pictures.SUBJECTS), "style": STYLE_WORDS,
    "background": tuple(pictures.BACKGROUNDS), "colour": tuple(pictures.HUES)}


@dataclass(frozen=True, slots=True)
class Scene:
    drawing: int
    background: str
    style: str                              # of STYLE_WORDS, or the LoRA's

    def facts(self, drawings: list[pictures.Drawing]) -> dict[str, str]:
        """The facts: subject, and colour, background, style where they show."""
        drawing = drawings[self.drawing]
        facts = {"subject": drawing.subject, "style": self.style}
        # The LoRA's style is a print in inks that are never trained on.
        if self.style == pictures.LORA_STYLE:
            facts["style"] = PRINT
        if drawing.subject in pictures.COLOURED and self.style in IN_COLOUR:
            facts["colour"] = drawing.colour or pictures.COLOURED[drawing.subject]
        if self.style in pictures.STYLES:
            facts["background"] = self.background
        return facts


def sentence(facts: dict[str, str]) -> str:
    """The demo world's caption, with all that can be seen in it."""
    noun = f"{facts.get('colour', '')} {facts['subject']}".strip()
    ground = facts.get("background", "")
    return pictures.caption(noun, ground, facts["style"], bool(ground))


def held_out(scene: Scene, drawings: list[pictures.Drawing]) -> bool:
    """Whether a scene is held out: a tenth of the world is, the same on every machine."""
    key = f"{drawings[scene.drawing].noun}|{scene.background}|{scene.style}"
    # 26 of a byte's 256 values.
    return hashlib.sha256(key.encode()).digest()[0] < 26


def scenes(drawings: list[pictures.Drawing], count: int, seed: int, held: bool,
           style: str = "") -> list[Scene]:
    """Random scenes for training, or held-out ones."""
    rng = random.Random(seed)
    of_subject = {s: [i for i, d in enumerate(drawings) if d.subject == s]
                  for s in pictures.SUBJECTS}
    left = (1 - sum(STYLE_SHARE.values())) / (len(STYLE_WORDS) - len(STYLE_SHARE))
    shares = [STYLE_SHARE.get(word, left) for word in STYLE_WORDS]
    result: list[Scene] = []
    while len(result) < count:
        word = style or rng.choices(STYLE_WORDS, shares)[0]
        grounds = list(pictures.BACKGROUNDS)
        # Gradient maps show only light and dark backgrounds.
        if word not in OWN_GROUND:
            grounds = ["white", "white", "black"] if word in pictures.STYLES else grounds
        drawing = rng.choice(of_subject[rng.choice(list(of_subject))])
        # Where colours don't show, the drawing in its own colour stands for all.
        if drawings[drawing].colour and word not in IN_COLOUR:
            drawing = of_subject[drawings[drawing].subject][0]
        scene = Scene(drawing, rng.choice(grounds), word)
        if style or held_out(scene, drawings) == held:
            result.append(scene)
    return result


def render(drawings: list[pictures.Drawing], chosen: list[Scene], seed: int) -> np.ndarray:
    """-> uint8 (N, 64, 64, 3); place, size and the inks of prints are random."""
    rng = random.Random(seed)
    result = np.empty((len(chosen), pictures.SIZE, pictures.SIZE, 3), np.uint8)
    for n, scene in enumerate(chosen):
        scale = rng.uniform(0.66, 0.92)
        room = (pictures.SIZE - round(pictures.SIZE * scale)) // 2
        shift = (rng.randint(-min(room, 5), min(room, 5)), rng.randint(-min(room, 5), min(room, 5)))
        picture, mask = pictures.compose(drawings[scene.drawing].rgba, scene.background, shift,
                                         scale)
        if scene.style == PRINT:
            styled = pictures.print_style(picture[None], mask[None],
                                          pictures.random_inks(rng))[0]
        else:
            styled = pictures.stylise(picture[None], mask[None], scene.style)[0]
        result[n] = (styled.clip(0, 1) * 255).round()
    return result


def as_pixels(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) -> normalised as the models' own preprocessing does it"""
    x = images.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def augment(images: Tensor) -> Tensor:
    """Mirrors, shifts, blurs (like an autoencoder) and adds noise, each at random."""
    x = as_pixels(images)
    if torch.rand(()) < 0.5:
        x = x.flip(3)
    down, across = (int(torch.randint(-3, 4, ())) for _ in range(2))
    x = F.pad(x, (3, 3, 3, 3), mode="replicate")[:, :, 3 + down:67 + down, 3 + across:67 + across]
    if torch.rand(()) < 0.3:
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    if torch.rand(()) < 0.5:
        x = x + torch.randn_like(x) * float(torch.rand(())) * 0.2
    return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, slots=True)
class World:
    drawings: list[pictures.Drawing]
    images: Tensor                          # uint8 (N, 64, 64, 3)
    facts: list[dict[str, str]]


def world(args: argparse.Namespace, count: int, seed: int, held: bool, style: str = "") -> World:
    """Pictures with their facts; saved in --work between the stages."""
    drawings = pictures.load_drawings(args.emoji)
    chosen = scenes(drawings, count, seed, held, style)
    path = args.work / f"captioner-{count}-{seed}-{held}-{style}.npy"
    if not path.exists():
        np.save(path, render(drawings, chosen, seed + 1))
    return World(drawings, torch.from_numpy(np.load(path)), [s.facts(drawings) for s in chosen])
