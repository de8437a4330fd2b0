"""The model families by id. Strings only: listing families imports no torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core import i18n, plugins
from core.errors import Fault, Fix

if TYPE_CHECKING:
    from core.families.base import Family
    from core.families.components import Chosen


CHUNK = 75                                  # tokens of CLIP's text, between start and end


@dataclass(frozen=True, slots=True)
class Listed:
    """A family as far as it is known without loading it."""

    module: str
    title: str
    native_size: int                        # px a side
    # What a single file of it holds: everything, the denoiser with other parts beside it, none.
    file: Literal["whole", "denoiser", "none"]
    tokens: int = 0                         # of a caption that it reads; 0: as max_tokens says
    step: int = 64                          # px; sides of buckets at the native size
    # Whether its numbers stay within fp16's 65504; ComfyUI computes the others in bf16 or fp32.
    fp16: bool = True

    @property
    def chunked(self) -> bool:
        """Whether it reads long texts in chunks of CLIP's 75 tokens, as FamilySpec says too."""
        return not self.tokens


MODULES = {
    "sd15": Listed("core.families.sd15.model:StableDiffusion1", "Stable Diffusion 1.x", 512, "whole"),
    "sd2": Listed("core.families.sd2.model:StableDiffusion2", "Stable Diffusion 2.x", 768, "whole"),
    "sdxl": Listed("core.families.sdxl.model:StableDiffusionXL", "Stable Diffusion XL", 1024, "whole"),
    "sd3": Listed("core.families.sd3.model:StableDiffusion3", "Stable Diffusion 3 / 3.5", 1024,
                  "denoiser", 255),
    "flux": Listed("core.families.flux.model:Flux1", "Flux.1", 1024, "denoiser", 511),
    "chroma": Listed("core.families.chroma.model:Chroma", "Chroma", 1024, "denoiser", 511),
    "zimage": Listed("core.families.zimage.model:ZImage", "Z-Image", 1024, "denoiser", 500,
                     fp16=False),
    "qwen": Listed("core.families.qwen.model:QwenImage", "Qwen-Image", 1024, "denoiser", 507,
                   fp16=False),
    "flux2": Listed("core.families.flux2.model:Flux2", "Flux.2 klein", 1024, "denoiser", 500),
    "krea2": Listed("core.families.krea2.model:Krea2", "Krea 2", 1024, "denoiser", 507),
    "lumina2": Listed("core.families.lumina2.model:Lumina2", "Lumina 2", 1024, "denoiser", 220,
                      fp16=False),
    "sana": Listed("core.families.sana.model:Sana", "Sana", 1024, "denoiser", 299, 32),
}


def chunks_of(family_id: str, tokens: int, max_tokens: int) -> int:
    """In how many chunks a text of so many tokens is read; of one's own as if in chunks."""
    chunked = family_id not in MODULES or MODULES[family_id].chunked
    return max(1, -(-min(tokens, max_tokens) // CHUNK)) if chunked else 1


def token_limit(family_id: str, max_tokens: int = 225) -> int:
    """Tokens of a caption that a family reads; of one's own as if in chunks."""
    return (MODULES[family_id].tokens if family_id in MODULES else 0) or max_tokens


def get(family_id: str, chosen: Chosen | None = None) -> Family:
    """`chosen`: companions that the user named. Raises Fault `families.unknown` with the nearest
    known id."""
    if plugins.is_named(family_id):
        return _own(family_id, chosen)
    if family_id not in MODULES:
        close = i18n.nearest(family_id, MODULES, 1)
        raise Fault("families.unknown", family=family_id, known=", ".join(MODULES),
                    nearest=close[0] if close else next(iter(MODULES)))
    _quiet()
    module, name = MODULES[family_id].module.split(":")
    family: Any = getattr(importlib.import_module(module), name)()
    family.chosen = chosen or family.chosen
    return family  # type: ignore[no-any-return]


def outgrows_fp16(family_id: str) -> bool:
    return family_id in MODULES and not MODULES[family_id].fp16


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
            raise Fault("families.companions_of_its_own", family=name)
        made.chosen = chosen
    guarded: Any = plugins.Guarded(extension, made)
    return guarded  # type: ignore[no-any-return]


def detect(source: Path) -> str:
    """The family of a base, told from what it is. Raises Fault, with what it is instead, where no
    LoRA can be trained on it, and where nothing is there."""
    from core.families.detection import identify
    found = identify(source)
    if found.plain and found.plain.family in MODULES:
        raise Fault("families.by_name", path=source, found=found.said(),
                    plain=found.plain.said(), family=found.plain.family,
                    fixes=[Fix("fixes.family_anyway", {"family": found.plain.family})])
    if found.family not in MODULES:
        raise Fault("families.not_a_base", path=source, found=found.said(),
                    known=", ".join(one.title for one in MODULES.values()))
    return found.family


def _quiet() -> None:
    """The libraries' own bars and hints would tear our progress display."""
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log
    for log in (diffusers_log, transformers_log):
        log.disable_progress_bar()
        log.set_verbosity_error()
