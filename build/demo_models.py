"""The demo world's models before training, and its pictures as tensors."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

import demo_pictures as pictures
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCALING = 0.18215
LATENT = (4, 16, 16)
TEXT_WIDTH = 64


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 96), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4,
        norm_num_groups=8, sample_size=pictures.SIZE, scaling_factor=SCALING)


def new_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=LATENT[1], in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(32, 96, 160), attention_head_dim=4, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH)
    # Residual blocks that start as the identity learn faster.
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def new_text_encoder() -> CLIPTextModel:
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77,
        projection_dim=TEXT_WIDTH, bos_token_id=49406, eos_token_id=49407))
    # Words must differ from the first step on, else cross-attention starts blind.
    nn.init.normal_(encoder.get_input_embeddings().weight, std=0.4)
    return encoder


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing")


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's own BPE (49,408 tokens), rebuilt from the vocabulary file inside open_clip."""
    if not (folder / "merges.txt").exists():
        import open_clip
        from transformers.convert_slow_tokenizer import bytes_to_unicode
        source = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
        lines = gzip.decompress(source.read_bytes()).decode("utf-8").split("\n")
        merges = lines[1:49152 - 256 - 2 + 1]
        letters = list(bytes_to_unicode().values())
        vocab = letters + [c + "</w>" for c in letters] + ["".join(m.split()) for m in merges]
        vocab += ["<|startoftext|>", "<|endoftext|>"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(
            json.dumps({t: i for i, t in enumerate(vocab)}, ensure_ascii=False,
                       separators=(",", ":")), "utf-8")
        (folder / "merges.txt").write_text(
            "#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
        tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                                  model_max_length=77)
        tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


# ---------------------------------------------------------------- data

@dataclass(frozen=True, slots=True)
class Record:
    drawing: int
    background: str
    style: str
    shift: tuple[int, int]


def base_records(drawings: list[pictures.Drawing]) -> list[Record]:
    """Every picture that the base learns. Gradient-mapped styles only have light and dark
    backgrounds, on which the figure stays visible."""
    rng = random.Random(1)
    shifts = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    records = []
    for i, drawing in enumerate(drawings):
        for style in pictures.STYLES:
            keeps_colour = style in ("flat", "pastel", "outline", "poster", "negative")
            if drawing.colour and not keeps_colour:
                continue
            grounds = list(pictures.BACKGROUNDS) if keeps_colour else ["white", "white", "black"]
            copies = 3 if style == "flat" else 1
            records += [Record(i, ground, style, shift)
                        for ground in grounds for shift in rng.sample(shifts, copies)]
    return records


def draw(drawings: list[pictures.Drawing], records: list[Record]) -> np.ndarray:
    """-> uint8 (N, 64, 64, 3)"""
    result = np.empty((len(records), pictures.SIZE, pictures.SIZE, 3), np.uint8)
    for n, record in enumerate(records):
        picture, mask = pictures.compose(drawings[record.drawing].rgba, record.background,
                                         record.shift)
        styled = pictures.stylise(picture[None], mask[None], record.style)[0]
        result[n] = (styled.clip(0, 1) * 255).round()
    return result


def vae_pictures(drawings: list[pictures.Drawing], count: int, seed: int = 2) -> np.ndarray:
    """Pictures for the autoencoder: all styles, and prints and gradient maps in random inks, so
    that it can draw LoRA styles which the base never sees."""
    rng = random.Random(seed)
    result = np.empty((count, pictures.SIZE, pictures.SIZE, 3), np.uint8)
    for n in range(count):
        drawing = rng.choice(drawings)
        picture, mask = pictures.compose(
            drawing.rgba, rng.choice(list(pictures.BACKGROUNDS)),
            (rng.randint(-3, 3), rng.randint(-3, 3)), rng.uniform(0.75, 0.9))
        kind = rng.random()
        if kind < 0.35:
            styled = picture
        elif kind < 0.65:
            styled = pictures.stylise(picture[None], mask[None], rng.choice(pictures.STYLES))[0]
        else:
            # Drawn in any case, so that the pictures after it stay the same.
            inks = pictures.random_inks(rng)
            colours = pictures.DUSK if kind > 0.92 else inks
            styled = (pictures.print_style(picture[None], mask[None], colours)[0]
                      if rng.random() < 0.7 or kind > 0.92
                      else pictures.ramp(pictures.luminance(picture), colours))
        result[n] = (styled.clip(0, 1) * 255).round()
    return result


def as_tensor(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1], channels last"""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)


def as_images(tensor: Tensor) -> np.ndarray:
    return ((tensor.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def save_grid(images: np.ndarray, columns: int, path: Path, scale: int = 2) -> None:
    rows = [np.concatenate(list(images[i:i + columns]), 1)
            for i in range(0, len(images) - columns + 1, columns)]
    grid = Image.fromarray(np.concatenate(rows, 0))
    grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST).save(path)
