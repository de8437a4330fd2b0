"""The settings inside a generated picture: A1111's parameters text and ComfyUI's prompt JSON.

Only the text chunks before the pixels are read. Formats: modules/infotext_utils.py of
stable-diffusion-webui writes "prompt / Negative prompt: / Steps: 20, Sampler: ..." into the PNG
chunk `parameters`; ComfyUI writes its graph, {id: {class_type, inputs}}, into `prompt`.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from core.errors import UserError
from core.families.schedulers import SAMPLERS

Number = TypeVar("Number", int, float)

MOST_TEXT = 200_000                         # characters; longer ones are no settings of ours
MOST_NODES = 2000
_NEGATIVE = "Negative prompt:"
_FACTS = re.compile(r"\s*Steps:\s*\d+\s*(,|$)")
_PAIR = re.compile(r'\s*([A-Za-z][\w /+-]*?)\s*:\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
# ComfyUI's sampler and scheduler -> ours; a scheduler that isn't named here changes nothing.
_COMFY = {"euler": "euler", "euler_ancestral": "euler_a", "ddim": "ddim", "heun": "heun",
          "dpmpp_2m": "dpm++2m", "dpmpp_2m karras": "dpm++2m_karras",
          "dpmpp_2m_sde": "dpm++2m_sde", "uni_pc": "unipc", "uni_pc_bh2": "unipc"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a picture tells; None and "" where it says nothing or nothing that can be used."""

    prompt: str = ""                        # with its <lora:...> tags
    negative: str = ""
    seed: int | None = None
    steps: int | None = None
    cfg: float | None = None
    size: str = ""                          # "512,768"
    sampler: str = ""                       # a name of core/families/schedulers.py
    unknown_sampler: str = ""               # as the picture calls it
    model: str = ""
    clip_skip: int | None = None


def read(path: Path) -> Settings:
    """The settings in a PNG file. Raises UserError where it is no picture or holds no settings."""
    try:
        # Pillow warns of a picture's size, but its pixels are not decoded here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("PNG",)) as image:
                chunks = dict(image.info)
    except (OSError, ValueError, SyntaxError, OverflowError, Image.DecompressionBombError):
        raise UserError("tab_inference.no_picture", file=path.name) from None
    texts = {key: chunks[key] for key in ("parameters", "prompt")
             if isinstance(chunks.get(key), str)}
    if not any(len(text) > MOST_TEXT for text in texts.values()):
        if texts.get("parameters"):
            return parse(texts["parameters"])
        if texts.get("prompt"):
            return parse_comfy(texts["prompt"], path)
    raise UserError("tab_inference.no_settings", file=path.name)


# --- A1111 ---

def parse(text: str) -> Settings:
    """A1111's parameters text. Never fails: lines that are not understood count as prompt."""
    lines = text.strip().splitlines()
    facts: dict[str, str] = {}
    if lines and _FACTS.match(lines[-1]):
        for match in _PAIR.finditer(lines.pop()):
            key, value = match[1], match[2].strip()
            # values with a comma or a colon are written as JSON strings
            if value.startswith('"'):
                try:
                    value = str(json.loads(value))
                except ValueError:
                    value = value.strip('"')
            facts[key] = value
    # from the end: a prompt may hold the words "Negative prompt:" itself
    at = next((n for n in reversed(range(len(lines))) if lines[n].startswith(_NEGATIVE)),
              len(lines))
    negative = "\n".join(lines[at:]).removeprefix(_NEGATIVE).strip()
    # newer versions write the schedule apart from the sampler
    label, schedule = facts.get("Sampler", ""), facts.get("Schedule type", "")
    names = {text.casefold(): name for name, (text, _, _) in SAMPLERS.items()}
    sampler = names.get(f"{label} {schedule}".casefold()) or names.get(label.casefold(), "")
    return Settings(
        "\n".join(lines[:at]).strip(), negative, _number(int, facts.get("Seed"), 2**63 - 1),
        _number(int, facts.get("Steps"), 1000, 1), _number(float, facts.get("CFG scale"), 50.0),
        _size(facts.get("Size", "")), sampler, "" if sampler else label,
        facts.get("Model", ""), _number(int, facts.get("Clip skip"), 12, 1))


def _size(text: str) -> str:
    match = re.fullmatch(r"\s*(\d{1,5})\s*x\s*(\d{1,5})\s*", text)
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    return f"{sides[0]},{sides[1]}" if all(8 <= side <= 16384 for side in sides) else ""


def _number(kind: Callable[[Any], Number], value: Any, most: Number, least: int = 0
            ) -> Number | None:
    """A number from `least` to `most`; None for all else, NaN too."""
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if least <= number <= most else None


# --- ComfyUI ---

def parse_comfy(text: str, path: Path) -> Settings:
    """ComfyUI's graph, of which the first sampler and plain text nodes are understood. Raises
    UserError for other graphs."""
    try:
        graph = json.loads(text)
    except (ValueError, RecursionError):
        graph = None
    if not isinstance(graph, dict) or len(graph) > MOST_NODES:
        raise UserError("tab_inference.no_settings", file=path.name)
    nodes = {str(key): node for key, node in graph.items() if isinstance(node, dict)
             and isinstance(node.get("inputs"), dict)}
    samplers = [node["inputs"] for node in nodes.values()
                if {"positive", "steps", "cfg"} <= node["inputs"].keys()]
    if not samplers:
        raise UserError("tab_inference.other_graph", file=path.name)
    main = samplers[0]
    name, schedule = (str(main.get(key, "")) for key in ("sampler_name", "scheduler"))
    sampler = _COMFY.get(f"{name} {schedule}") or _COMFY.get(name, "")
    latent = _node(nodes, main.get("latent_image"))
    size = _size(f"{latent.get('width', 0)}x{latent.get('height', 0)}")
    tags = "".join(f" <lora:{stem}:{weight:g}>" for stem, weight in _loras(nodes, main))
    seed = _value(nodes, main.get("seed", main.get("noise_seed")))
    return Settings(
        (_text(nodes, main.get("positive")) + tags).strip(),
        _text(nodes, main.get("negative")), _number(int, seed, 2**63 - 1),
        _number(int, _value(nodes, main.get("steps")), 1000, 1),
        _number(float, _value(nodes, main.get("cfg")), 50.0),
        size, sampler, "" if sampler else name,
        next((str(file) for node in nodes.values()
              if isinstance(file := node["inputs"].get("ckpt_name"), str)), ""),
        # ComfyUI counts layers from the end: -2 is a clip skip of 2
        _number(int, next((-layer for node in nodes.values() if isinstance(
            layer := node["inputs"].get("stop_at_clip_layer"), int)), None), 12, 1))


def _node(nodes: Mapping[str, Any], link: Any) -> dict[str, Any]:
    """The inputs of the node that a link [id, output] names."""
    match link:
        case [key, *_] if str(key) in nodes:
            inputs: dict[str, Any] = nodes[str(key)]["inputs"]
            return inputs
    return {}


def _chain(nodes: Mapping[str, Any], link: Any, through: tuple[str, ...]
           ) -> Iterator[dict[str, Any]]:
    """Nodes one behind the other, by the first of the inputs `through` that is a link."""
    # not `while`: a graph may be a circle
    for _ in range(len(nodes)):
        inputs = _node(nodes, link)
        if not inputs:
            return
        yield inputs
        link = next((inputs[name] for name in through if isinstance(inputs.get(name), list)), None)


def _text(nodes: Mapping[str, Any], link: Any) -> str:
    for inputs in _chain(nodes, link, ("text", "conditioning", "conditioning_1", "string")):
        for name in ("text", "string", "value"):
            if isinstance(text := inputs.get(name), str):
                return text
    return ""


def _value(nodes: Mapping[str, Any], value: Any) -> Any:
    return _node(nodes, value).get("value") if isinstance(value, list) else value


def _loras(nodes: Mapping[str, Any], main: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(file name without suffix, weight) of the loaders before the sampler, the first first."""
    loras = []
    for inputs in _chain(nodes, main.get("model"), ("model",)):
        name: Any = inputs.get("lora_name")
        strength: Any = inputs.get("strength_model")
        size = _number(float, abs(strength), 50.0) if isinstance(strength, int | float) else None
        if isinstance(name, str) and size is not None:
            stem = re.sub(r"\.safetensors$", "", re.split(r"[\\/]", name)[-1])
            # a colon would end the name in a <lora:...> tag
            loras.append((stem.replace(":", "_"), math.copysign(size, strength)))
    # the walk goes from the sampler back to the base
    return loras[::-1]
