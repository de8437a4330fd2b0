"""The model families by id. Strings only: listing families imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from core import words
from core.faults import Fault

if TYPE_CHECKING:
    from core.families.base import Family

MODULES = {
    "sd15": "core.families.sd15:StableDiffusion1",
}


def get(family_id: str) -> Family:
    """Raises Fault `families.unknown` with the nearest known id."""
    if family_id not in MODULES:
        close = words.nearest(family_id, MODULES, 1)
        raise Fault("families.unknown", family=family_id, known=", ".join(MODULES),
                    nearest=close[0] if close else next(iter(MODULES)))
    module, name = MODULES[family_id].split(":")
    family: Family = getattr(importlib.import_module(module), name)()
    return family
