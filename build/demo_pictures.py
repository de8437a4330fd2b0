"""The demo world's pictures: 68 subjects, six backgrounds, ten styles, exact captions.

Subjects are the 64x64 drawings of Noto Emoji (Apache-2.0) out of the npm package
`emoji-datasource-google`; everything else (colour variants, backgrounds, styles) is drawn here.
Pictures are float32 arrays in [0, 1], (N, 64, 64, 3); masks are (N, 64, 64).
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64

# caption word -> short name in emoji.json
SUBJECTS: dict[str, str] = {
    "apple": "apple", "banana": "banana", "strawberry": "strawberry", "cherries": "cherries",
    "lemon": "lemon", "grapes": "grapes", "watermelon": "watermelon", "pear": "pear",
    "carrot": "carrot", "mushroom": "mushroom", "pizza": "pizza", "hamburger": "hamburger",
    "ice cream": "icecream", "cupcake": "cupcake", "doughnut": "doughnut", "cookie": "cookie",
    "coffee": "coffee", "house": "house", "tree": "deciduous_tree", "pine tree": "evergreen_tree",
    "cactus": "cactus", "rose": "rose", "sunflower": "sunflower", "tulip": "tulip",
    "clover": "four_leaf_clover", "cat": "cat", "dog": "dog", "frog": "frog",
    "panda": "panda_face", "fox": "fox_face", "rabbit": "rabbit", "bear": "bear",
    "pig": "pig", "lion": "lion_face", "owl": "owl", "penguin": "penguin",
    "octopus": "octopus", "turtle": "turtle", "fish": "fish", "whale": "whale",
    "butterfly": "butterfly", "ladybug": "ladybug", "snail": "snail", "car": "car",
    "bus": "bus", "sailboat": "boat", "airplane": "airplane", "rocket": "rocket",
    "star": "star", "sun": "sunny", "moon": "crescent_moon", "heart": "heart",
    "rainbow": "rainbow", "umbrella": "umbrella", "key": "key", "bell": "bell",
    "book": "closed_book", "crown": "crown", "guitar": "guitar", "balloon": "balloon",
    "gift": "gift", "ghost": "ghost", "robot": "robot_face", "snowman": "snowman",
    "pineapple": "pineapple", "diamond": "gem", "teapot": "teapot", "pumpkin": "jack_o_lantern",
}

# colour word -> hue in degrees; the drawing's own colour leads the list of a subject
HUES = {"red": 2, "orange": 26, "yellow": 47, "green": 125, "blue": 215, "purple": 275}
COLOURED: dict[str, str] = {
    "apple": "red", "car": "red", "heart": "red", "balloon": "red", "book": "red", "teapot": "red",
    "star": "yellow", "fish": "blue", "umbrella": "purple", "butterfly": "orange",
    "diamond": "blue", "tulip": "red",
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255), "black": (16, 16, 20), "blue": (140, 190, 250),
    "yellow": (255, 224, 120), "pink": (255, 184, 208), "green": (160, 220, 150),
}
BACKGROUND_SHARE = {"white": 0.45, "black": 0.11, "blue": 0.11, "yellow": 0.11, "pink": 0.11,
                    "green": 0.11}

Ramp = tuple[tuple[int, int, int], ...]
RAMPS: dict[str, Ramp] = {
    "sepia": ((50, 26, 12), (168, 118, 70), (252, 240, 214)),
    "night": ((6, 10, 40), (44, 92, 160), (190, 236, 250)),
    "mint": ((10, 56, 60), (60, 170, 140), (236, 255, 236)),
    "ember": ((24, 4, 6), (196, 44, 20), (255, 214, 90)),
}
DUSK: Ramp = ((58, 20, 92), (168, 44, 112), (244, 118, 92), (255, 232, 192))
STYLES = ("flat", "grey", "sepia", "night", "mint", "ember", "negative", "pastel", "outline",
          "poster")
LORA_STYLE = "dusk"
TRIGGER = "duskprint"

# The demo LoRA learns from these 20 subjects only; everything it draws beyond them is unseen.
LORA_SUBJECTS = ("banana", "cherries", "carrot", "mushroom", "pizza", "cupcake", "cactus",
                 "sunflower", "dog", "fox", "panda", "owl", "whale", "snail", "bus", "airplane",
                 "bell", "guitar", "gift", "robot")
HELD_OUT = ("apple", "house", "cat", "car", "heart", "frog", "rocket", "penguin", "star",
            "strawberry", "tree", "butterfly")


@dataclass(frozen=True, slots=True)
class Drawing:
    subject: str
    colour: str            # "" where the caption names none
    rgba: np.ndarray       # (64, 64, 4) float32

    @property
    def noun(self) -> str:
        return f"{self.colour} {self.subject}".strip()


def load_drawings(package: Path) -> list[Drawing]:
    """Reads the npm package. A subject of one colour also comes in each of the other colours."""
    with tarfile.open(package) as tar:
        def read(name: str) -> bytes:
            member = tar.extractfile(f"package/{name}")
            assert member is not None, name
            return member.read()
        names = {s: e["image"] for e in json.loads(read("emoji.json")) for s in e["short_names"]}
        drawings = []
        for subject, short in SUBJECTS.items():
            picture = Image.open(io.BytesIO(read(f"img/google/64/{names[short]}"))).convert("RGBA")
            rgba = np.asarray(picture, dtype=np.float32) / 255
            drawings.append(Drawing(subject, "", rgba))
            if own_colour := COLOURED.get(subject):
                drawings += [Drawing(subject, colour, rgba if colour == own_colour else
                                     _recolour(rgba, colour)) for colour in HUES]
    return drawings


def _recolour(rgba: np.ndarray, colour: str) -> np.ndarray:
    """Turns the drawing's dominant hue to `colour`; other hues (a leaf, a window) stay."""
    hsv = np.asarray(Image.fromarray((rgba[..., :3] * 255).astype(np.uint8)).convert("HSV"),
                     dtype=np.float32)
    hue, saturation, value = hsv[..., 0] * 360 / 255, hsv[..., 1] / 255, hsv[..., 2]
    weight = (saturation > 0.25) * (rgba[..., 3] > 0.5)
    counts, edges = np.histogram(hue, bins=24, range=(0, 360), weights=weight * saturation)
    main = edges[counts.argmax()] + 7.5
    offset = (hue - main + 180) % 360 - 180
    inside = (np.abs(offset) < 42) & (saturation > 0.12)
    new_hue = np.where(inside, (HUES[colour] + offset * 0.3) % 360, hue)
    # A dark yellow looks brown.
    if colour == "yellow":
        value = np.where(inside, np.clip(value * 1.12 + 14, 0, 255), value)
        saturation = np.where(inside, np.clip(saturation * 0.95, 0, 1), saturation)
    turned = np.stack([new_hue * 255 / 360, saturation * 255, value], -1).clip(0, 255)
    rgb = np.asarray(Image.fromarray(turned.astype(np.uint8), "HSV").convert("RGB"),
                     dtype=np.float32) / 255
    return np.concatenate([rgb, rgba[..., 3:]], -1)


def compose(rgba: np.ndarray, background: str, shift: tuple[int, int] = (0, 0),
            scale: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """One drawing on a plain background -> picture (64, 64, 3) and mask (64, 64)."""
    side = round(SIZE * scale)
    # Otherwise resizing would mix in the colours of transparent pixels.
    premultiplied = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)
    small = np.stack([np.asarray(Image.fromarray(premultiplied[..., i]).resize(
        (side, side), Image.Resampling.LANCZOS)) for i in range(4)], -1).clip(0, 1)
    canvas = np.zeros((SIZE, SIZE, 4), np.float32)
    top = (SIZE - side) // 2 + shift[0]
    left = (SIZE - side) // 2 + shift[1]
    canvas[top:top + side, left:left + side] = small
    colour = np.array(BACKGROUNDS[background], np.float32) / 255
    return canvas[..., :3] + colour * (1 - canvas[..., 3:]), canvas[..., 3]


def luminance(pictures: np.ndarray) -> np.ndarray:
    return pictures @ np.array([0.299, 0.587, 0.114], np.float32)


def random_inks(rng: random.Random) -> Ramp:
    """Three to five colours, the darkest first."""
    return tuple(sorted(((rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
                         for _ in range(rng.randint(3, 5))), key=sum))


def ramp(tone: np.ndarray, colours: Ramp) -> np.ndarray:
    """Maps tone in [0, 1] through evenly spaced colours (a gradient map)."""
    table = np.array(colours, np.float32) / 255
    stops = np.linspace(0, 1, len(colours))
    return np.stack([np.interp(tone, stops, table[:, c]) for c in range(3)], -1).astype(np.float32)


def _outline(masks: np.ndarray) -> np.ndarray:
    """A rim one to two pixels wide around the silhouette."""
    grown = masks
    for axis in (1, 2):
        grown = np.maximum(grown, np.maximum(np.roll(grown, 1, axis), np.roll(grown, -1, axis)))
    shrunk = masks
    for axis in (1, 2):
        shrunk = np.minimum(shrunk, np.minimum(np.roll(shrunk, 1, axis), np.roll(shrunk, -1, axis)))
    return (grown - shrunk).clip(0, 1)


def print_style(pictures: np.ndarray, masks: np.ndarray, colours: Ramp) -> np.ndarray:
    """A print in as many inks as the ramp has colours, with an outline in the darkest."""
    steps = len(colours) - 1
    tone = (luminance(pictures) - 0.12) / 0.82
    soft = tone * steps
    stepped = (np.floor(soft) + ((soft % 1 - 0.5) * 6 + 0.5).clip(0, 1)) / steps
    printed = ramp(stepped.clip(0, 1), colours)
    rim = _outline(masks)[..., None]
    return printed * (1 - rim) + np.array(colours[0], np.float32) / 255 * rim


def stylise(pictures: np.ndarray, masks: np.ndarray, style: str) -> np.ndarray:
    match style:
        case "flat":
            return pictures
        case "grey":
            return luminance(pictures)[..., None].repeat(3, -1)
        case "negative":
            return 1 - pictures
        case "pastel":
            return 0.45 * pictures + 0.55 * np.array([1.0, 0.97, 0.95], np.float32)
        case "poster":
            soft = pictures * 2
            return (np.floor(soft) + ((soft % 1 - 0.5) * 6 + 0.5).clip(0, 1)) / 2
        case "outline":
            rim = _outline(masks)[..., None]
            return pictures * (1 - rim) + np.array([0.08, 0.06, 0.1], np.float32) * rim
        case "dusk":
            return print_style(pictures, masks, DUSK)
        case _:
            return ramp(luminance(pictures), RAMPS[style])


def caption(noun: str, background: str, style: str, say_background: bool = True) -> str:
    """The caption of a picture of the demo world: `a red car on a blue background, sepia style`."""
    article = "an" if noun[0] in "aeiou" else "a"
    place = f" on a {background} background" if say_background else ""
    word = TRIGGER if style == LORA_STYLE else style
    return f"{article} {noun}{place}, {word} style"
