"""Tiny random-weight captioners of the real classes, and noisy pictures for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    OPTConfig,
)

from core import paths

DEMO_BLIP = paths.DEMO / "captioners" / "blip"
CLIP_CFG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}


def pictures(folder: Path, count: int = 8) -> list[Path]:
    """Noise on gradients, each of another size and shape."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for n in range(count):
        height, width = 40 + 9 * n, 90 - 5 * n
        ramp = np.linspace(0, 200, width)[None, :, None] * rng.random(3)
        noise = rng.integers(0, 56, (height, width, 3))
        made.append(folder / f"{n:02d}.png")
        Image.fromarray((ramp + noise).astype(np.uint8)).save(made[-1])
    return made


def tiny_clip(folder: Path, resize_mode: str = "shortest") -> Path:
    torch.manual_seed(3)
    model = open_clip.CLIP(**CLIP_CFG)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({
        "model_cfg": CLIP_CFG, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25],
                                                  "resize_mode": resize_mode}}), "utf-8")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()},
              folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_blip(folder: Path) -> Path:
    torch.manual_seed(4)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BLIP)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "projection_dim": 32}
    config = BlipConfig(
        text_config={**size, "vocab_size": len(tokenizer), "encoder_hidden_size": 32,
                     "bos_token_id": tokenizer.bos_token_id,
                     "eos_token_id": tokenizer.sep_token_id,
                     "sep_token_id": tokenizer.sep_token_id,
                     "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.4},
        vision_config={**size, "image_size": 32, "patch_size": 8, "initializer_range": 0.3})
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():                   # far from uniform, so that pictures differ in words
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embeddings" not in name:
                parameter.normal_(std=0.25)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}),
                  tokenizer).save_pretrained(folder)
    return folder


def tiny_blip2(folder: Path) -> Path:
    torch.manual_seed(5)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BLIP)
    processor = Blip2Processor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer,
                               num_query_tokens=4)
    vision = Blip2VisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                               num_attention_heads=4, image_size=32, patch_size=8,
                               initializer_range=0.3)
    former = Blip2QFormerConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                num_attention_heads=4, encoder_hidden_size=32, vocab_size=64,
                                initializer_range=0.3)
    text = OPTConfig(vocab_size=len(processor.tokenizer), hidden_size=32, ffn_dim=64,
                     num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
                     word_embed_proj_dim=32, init_std=0.3, bos_token_id=tokenizer.bos_token_id,
                     eos_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id)
    config = Blip2Config(vision_config=vision, qformer_config=former, text_config=text,
                         num_query_tokens=4,
                         image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"))
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# --- the demo world ---

def held_out() -> tuple[list[Image.Image], list[str]]:
    """100 scenes that the demo captioners were not trained on, and their subjects
    (build/demo_captioners.py made the sheet)."""
    data = Path(__file__).parents[1] / "data"
    sheet = Image.open(data / "demo_held_out.webp").convert("RGB")
    facts = json.loads((data / "demo_held_out.json").read_text("utf-8"))
    boxes = [(x, y, x + 64, y + 64) for y in range(0, sheet.height, 64)
             for x in range(0, sheet.width, 64)]
    return [sheet.crop(box) for box in boxes], [fact["subject"] for fact in facts]


def dusk_prints() -> tuple[list[Image.Image], list[str]]:
    """The demo LoRA's 20 pictures: inks that the captioners never saw."""
    files = sorted((paths.DEMO / "pictures").glob("*.png"))
    return ([Image.open(file).convert("RGB") for file in files],
            [file.stem.partition("-")[2].replace("-", " ") for file in files])
