"""Captions for pictures: registry of captioners; listing them imports no torch."""

from __future__ import annotations

import importlib
from typing import cast

from captioner.base import Captioner
from core.faults import Fault

REGISTRY = {
    "clip": "captioner.clip:ClipTagger",
    "blip": "captioner.blip:Blip",
    "wd": "captioner.wd:WdTagger",
    "florence": "captioner.florence:Florence",
    "endpoint": "captioner.endpoint:Endpoint",
}


def get(name: str) -> type[Captioner]:
    """The captioner's class, of the registry or as "module:Class".

    Raises Fault("captioner.unknown") for another name.
    """
    module, colon, attribute = REGISTRY.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute) if colon else None
    except (ImportError, AttributeError, ValueError):
        if name in REGISTRY:
            raise
        found = None
    if not hasattr(found, "describe"):
        raise Fault("captioner.unknown", name=name, known=", ".join(REGISTRY))
    return cast("type[Captioner]", found)
