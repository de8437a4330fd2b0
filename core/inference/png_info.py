"""The settings inside a generated picture, by any program that writes them.

A1111, Forge, SD.Next and Civitai: "prompt / Negative prompt: / Steps: 20, Sampler: ...", in a PNG's
text `parameters`, in other formats as the EXIF user comment. ComfyUI: its graph as JSON, read in
comfy_graph.py. SwarmUI, Fooocus, InvokeAI, NovelAI, Draw Things: JSON with a key a setting. Only
what stands before the pixels is read.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from core import text_encoding
from core.errors import UserError
from core.families.schedulers import SAMPLERS
from core.inference import comfy_graph
from core.serialization import from_json

Number = TypeVar("Number", int, float)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MOST_TEXT = 200_000                         # characters; longer ones are no settings of ours
_NEGATIVE = "Negative prompt:"
_FACTS = re.compile(r"\s*Steps:\s*\d+\s*(,|$)")
_FACT = re.compile(r"(?:^|,)\s*(?:Steps|Sampler|CFG scale|Seed|Size|Model):", re.IGNORECASE)
_PAIR = re.compile(r'\s*([A-Za-z][\w /+-]*?)\s*:\s*("(?:[^"\\]|\\.)*"|[^,\n]*)(?:,|\n|$)')
# Whole or torn, it is never taken for a prompt.
_LIKE_JSON = re.compile(r'\s*[{\[]\s*["{\[}\]]')
# What changes a picture and can't be set here, by the beginnings of A1111's keys.
_BEYOND = ("hires ", "denoising", "controlnet", "adetailer", "refiner", "variation seed",
           "ensd", "tiled diffusion", "regional prompter", "rp active", "ti hashes",
           "used embeddings", "civitai resources")
# PNG texts that hold settings, the most telling first; EXIF tags that do.
_TEXTS = ("parameters", "invokeai_metadata", "sd-metadata", "prompt", "comment")
_EXIF = (0x9286, 0x010E, 0x0110, 0x010F)    # user comment, description, model, make
# ComfyUI's sampler and scheduler -> ours; a scheduler that isn't named here changes nothing.
_COMFY = {"euler": "euler", "euler_ancestral": "euler_a", "euler_a": "euler_a", "ddim": "ddim",
          "heun": "heun", "dpmpp_2m": "dpm++2m", "dpmpp_2m karras": "dpm++2m_karras",
          "dpmpp_2m_sde": "dpm++2m_sde", "uni_pc": "unipc", "uni_pc_bh2": "unipc",
          "unipc": "unipc"}
# Our fields -> the keys of programs that write JSON, in small letters without signs.
_KEYS = {"prompt": ("positiveprompt", "prompt", "c"),
         "negative": ("negativeprompt", "uc"), "seed": ("seed", "noiseseed"),
         "steps": ("steps", "numinferencesteps"),
         "cfg": ("cfgscale", "guidancescale", "cfg", "scale"),
         "size": ("size", "resolution"), "sampler": ("sampler", "samplername", "scheduler"),
         "schedule": ("scheduler", "noiseschedule"), "model": ("model", "basemodel"),
         "clip_skip": ("clipskip",)}
# Keys that hold the settings one level deeper: SwarmUI's, and InvokeAI's before its third version.
_WITHIN = ("sui_image_params", "image")


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
    beyond: tuple[str, ...] = ()            # what else made the picture, as it calls them

    @property
    def not_told(self) -> list[str]:
        """The fields that the picture should tell, and doesn't."""
        return [name for name in ("prompt", "seed", "steps", "cfg", "size", "sampler")
                if getattr(self, name) in (None, "")
                and not (name == "sampler" and self.unknown_sampler)]


def read(path: Path) -> Settings:
    """The settings in a picture. Raises UserError where it is none or holds no settings."""
    texts = {key: text for key, text in _texts(path).items() if len(text) <= MOST_TEXT}
    fault = UserError("tab_inference.no_settings", file=path.name)
    for text in texts.values():
        data = _json(text)
        try:
            if isinstance(data, dict):
                return _of_json(data, path)
            if _facts_at(text.splitlines()) is not None:
                return parse(text)
        except UserError as error:
            # a graph that isn't understood tells more than "no settings"
            fault = max(fault, error, key=lambda one: one.code == "tab_inference.other_graph")
    # a prompt alone; and programs that write a PNG text for each setting
    alone = {key: text for key, text in texts.items() if not _LIKE_JSON.match(text)}
    if "parameters" in alone:
        return parse(alone["parameters"])
    if {"prompt", "seed"} <= alone.keys():
        return _of_keys(alone)
    raise fault


def _texts(path: Path) -> dict[str, str]:
    """The texts in a file, by name, the most telling first."""
    try:
        # Pillow warns of a picture's size, but its pixels are not decoded here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                info = {str(key).lower(): value for key, value in image.info.items()}
    except (OSError, ValueError, SyntaxError, OverflowError, Image.DecompressionBombError):
        raise UserError("tab_inference.no_picture", file=path.name) from None
    texts = {key: text for key in (*_TEXTS, *info) if (text := _decoded(info.get(key)))
             and key not in ("exif", "icc_profile")}
    exif = Image.Exif()
    with contextlib.suppress(Exception):    # its reader raises nearly anything for damaged ones
        exif.load(info.get("exif") or b"")
        for values in (exif.get_ifd(0x8769), exif):
            # ComfyUI writes "prompt:" before its JSON
            texts |= {f"exif {tag}": re.sub(r"^(prompt|workflow):(?=\{)", "", text, flags=re.I)
                      for tag in _EXIF if (text := _decoded(values.get(tag)))}
    return texts


def _decoded(value: Any) -> str:
    """A text of a file; EXIF user comments begin with eight bytes that name their encoding."""
    if isinstance(value, bytes) and value.startswith(b"UNICODE\0"):
        # Programs disagree about the order of the bytes: settings are mostly ASCII.
        return max((value[8:].decode(f"utf-16-{order}", "replace") for order in ("be", "le")),
                   key=lambda text: sum(map(str.isascii, text))).strip("\ufeff\0")
    if isinstance(value, bytes):
        with contextlib.suppress(ValueError):
            return text_encoding.read(value.removeprefix(b"ASCII\0\0\0")).text.strip("\0 ")
    with contextlib.suppress(UnicodeError):
        # some write UTF-8 where PNG's plain texts are Latin-1
        value = value.encode("latin-1").decode() if isinstance(value, str) else ""
    return value if isinstance(value, str) else ""


def _json(text: str) -> Any:
    """The value of a JSON text; the text itself where it is none."""
    try:
        return from_json(text) if text.lstrip()[:1] in ("{", "[") else text
    except ValueError:
        return text


# --- A1111 ---

def _facts_at(lines: list[str]) -> int | None:
    """The number of the line of settings, after which extensions may have put others."""
    found = [n for n, line in enumerate(lines)
             if _FACTS.match(line) or len(_FACT.findall(line)) >= 3]
    return found[-1] if found else None


def parse(text: str) -> Settings:
    """A1111's parameters text. Never fails: lines that are not understood count as prompt."""
    lines = text.strip().splitlines()
    facts: dict[str, str] = {}
    if (at := _facts_at(lines)) is not None:
        for match in _PAIR.finditer("\n".join(lines[at:])):
            value = match[2].strip()
            # values with a comma or a colon are written as JSON strings
            if value.startswith('"'):
                try:
                    value = str(json.loads(value))
                except ValueError:
                    value = value.strip('"')
            # lines of extensions may repeat a key for a template
            facts.setdefault(match[1].lower(), value)
        lines = lines[:at]
    # from the end: a prompt may hold the words "Negative prompt:" itself
    at = next((n for n in reversed(range(len(lines))) if lines[n].startswith(_NEGATIVE)),
              len(lines))
    negative = "\n".join(lines[at:]).removeprefix(_NEGATIVE).strip()
    # newer versions write the schedule apart from the sampler
    label, schedule = facts.get("sampler", ""), facts.get("schedule type", "")
    beyond = dict.fromkeys(key for key in facts if key.startswith(_BEYOND))
    return Settings(
        "\n".join(lines[:at]).strip(), negative, _number(int, facts.get("seed"), 2**63 - 1),
        _number(int, facts.get("steps"), 1000, 1),
        # Flux has guidance of its own, which Forge writes beside an idle CFG
        _number(float, facts.get("distilled cfg scale", facts.get("cfg scale")), 50.0),
        _size(facts.get("size", "")), *_sampler(label, schedule),
        facts.get("model", ""), _number(int, facts.get("clip skip"), 12, 1), tuple(beyond))


def _sampler(name: str, schedule: str) -> tuple[str, str]:
    """Our name of a sampler, and what it is called where we have none."""
    labels = {label.casefold(): ours for ours, (label, _, _) in SAMPLERS.items()}
    plain = re.sub(r"^k_|_gpu$", "", name.casefold())
    # InvokeAI writes Karras' schedule as _k
    if plain.endswith("_k"):
        plain, schedule = plain.removesuffix("_k"), "karras"
    names = labels | _COMFY
    found = names.get(f"{plain} {schedule}".casefold()) or names.get(plain, "")
    return found, "" if found else name


def _size(text: str) -> str:
    match = re.fullmatch(r"[(\s]*(\d{1,5})\s*[x×*,]\s*(\d{1,5})[)\s]*", text)
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


# --- JSON ---

def _of_json(data: dict[str, Any], path: Path) -> Settings:
    if any(isinstance(node, dict) and "class_type" in node for node in data.values()):
        return parse_comfy(data, path)
    for key in _WITHIN:
        if isinstance(inner := data.get(key), dict):
            data = data | inner
    settings = _of_keys(data)
    if len(settings.not_told) > 4:
        raise UserError("tab_inference.no_settings", file=path.name)
    return settings


def _of_keys(data: Mapping[str, Any]) -> Settings:
    """Settings from a mapping with a key for each."""
    flat = {re.sub(r"[\W_]", "", key).lower(): value for key, value in data.items()}

    def value(field: str) -> Any:
        return next((flat[key] for key in _KEYS[field] if flat.get(key) not in (None, "")), "")

    def text(field: str) -> str:
        # InvokeAI wrote lists of texts, and names its model in a mapping
        found = value(field)
        found = found[0] if isinstance(found, list) and found else found
        found = next((found[key] for key in ("prompt", "name", "model_name") if key in found),
                     "") if isinstance(found, dict) else found
        return found if isinstance(found, str) else ""
    sides = f"{flat.get('width', '')}x{flat.get('height', '')}"
    return Settings(
        (text("prompt") + _tags(_listed_loras(flat))).strip(), text("negative"),
        _number(int, value("seed"), 2**63 - 1), _number(int, value("steps"), 1000, 1),
        _number(float, value("cfg"), 50.0), _size(sides) or _size(str(value("size"))),
        *_sampler(text("sampler"), text("schedule")), text("model"),
        _number(int, value("clip_skip"), 12, 1))


def _listed_loras(flat: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    listed, weights = flat.get("loras", flat.get("lora")), flat.get("loraweights")
    for number, item in enumerate(listed if isinstance(listed, list) else ()):
        match item:
            case str(name) if isinstance(weights, list) and number < len(weights):
                yield name, weights[number]
            case [str(name), weight, *_]:
                yield name, weight
            case {"weight": weight, "model": str(name)}:
                yield name, weight
            case {"weight": weight, "model": dict(one)} | {"weight": weight, "lora": dict(one)}:
                yield str(one.get("name", one.get("model_name", ""))), weight


def _tags(loras: Iterator[tuple[str, Any]]) -> str:
    """The <lora:...> tags of files and their weights."""
    tags = ""
    for file, weight in loras:
        size = _number(float, str(weight).lstrip("-"), 50.0)
        stem = re.sub(r"\.(safetensors|ckpt|pt)$", "", re.split(r"[\\/]", file)[-1])
        if stem and size is not None:
            # a colon would end the name in a tag
            sign = math.copysign(size, -1 if str(weight).startswith("-") else 1)
            tags += f" <lora:{stem.replace(':', '_')}:{sign:g}>"
    return tags


def parse_comfy(graph: Mapping[str, Any], path: Path) -> Settings:
    """ComfyUI's graph. Raises UserError for one without a sampler."""
    if (drawn := comfy_graph.drawn(graph)) is None:
        raise UserError("tab_inference.other_graph", file=path.name)
    given, beyond = drawn
    return replace(_of_keys(given), beyond=beyond)
