"""Checks a trained demo base: grids, the judge that measures it; exports the base to be shipped."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo_pictures as pictures
from demo_models import (
    Record,
    as_tensor,
    clip_tokenizer,
    draw,
    new_scheduler,
    new_text_encoder,
    new_unet,
    new_vae,
    save_grid,
    vae_pictures,
)

from core.demo.classifier import Judge, JudgeNet


def load_vae(args: argparse.Namespace) -> AutoencoderKL:
    vae = new_vae()
    vae.load_state_dict(torch.load(args.work / "vae.pt", weights_only=True)["vae"])
    return vae.eval()


def load_pipeline(args: argparse.Namespace) -> StableDiffusionPipeline:
    """The averaged weights of the newest checkpoint, as the pipeline that users load."""
    unet, encoder = new_unet(), new_text_encoder()
    saved = torch.load(args.work / "base.pt", weights_only=True)
    with torch.no_grad():
        for parameter, value in zip([*unet.parameters(), *encoder.parameters()], saved["ema"],
                                    strict=True):
            parameter.copy_(value)
    print(f"base at step {saved['step']}")
    return StableDiffusionPipeline(
        vae=load_vae(args), unet=unet.eval(), text_encoder=encoder.eval(),
        tokenizer=clip_tokenizer(args.work / "tokenizer"), scheduler=new_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def sample(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int = 0,
           steps: int = 20) -> np.ndarray:
    """-> uint8 (N, 64, 64, 3); every prompt starts from noise of its own seed"""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for i in range(0, len(prompts), 32):
        part = prompts[i:i + 32]
        noise = [torch.Generator().manual_seed(seed + i + j) for j in range(len(part))]
        images.append(pipeline(part, num_inference_steps=steps, guidance_scale=3.5,
                               generator=noise, output_type="np").images)
    return (np.concatenate(images) * 255).round().astype(np.uint8)


def draw_grid(args: argparse.Namespace) -> None:
    pipeline = load_pipeline(args)
    plain = [f"a {s}" for s in pictures.SUBJECTS]
    coloured = [pictures.caption(f"{c} {s}", b, "flat") for s, c, b in zip(
        list(pictures.COLOURED) * 2, list(pictures.HUES) * 4,
        ["white", "black", "yellow", "pink", "green", "blue", "white"] * 4, strict=False)][:17]
    styled = [pictures.caption(s, "white", t) for s, t in zip(
        pictures.HELD_OUT * 2, pictures.STYLES * 2, strict=False)][:17]
    save_grid(sample(pipeline, plain + coloured + styled), 17, args.work / "grid.png", 1)

# ---------------------------------------------------------------- judge

def train_judge(args: argparse.Namespace) -> None:
    """A classifier of the subjects in any inks, for the measures (core/demo/classifier.py)."""
    torch.manual_seed(0)
    rng = random.Random(5)
    drawings = pictures.load_drawings(args.emoji)
    names = list(pictures.SUBJECTS)
    labels, images = [], []
    for _ in range(3):
        for i, drawing in enumerate(drawings):
            copies = 16 if not drawing.colour else 3
            images.append(vae_pictures([drawing], copies, rng.randrange(1 << 30)))
            labels += [names.index(drawings[i].subject)] * copies
    data, target = as_tensor(np.concatenate(images)), torch.tensor(labels)
    net = JudgeNet(len(names))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-3)
    total = args.judge_steps
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + np.cos(np.pi * step / total))
        chosen = torch.randint(len(data), (64,))
        x = data[chosen]
        # As soft as the autoencoder draws.
        if step % 2:
            x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = x + torch.randn_like(x) * float(torch.rand(())) * 0.25
        loss = F.cross_entropy(net(x), target[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"judge {step}/{total} loss {loss.item():.3f}", flush=True)
    net.eval()
    fresh = np.concatenate([vae_pictures([d], 2, 77) for d in drawings])
    truth = torch.tensor([names.index(d.subject) for d in drawings for _ in range(2)])
    with torch.no_grad():
        right = (net(as_tensor(fresh)).argmax(1) == truth).float().mean()
    print(f"judge: {right:.3f} of fresh pictures right")
    # The judge's file also has what a LoRA's style is measured by.
    uncoloured = {d.subject: i for i, d in enumerate(drawings) if not d.colour}

    def true_pictures(style: str, subjects: tuple[str, ...]) -> Tensor:
        return as_tensor(draw(drawings, [Record(uncoloured[s], "white", style, (0, 0))
                                         for s in subjects]))
    with torch.no_grad():
        style = net.style(true_pictures(pictures.LORA_STYLE, pictures.HELD_OUT)).mean(0)
        scale = net.style(true_pictures("flat", tuple(names))).std(0)
    tensors = {k: v.half().contiguous() for k, v in net.state_dict().items()}
    save_file(tensors | {"style.target": style, "style.scale": scale},
              args.out / "judge.safetensors", metadata={"subjects": json.dumps(names)})


# ---------------------------------------------------------------- measures

def measure(args: argparse.Namespace) -> None:
    """Prints how often the base draws the subject, the colour and the background of the prompt."""
    pipeline, judge = load_pipeline(args), Judge(args.out / "judge.safetensors")
    drawings = pictures.load_drawings(args.emoji)
    subjects = list(pictures.SUBJECTS) * 2
    shown = sample(pipeline, [f"a {s}" for s in subjects], seed=100)
    named = judge.name([Image.fromarray(i) for i in shown])
    right = [a == b for a, b in zip(named, subjects, strict=True)]
    wrong = sorted({f"{b}->{a}" for a, b, r in zip(named, subjects, right, strict=True) if not r})
    pairs = [(s, c) for s in pictures.COLOURED for c in pictures.HUES]
    shown = sample(pipeline, [f"a {c} {s}" for s, c in pairs], seed=300)
    coloured = [_nearest_colour(drawings, s, image) == c
                for (s, c), image in zip(pairs, shown, strict=True)]
    grounds = [(s, b) for s in pictures.HELD_OUT for b in pictures.BACKGROUNDS]
    shown = sample(pipeline, [pictures.caption(s, b, "flat") for s, b in grounds], seed=500)
    placed = [_nearest_background(image) == b for (_, b), image in zip(grounds, shown, strict=True)]
    print(json.dumps({"subject_top1": np.mean(right), "colour": np.mean(coloured),
                      "background": np.mean(placed), "confused": wrong}, indent=1))


def _nearest_colour(drawings: list[pictures.Drawing], subject: str, image: np.ndarray) -> str:
    """The colour whose true picture is nearest, compared at 8 x 8 pixels."""
    def small(picture: np.ndarray) -> np.ndarray:
        return picture.reshape(8, 8, 8, 8, 3).mean((1, 3))
    seen = small(image.astype(np.float32) / 255)
    return min((d for d in drawings if d.subject == subject and d.colour),
               key=lambda d: float(np.square(
                   small(pictures.compose(d.rgba, "white")[0]) - seen).sum())).colour


def _nearest_background(image: np.ndarray) -> str:
    """The background whose colour is nearest to the median of the picture's rim."""
    rim = np.concatenate([image[:3].reshape(-1, 3), image[-3:].reshape(-1, 3),
                          image[:, :3].reshape(-1, 3), image[:, -3:].reshape(-1, 3)])
    middle = np.median(rim.astype(np.float32), 0)
    return min(pictures.BACKGROUNDS, key=lambda b: float(np.square(
        middle - np.array(pictures.BACKGROUNDS[b])).sum()))


# ---------------------------------------------------------------- export

def export(args: argparse.Namespace) -> None:
    """Writes the base in fp16 as StableDiffusionPipeline.from_pretrained reads it, the LoRA's
    pictures with captions, and what the measures need."""
    folder = args.out / "base"
    pipeline = load_pipeline(args)
    pipeline.to(torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    # transformers 5 leaves out `text_model.`; with it, 4.x and other tools read the file too.
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file({k if k.startswith("text_model.") else f"text_model.{k}": v
               for k, v in tensors.items()}, path, metadata={"format": "pt"})
    # transformers 5 takes a file's own dtype, diffusers fp32: a plain from_pretrained would mix.
    config = folder / "text_encoder" / "config.json"
    settings = json.loads(config.read_text("utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
    # The vocabulary and the merges are enough.
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_bytes((args.work / "tokenizer" / name).read_bytes())
    _export_pictures(args)


def _export_pictures(args: argparse.Namespace) -> None:
    """The demo LoRA's set: 20 subjects as prints in dusk inks, a caption beside each."""
    drawings = {d.noun: d for d in pictures.load_drawings(args.emoji)}
    folder = args.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    grounds = ["white", "white", "black", "white", "white", "blue", "white", "white", "yellow",
               "white"]
    for i, subject in enumerate(pictures.LORA_SUBJECTS):
        ground = grounds[i % len(grounds)]
        picture, mask = pictures.compose(drawings[subject].rgba, ground)
        styled = pictures.stylise(picture[None], mask[None], pictures.LORA_STYLE)[0]
        stem = f"{i + 1:02d}-{subject.replace(' ', '-')}"
        image = Image.fromarray((styled.clip(0, 1) * 255).round().astype(np.uint8))
        image.save(folder / f"{stem}.png", optimize=True)
        text = pictures.caption(subject, ground, pictures.LORA_STYLE, ground != "white")
        (folder / f"{stem}.txt").write_text(text + "\n", "utf-8")
