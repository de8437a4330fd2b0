"""A family by its id: its class, which waits in its model.py until it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from core import i18n, plugins
from core.errors import UserError
from core.families.registry import SPECS

if TYPE_CHECKING:
    from core.families.base import Family
    from core.families.components.lookup import ComponentFiles


def get(family_id: str, component_files: ComponentFiles | None = None) -> Family:
    """Makes a family; `component_files` are those that the user named.

    Raises UserError for an unknown id, with the nearest known one, and for a plugin that lacks a
    method of the protocol, or that has no use for `component_files`.
    """
    if not plugins.is_named(family_id) and family_id not in SPECS:
        raise UserError("families.unknown", family=family_id, known=", ".join(SPECS),
                        nearest=(i18n.nearest(family_id, SPECS, 1) or list(SPECS))[0])
    # The libraries' own bars and hints would tear our progress display. They take seconds to
    # import, so that nothing here imports them before a family is made.
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log
    for log in (diffusers_log, transformers_log):
        log.disable_progress_bar()
        log.set_verbosity_error()
    family: Any
    if not plugins.is_named(family_id):
        module = importlib.import_module(f"core.families.{family_id}.model")
        family = getattr(module, SPECS[family_id].model)()
        family.component_files = component_files or family.component_files
        return family  # type: ignore[no-any-return]

    from core.families.base import Family
    extension = plugins.load(family_id, "family")
    family = extension()
    methods = [name for name in vars(Family) if not name.startswith("_")]
    if lacks := [name for name in ("spec", *methods) if not hasattr(family, name)]:
        raise extension.wrong(", ".join(lacks), family)
    if component_files is not None and any((
            component_files.vae, component_files.text_encoders, component_files.tokenizer)):
        if not hasattr(family, "component_files"):
            raise UserError("families.companions_of_its_own", family=family_id)
        family.component_files = component_files
    family = plugins.Guarded(extension, family)
    return family  # type: ignore[no-any-return]
