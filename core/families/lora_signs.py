"""Which program wrote a LoRA file, and for which family, told from its keys and shapes.

Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from core.families.registry import SPECS
from core.safetensors_header import TensorInfo

# A file is of the first format whose pattern is found in one of its keys.
FORMATS = tuple((name, re.compile(pattern)) for name, pattern in (
    ("lycoris-loha", r"\.hada_w1_[ab]$"),
    ("lycoris-lokr", r"\.lokr_w[12](_[ab])?$"),
    ("lycoris-oft", r"\.oft_(blocks|diag)$"),
    ("lycoris-dora", r"\.dora_scale$|lora_magnitude_vector"),
    ("onetrainer", r"^lora_(transformer|prior|decoder)_|^lora_(unet|te\d?|transformer)\."
                   r"|^(unet|transformer|clip_[lg]|t5)\..*\.lora_(down|up)\.weight$"),
    ("comfyui", r"^(diffusion_model|text_encoders)\..*\.lora_(A|B|down|up)\b"),
    ("kohya", r"^[^.]+\.(lora_(down|up|mid)\.weight|alpha)$"),
    ("peft", r"\.lora_[AB](\.[^.]+)?\.weight$"),
    ("diffusers-old", r"(_lora|\.lora(_linear_layer)?)\.(down|up)\.weight$"),
    ("full-difference", r"\.(diff|diff_b|w_norm|b_norm)$"),
    ("controlnet", r"^control_model\.|controlnet_cond_embedding|^lora_controlnet$"),
    ("checkpoint", r"^model\.diffusion_model\.|^conditioner\.embedders\.|^cond_stage_model\."),
    ("vae", r"^first_stage_model\.|^(encoder|decoder)\.(conv_in|conv1)\.|^(post_)?quant_conv\."),
    ("unet", r"^(down_blocks|input_blocks|double_blocks|joint_blocks|transformer_blocks)\."
             r"|^diffusion_model\."),
    ("text-encoder", r"(^|\.)text_model\.|^encoder\.(layers|block)\.\d|^transformer\.resblocks\."),
    ("embedding", r"^(emb_params|string_to_param\b.*|clip_[lg]|<.*>)$"),
))
NOT_LORA = {"controlnet", "checkpoint", "vae", "unet", "text-encoder", "embedding", "unknown"}

# (family, pattern of a key, last side of its tensor; None: any). The first that fits counts: newer
# families come first, as some have the marks of an older one, too.
FAMILY_SIGNS = tuple((spec.id, re.compile(pattern), width) for spec in reversed(SPECS.values())
                     for pattern, width in spec.lora_signs)
# Family -> the family whose layers have the same names.
TWINS = {spec.id: spec.names_of for spec in SPECS.values() if spec.names_of}


def detect_format(keys: Iterable[str]) -> str:
    """A name of FORMATS, or "unknown"."""
    names = list(keys)
    for format_, pattern in FORMATS:
        if any(pattern.search(name) for name in names):
            return format_
    return "unknown"


def family_of(tensors: Mapping[str, TensorInfo]) -> str:
    """The id of the family that a LoRA is for; empty where no sign tells."""
    for family, pattern, side in FAMILY_SIGNS:
        if any((side is None or info.shape[-1:] == (side,)) and pattern.search(key)
               for key, info in tensors.items()):
            return family
    return ""
