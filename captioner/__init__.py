"""Captions for pictures. The registry of captioners, which imports no torch."""

from __future__ import annotations

import importlib
from typing import cast

from captioner.base import Captioner
from core.errors import UserError

REGISTRY = {"clip": "captioner.models.clip:ClipTagger", "blip": "captioner.models.blip:Blip",
            "wd": "captioner.models.wd:WdTagger", "florence": "captioner.models.florence:Florence",
            "endpoint": "captioner.models.endpoint:Endpoint"}


def get(name: str) -> type[Captioner]:
    """The captioner's class: a name of the registry, or "module:Class".

    Raises UserError("captioner.unknown") for another name.
    """
    module, colon, attribute = REGISTRY.get(name, name).partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute) if colon else None
    except (ImportError, AttributeError, ValueError):
        # Our own captioner that can't be imported is a broken environment, not a wrong name.
        if name in REGISTRY:
            raise
        cls = None
    if not hasattr(cls, "describe"):
        raise UserError("captioner.unknown", name=name, known=", ".join(REGISTRY))
    return cast("type[Captioner]", cls)
