"""A family by its id: its class, which waits in its model.py until it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from core import i18n, plugins
from core.errors import UserError
from core.families.registry import SPECS

if TYPE_CHECKING:
    from core.families.base import Family
    from core.families.components.lookup import Chosen


def get(family_id: str, chosen: Chosen | None = None) -> Family:
    """`chosen`: companions that the user named. Raises UserError `families.unknown` with the
    nearest known id."""
    if plugins.is_named(family_id):
        return _own(family_id, chosen)
    if family_id not in SPECS:
        close = i18n.nearest(family_id, SPECS, 1)
        raise UserError("families.unknown", family=family_id, known=", ".join(SPECS),
                        nearest=close[0] if close else next(iter(SPECS)))
    _quiet()
    module = importlib.import_module(f"core.families.{family_id}.model")
    family: Any = getattr(module, SPECS[family_id].model)()
    family.chosen = chosen or family.chosen
    return family  # type: ignore[no-any-return]


def _own(name: str, chosen: Chosen | None) -> Family:
    """A class of the user's own, all methods of the protocol there."""
    from core.families.base import Family
    _quiet()
    extension = plugins.load(name, "family")
    made = extension()
    wanted = [word for word in vars(Family) if not word.startswith("_")]
    if lacks := [word for word in ("spec", *wanted) if not hasattr(made, word)]:
        raise extension.wrong(", ".join(lacks), made)
    if chosen is not None and any((chosen.vae, chosen.text_encoders, chosen.tokenizer)):
        if not hasattr(made, "chosen"):
            raise UserError("families.companions_of_its_own", family=name)
        made.chosen = chosen
    guarded: Any = plugins.Guarded(extension, made)
    return guarded  # type: ignore[no-any-return]


def _quiet() -> None:
    """The libraries' own bars and hints would tear our progress display."""
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log
    for log in (diffusers_log, transformers_log):
        log.disable_progress_bar()
        log.set_verbosity_error()
