"""Which of a server's models can see: what the server says of it, else what their names say.

Asked are the list of models itself (OpenRouter's and Mistral's have it), LM Studio's and Ollama's
own routes. Sources: the API references of OpenRouter, Mistral, LM Studio, Ollama and llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from core.errors import UserError

# A route below the server's address, and a request's body -> the answer.
Ask = Callable[[str, "dict[str, Any] | None"], "dict[str, Any]"]

VISION_MODELS = re.compile(
    r"vl\b|vlm|vision|visual|llava|moondream|minicpm-?[vo]|gemma-?3n?(?![:-](?:1b|270m))\b|gemma-?[4-9]|pixtral|intern"
    r"vl|joycaption|idefics|smolvlm|florence|molmo|cogvlm|cogagent|paligemma|multimodal|\bovis|keye|"
    r"qwen-?3\.[5-9]|qwen-?[4-9]|qwen[\d.]*-?omni|qvq|llama-?4|mistral-(?:small-?3\.[1-9]|small-?25|"
    r"medium|large-?3)|magistral-.*2509|ministral-?3|glm-?\d[\d.]*v|kimi-k2\.5|gpt-4o|gpt-4\.[15]|"
    r"gpt-4-turbo|gpt-[5-9]|\bo[134]\b(?!-mini|-preview)|o4-mini|claude|gemini|grok-?[4-9]|"
    r"nova-(?:lite|pro|premier)|doubao-seed", re.IGNORECASE)
# They read or draw, but don't describe.
OTHER_MODELS = re.compile(
    r"embed|bge-|rerank|whisper|tts\b|nomic|all-minilm|dall-e|stable-?diffusion|sdxl|\bflux|imagen|"
    r"gpt-image|moderation|audio|realtime|transcribe|\bguard|image-(?:gen|edit|preview)",
    re.IGNORECASE)


def rows_of(listed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a list of models by their names; servers say `data` or `models`."""
    rows: dict[str, dict[str, Any]] = {}
    for key in ("data", "models"):
        listing = listed.get(key)
        for row in listing if isinstance(listing, list) else ():
            if isinstance(row, dict) and (name := row.get("id") or row.get("key")
                                          or row.get("model") or row.get("name")):
                rows[str(name)] = rows.get(str(name), {}) | row
    return rows


def sees(row: dict[str, Any]) -> bool | None:
    """What a server's own words say of a model; None where they say nothing of pictures."""
    architecture = row.get("architecture")
    places = [architecture, row] if isinstance(architecture, dict) else [row]
    for place in places:
        for key in ("input_modalities", "supported_input_modalities", "modalities", "capabilities",
                    "modality"):
            match place.get(key):
                case str(words):
                    return "image" in words.partition("->")[0]
                case [_, *_] as words:
                    return bool({"image", "vision", "multimodal"} & set(map(str, words)))
                case {"vision": bool(said)}:
                    return said
    for key in ("supports_vision", "supports_image_in", "vision"):
        if isinstance(row.get(key), bool):
            return bool(row[key])
    # LM Studio's words.
    return {"vlm": True, "llm": False, "embeddings": False}.get(str(row.get("type")))


def seeing(rows: dict[str, dict[str, Any]], names: Iterable[str], ask: Ask) -> dict[str, bool]:
    """Which of the names see, as far as the server says so. `ask` goes to the server's root."""
    known = {name: said for name in names if (said := sees(rows.get(name, {}))) is not None}
    if known:
        return known
    studio = rows_of(_told(ask, "api/v0/models"))
    # One that is loaded needn't be.
    names = sorted(names, key=lambda name: studio.get(name, {}).get("state") != "loaded")
    known = {name: said for name in names if (said := sees(studio.get(name, {}))) is not None}
    for name in () if known else names:
        # No Ollama: then its others needn't be asked.
        if not (row := _told(ask, "api/show", {"model": name})):
            break
        if (said := sees(row)) is not None:
            known[name] = said
    return known


def _told(ask: Ask, route: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Most servers don't have these routes."""
    try:
        return ask(route, body)
    except UserError:
        return {}


def by_name(names: Iterable[str]) -> list[str]:
    """First the models whose names say that they see, then the others that may."""
    chat = [name for name in names if not OTHER_MODELS.search(name)]
    return sorted(chat, key=lambda name: VISION_MODELS.search(name) is None)
