"""The built-in families by id: what is known of each without loading it. Needs no torch."""

from __future__ import annotations

import importlib

from core.families.layer_names import Naming
from core.families.spec import FamilySpec

CHUNK = 75                                  # tokens of CLIP's text, between start and end
# The order in which they are listed: as they came out.
IDS = ("sd15", "sd2", "sdxl", "sd3", "flux", "chroma", "zimage", "qwen", "flux2", "krea2",
       "lumina2", "sana")
SPECS: dict[str, FamilySpec] = {
    name: importlib.import_module(f"core.families.{name}.spec").SPEC for name in IDS}
# Its sizes and names stand in where nothing is known of a base.
STANDARD = SPECS[IDS[0]]


def naming(family_id: str) -> Naming:
    """How a family's layers are called. A plugin's family is taken for a UNet."""
    return (SPECS.get(family_id) or STANDARD).naming


def chunks_of(family_id: str, tokens: int, max_tokens: int) -> int:
    """In how many chunks a family reads a text of so many tokens. A plugin's is taken to read in
    chunks."""
    chunked = family_id not in SPECS or SPECS[family_id].chunked
    return max(1, -(-min(tokens, max_tokens) // CHUNK)) if chunked else 1


def token_limit(family_id: str, max_tokens: int = 225) -> int:
    """How many tokens of a caption a family reads, with the config's `max_tokens`."""
    return (SPECS[family_id].tokens if family_id in SPECS else 0) or max_tokens


def outgrows_fp16(family_id: str) -> bool:
    """Whether the family's activations are larger than fp16's numbers."""
    return family_id in SPECS and not SPECS[family_id].fp16
