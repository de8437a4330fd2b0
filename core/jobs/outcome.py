"""What must be said before all else at the end of a run, in the terminal and in the window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def said_first(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The warnings about a result: each is the key of a sentence and its parameters. Empty where
    all went well."""
    warnings: list[tuple[str, Mapping[str, Any]]] = []
    proof, nothing = result.get("proof"), result.get("nothing")
    if isinstance(proof, Mapping) and proof.get("ok") is False:
        key = "engine.not_proven" if "reason" in proof else "engine.proof_failed"
        warnings.append((key, proof))
    if isinstance(nothing, Mapping):
        warnings.append(("engine.nothing_trained", nothing))
    if isinstance(proof, Mapping) and proof.get("faint"):
        warnings.append(("engine.faint", proof))
    return warnings
