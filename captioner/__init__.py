"""Captions for pictures: registry of captioners; listing them imports no torch."""

from __future__ import annotations

import importlib

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
    """The captioner's class. Raises Fault("captioner.unknown") for another name."""
    if name not in REGISTRY:
        raise Fault("captioner.unknown", name=name, known=", ".join(REGISTRY))
    module, _, attribute = REGISTRY[name].partition(":")
    found: type[Captioner] = getattr(importlib.import_module(module), attribute)
    return found
