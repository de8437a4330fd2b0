"""Captions for pictures: registry of captioners; listing them imports no torch."""

from __future__ import annotations

import importlib
from typing import cast

from captioner.base import Captioner
from core.errors import UserError

REGISTRY = {
    "clip": "captioner.models.clip:ClipTagger",
    "blip": "captioner.models.blip:Blip",
    "wd": "captioner.models.wd:WdTagger",
    "florence": "captioner.models.florence:Florence",
    "endpoint": "captioner.models.endpoint:Endpoint",
}


def get(name: str) -> type[Captioner]:
    """The captioner's class, of the registry or as "module:Class".

    Raises UserError("captioner.unknown") for another name.
    """
    module, colon, attribute = REGISTRY.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute) if colon else None
    except (ImportError, AttributeError, ValueError):
        if name in REGISTRY:
            raise
        found = None
    if not hasattr(found, "describe"):
        raise UserError("captioner.unknown", name=name, known=", ".join(REGISTRY))
    return cast("type[Captioner]", found)
