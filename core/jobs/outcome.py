"""What must be said before all else at the end of a run, in the terminal and in the window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def said_first(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """A sentence's key and its values for each; none where all went well."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    proof, nothing = result.get("proof"), result.get("nothing")
    if isinstance(proof, Mapping) and proof.get("ok") is False:
        found.append(("engine.not_proven" if "reason" in proof else "engine.proof_failed", proof))
    if isinstance(nothing, Mapping):
        found.append(("engine.nothing_trained", nothing))
    if isinstance(proof, Mapping) and proof.get("faint"):
        found.append(("engine.faint", proof))
    return found
