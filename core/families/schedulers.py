"""Samplers by the names that users know from A1111 and ComfyUI, as diffusers schedulers.

The window shows the table too, so that diffusers is imported only where a scheduler is made.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from core import i18n
from core.errors import UserError

if TYPE_CHECKING:
    from core.families.base import Parts

DPM = "DPMSolverMultistepScheduler"
# name -> (label in A1111, diffusers class, options)
SAMPLERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddim": ("DDIM", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": ("Euler", "EulerDiscreteScheduler", {}),
    "euler_a": ("Euler a", "EulerAncestralDiscreteScheduler", {}),
    "heun": ("Heun", "HeunDiscreteScheduler", {}),
    "dpm++2m": ("DPM++ 2M", DPM, {}),
    "dpm++2m_karras": ("DPM++ 2M Karras", DPM, {"use_karras_sigmas": True}),
    "dpm++2m_sde": ("DPM++ 2M SDE", DPM, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPC", "UniPCMultistepScheduler", {}),
    "pndm": ("PLMS", "PNDMScheduler", {"skip_prk_steps": True}),
}
# Where a base's own sampler is unknown, or PNDM.
FALLBACK = "dpm++2m"
# For bases that learn a flow; all but the first only where it is the base's own.
FLOW = {"euler": "FlowMatchEulerDiscreteScheduler", "dpm++2m": DPM}


def create(name: str, parts: Parts) -> Any:
    """Makes a scheduler with the base's noise schedule.

    "auto" is the base's own sampler, except that DPM++ 2M takes the place of PNDM, the old default.
    Raises UserError for a name that is unknown, or of no use to this base.
    """
    own_class = parts.scheduler.get("_class_name", "")
    config = {k: v for k, v in parts.scheduler.items() if not k.startswith("_")}
    if parts.flow is not None:
        known = {n: cls for n, cls in FLOW.items() if n == "euler" or cls == own_class}
        name = [*known][-1] if name == "auto" else name
        if name not in known:
            code = "generate.not_for_flow" if name in SAMPLERS else "generate.unknown_sampler"
            raise UserError(code, name=name, known=", ".join(known), nearest="euler")
        class_name, options = FLOW[name], dict[str, Any]()
        # diffusers asks scipy for these steps; without it they are evenly spaced.
        if config.get("use_beta_sigmas") and not find_spec("scipy"):
            config["use_beta_sigmas"] = False
    else:
        if name == "auto":
            name = next((n for n, (_, cls, _) in SAMPLERS.items()
                         if cls == own_class and n != "pndm"), FALLBACK)
        if name not in SAMPLERS:
            raise UserError("generate.unknown_sampler", name=name, known=", ".join(SAMPLERS),
                            nearest=(i18n.nearest(name, SAMPLERS, 1) or [FALLBACK])[0])
        _, class_name, options = SAMPLERS[name]
        config["prediction_type"] = parts.objective
        # Few steps must begin at pure noise.
        if parts.distilled:
            config["timestep_spacing"] = "trailing"
    import diffusers
    return getattr(diffusers, class_name).from_config(config, **options)


def label(scheduler: Any) -> str:
    """The A1111 name of a scheduler, for the parameters inside a PNG."""
    cls: str = type(scheduler).__name__
    if cls == FLOW["euler"]:
        return "Euler"
    matches = [(text, options) for text, name, options in SAMPLERS.values() if name == cls]
    # Of one class's samplers those with the most particular options stand last.
    for text, options in reversed(matches):
        if all(scheduler.config.get(k) == v for k, v in options.items()):
            return str(text)
    return matches[0][0] if matches else cls
