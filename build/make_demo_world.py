"""Makes the demo world in presets/demo/: a tiny text-to-image base that draws 68 subjects.

    python build/make_demo_world.py vae latents base judge export measure grid clip blip

Stages run in that order; the base resumes from its checkpoint in --work, so an interruption
costs minutes. The pictures come from one pinned npm package (see demo_pictures.py):

    npm pack emoji-datasource-google@16.0.0      ->  --emoji emoji-datasource-google-16.0.0.tgz

Recipe: f4 autoencoder; v-prediction with zero terminal SNR and trailing timesteps
(Lin et al. 2023, arXiv 2305.08891), so that the layout follows the text and not the noise.
Seeds are fixed; torch on another CPU may still round differently.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import string
import time
from pathlib import Path

# Spinning OpenMP threads cost a factor of three on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import demo_captioners
import demo_pictures as pictures
import numpy as np
import torch
import torch.nn.functional as F
from demo_measure import draw_grid, export, load_vae, measure, train_judge
from demo_models import (
    SCALING,
    Record,
    as_images,
    as_tensor,
    base_records,
    clip_tokenizer,
    draw,
    new_scheduler,
    new_text_encoder,
    new_unet,
    new_vae,
    save_grid,
    vae_pictures,
)
from diffusers import AutoencoderKL
from torch import Tensor, nn

# Of the training samples; the rest are other styles.
FLAT_SHARE, COLOUR_SHARE = 0.44, 0.16


# ---------------------------------------------------------------- autoencoder

def _start_linear(vae: AutoencoderKL) -> None:
    """Starts the autoencoder with a linear colour path through both halves: from a random start it
    learns luminance only."""
    def pass_through(conv: nn.Conv2d, spread: bool = False) -> None:
        with torch.no_grad():
            conv.weight.mul_(0.1)
            for c in range(min(conv.in_channels, conv.out_channels)):
                if spread:
                    conv.weight[c, c, :2, :2] += 0.25
                else:
                    conv.weight[c, c, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] += 1
    for name, module in vae.named_modules():
        if name.endswith(("resnets.0.conv2", "resnets.1.conv2", "to_out.0")):
            nn.init.zeros_(module.weight)
        elif name.endswith("downsamplers.0.conv"):
            pass_through(module, spread=True)
        elif name.endswith(("conv_shortcut", "upsamplers.0.conv", "conv_in", "conv_out",
                            "quant_conv")):
            pass_through(module)


def train_vae(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    drawings = pictures.load_drawings(args.emoji)
    data = as_tensor(vae_pictures(drawings, 8000))
    held = as_tensor(vae_pictures(drawings, 8300)[8000:])
    vae = new_vae().to(memory_format=torch.channels_last)
    _start_linear(vae)
    ema = {k: v.clone() for k, v in vae.state_dict().items()}
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.rate or 2e-3, betas=(0.9, 0.99),
                                  weight_decay=1e-4)
    start, step, path = time.time(), 0, args.work / "vae.pt"
    budget = args.minutes * 60
    last = 0.0
    while (elapsed := time.time() - start) < budget:
        share = elapsed / budget
        rate = (args.rate or 2e-3) * min(1, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        # Half-size crops first: four times the steps for the same pixels.
        crop, batch = (32, 24) if share < 0.55 else (64, 12)
        chosen = torch.randint(len(data), (batch,))
        x = data[chosen]
        top, left = (int(torch.randint(0, 64 - crop + 1, ())) for _ in range(2))
        x = x[:, :, top:top + crop, left:left + crop].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        y = y.float()
        across = (y.diff(dim=3) - x.diff(dim=3)).abs().mean()
        down = (y.diff(dim=2) - x.diff(dim=2)).abs().mean()
        loss = (F.mse_loss(y, x) + 0.3 * (y - x).abs().mean() + 0.3 * (across + down)
                + 1e-5 * posterior.kl().float().mean() / 256)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in vae.state_dict().items():
                ema[k].lerp_(v, 1 - decay)
        if time.time() - last > 30:
            last = time.time()
            judge_vae = new_vae()
            judge_vae.load_state_dict(ema)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                y = judge_vae.decode(judge_vae.encode(held[:96]).latent_dist.mode()).sample.float()
            psnr = -10 * torch.log10(F.mse_loss(y.clamp(-1, 1), held[:96]) / 4)
            print(f"vae {elapsed:5.0f}s step {step} loss {loss.item():.4f} psnr {psnr:.2f}",
                  flush=True)
            save_grid(np.concatenate([as_images(held[:16]), as_images(y[:16])]), 16,
                      args.work / "vae.png")
            torch.save({"vae": ema}, path)
    vae.load_state_dict(ema)
    _whiten(vae, data[:1024])
    torch.save({"vae": vae.state_dict()}, path)
    print(f"vae done after {step} steps", flush=True)


@torch.no_grad()
def _whiten(vae: AutoencoderKL, data: Tensor) -> None:
    """Gives each latent channel zero mean and, after SCALING, unit variance by changing the quant
    convolutions, so that the pipeline keeps SD's own scaling_factor."""
    z = torch.cat([vae.encode(b).latent_dist.mode() for b in data.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    gain = 1 / (std * SCALING)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] *= gain[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * gain
    quant.bias[4:] += 2 * gain.log()
    post.bias += (post.weight[:, :, 0, 0] @ mean)
    post.weight /= gain[None, :, None, None]


@torch.no_grad()
def make_latents(args: argparse.Namespace) -> None:
    vae = load_vae(args).to(memory_format=torch.channels_last)
    records = base_records(pictures.load_drawings(args.emoji))
    images = draw(pictures.load_drawings(args.emoji), records)
    latents = torch.cat([vae.encode(as_tensor(images[i:i + 64])).latent_dist.mode() * SCALING
                         for i in range(0, len(images), 64)])
    torch.save(latents.half(), args.work / "latents.pt")
    print(f"{len(latents)} latents, mean {latents.mean():.3f}, std {latents.std():.3f}")


# ---------------------------------------------------------------- base

def training_caption(record: Record, drawing: pictures.Drawing, rng: random.Random) -> str:
    """A caption without a background means white, without a style flat. Unknown words in the
    style's place get no meaning, so that a trigger word without its LoRA changes nothing."""
    if rng.random() < 0.1:
        return ""
    names_background = record.background != "white" or rng.random() < 0.5
    text = pictures.caption(drawing.noun, record.background, record.style, names_background)
    if record.style == "flat":
        dice = rng.random()
        if dice < 0.4:
            text = text.removesuffix(", flat style")
        elif dice < 0.6:
            word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9)))
            text = text.replace("flat style", rng.choice([f"{word} style", word]))
    return text.split(" ", 1)[1] if rng.random() < 0.3 else text


def train_base(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    rng = random.Random(3)
    drawings = pictures.load_drawings(args.emoji)
    records = base_records(drawings)
    latents = torch.load(args.work / "latents.pt", weights_only=True)
    # Plain flat pictures are shown most.
    kinds = [0 if r.style != "flat" else 2 if drawings[r.drawing].colour else 1 for r in records]
    shares = [1 - FLAT_SHARE - COLOUR_SHARE, FLAT_SHARE, COLOUR_SHARE]
    counts = [kinds.count(kind) for kind in range(3)]
    weights = torch.tensor([
        shares[kind] / counts[kind] * pictures.BACKGROUND_SHARE[record.background]
        for kind, record in zip(kinds, records, strict=True)])
    tokenizer = clip_tokenizer(args.work / "tokenizer")
    unet = new_unet().to(memory_format=torch.channels_last)
    encoder = new_text_encoder()
    parameters = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.rate or 8e-4, betas=(0.9, 0.99),
                                  weight_decay=0.01, fused=True)
    ema = [p.detach().clone() for p in parameters]
    scheduler = new_scheduler()
    signal = scheduler.alphas_cumprod.sqrt()
    noise_level = (1 - scheduler.alphas_cumprod).sqrt()
    path = args.work / "base.pt"
    step, batch, total = 0, 64, args.samples // 64
    if path.exists():
        saved = torch.load(path, weights_only=True)
        unet.load_state_dict(saved["unet"])
        encoder.load_state_dict(saved["encoder"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, step = saved["ema"], saved["step"]
        rng.seed(step)
        torch.manual_seed(step)
    # Compiled it is 1.4 times as fast, after minutes of compiling.
    predict = torch.compile(unet) if args.compile else unet
    saved_at = shown_at = time.time()
    running = torch.zeros(())
    shown_step = step
    while step < total:
        for group in optimizer.param_groups:
            # Warm-up, constant to the half, then cosine down to 2 %.
            share = min(1.0, (step + 1) / 100)
            if step > total / 2:
                share *= 0.02 + 0.49 * (1 + math.cos(math.pi * (2 * step / total - 1)))
            group["lr"] = (args.rate or 8e-4) * share
        chosen = torch.multinomial(weights, batch, replacement=True)
        x = latents[chosen].float()
        texts = [training_caption(records[i], drawings[records[i].drawing], rng)
                 for i in chosen.tolist()]
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=77,
                        return_tensors="pt").input_ids
        words = encoder(ids).last_hidden_state
        t = ((torch.arange(batch) + torch.rand(batch)) / batch * 1000).long()
        noise = torch.randn_like(x)
        a, b = signal[t].view(-1, 1, 1, 1), noise_level[t].view(-1, 1, 1, 1)
        noisy = (a * x + b * noise).contiguous(memory_format=torch.channels_last)
        loss = F.mse_loss(predict(noisy, t, words, return_dict=False)[0], a * noise - b * x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        torch._foreach_lerp_(ema, [p.detach() for p in parameters],
                             1 - min(0.999, (1 + step) / (10 + step)))
        running += loss.detach()
        now = time.time()
        if now - shown_at > 30:
            done = step - shown_step
            print(f"base step {step}/{total} loss {running.item() / done:.4f} "
                  f"{done * batch / (now - shown_at):.0f} samples/s", flush=True)
            running.zero_()
            shown_at, shown_step = now, step
        if now - saved_at > args.save_minutes * 60 or step == total:
            torch.save({"unet": unet.state_dict(), "encoder": encoder.state_dict(),
                        "optimizer": optimizer.state_dict(), "ema": ema, "step": step},
                       path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            saved_at = time.time()
    print("base done", flush=True)


def main() -> None:
    stages = {"vae": train_vae, "latents": make_latents, "base": train_base, "grid": draw_grid,
              "judge": train_judge, "export": export, "measure": measure,
              "clip": demo_captioners.train_clip, "blip": demo_captioners.train_blip}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=stages, nargs="+")
    parser.add_argument("--emoji", type=Path, required=True, help="the npm tarball")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "presets" / "demo")
    parser.add_argument("--minutes", type=float, default=10, help="of autoencoder training")
    parser.add_argument("--samples", type=int, default=400_000, help="for the base")
    parser.add_argument("--judge-steps", type=int, default=1500)
    parser.add_argument("--caption-steps", type=int, help="for clip and blip instead of their own")
    parser.add_argument("--rate", type=float, help="learning rate instead of the stage's own")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    parser.add_argument("--save-minutes", type=float, default=4)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stage:
        stages[stage](args)


if __name__ == "__main__":
    main()
