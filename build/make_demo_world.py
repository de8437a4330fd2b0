"""Makes the demo world in presets/demo/: a tiny text-to-image base that draws 68 subjects.

    python build/make_demo_world.py vae | latents | base | judge | style | export | measure | grid

Stages run in that order; each resumes from its own checkpoint in --work, so an interruption
costs minutes. The pictures come from one pinned npm package (see demo_pictures.py):

    npm pack emoji-datasource-google@16.0.0      ->  --emoji emoji-datasource-google-16.0.0.tgz

Recipe: f4 autoencoder; v-prediction with zero terminal SNR and trailing timesteps
(Lin et al. 2023, arXiv 2305.08891), so that the layout follows the text and not the noise.
Seeds are fixed; torch on another CPU may still round differently.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import string
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Spinning OpenMP threads cost a factor of three on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import demo_pictures as pictures

from core.judge import Judge, JudgeNet

SCALING = 0.18215
LATENT = (4, 16, 16)
TEXT_WIDTH = 64
FLAT_SHARE, COLOUR_SHARE = 0.44, 0.16       # of the training samples; the rest are other styles


# ---------------------------------------------------------------- models

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
    """Every picture of the base's world; gradient-mapped styles stay on light and dark ground,
    where figure and ground keep apart."""
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
            inks = sorted((tuple(rng.randint(0, 255) for _ in range(3))
                           for _ in range(rng.randint(3, 5))), key=sum)
            colours = pictures.DUSK if kind > 0.92 else tuple(inks)
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


# ---------------------------------------------------------------- autoencoder

def _start_linear(vae: AutoencoderKL) -> None:
    """From a random start the autoencoder learns luminance only; a linear colour path through
    both halves gives it the colours from the first step."""
    def eye(conv: nn.Conv2d, spread: bool = False) -> None:
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
            eye(module, spread=True)
        elif name.endswith(("conv_shortcut", "upsamplers.0.conv", "conv_in", "conv_out",
                            "quant_conv")):
            eye(module)


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
    """Bakes zero mean and unit variance (after SCALING) of each latent channel into the quant
    convolutions, so that the pipeline's scaling_factor stays SD's own."""
    z = torch.cat([vae.encode(b).latent_dist.mode() for b in data.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    gain = 1 / (std * SCALING)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] *= gain[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * gain
    quant.bias[4:] += 2 * gain.log()
    post.bias += (post.weight[:, :, 0, 0] @ mean)
    post.weight /= gain[None, :, None, None]


def load_vae(args: argparse.Namespace) -> AutoencoderKL:
    vae = new_vae()
    vae.load_state_dict(torch.load(args.work / "vae.pt", weights_only=True)["vae"])
    return vae.eval()


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

def say(record: Record, drawing: pictures.Drawing, rng: random.Random) -> str:
    """A training caption. Unnamed background means white, unnamed style flat; unknown words in
    the style's place mean nothing, so that a trigger word without its LoRA changes nothing."""
    if rng.random() < 0.1:
        return ""
    said = record.background != "white" or rng.random() < 0.5
    text = pictures.caption(drawing.noun, record.background, record.style, said)
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
    kinds = [0 if r.style != "flat" else 2 if drawings[r.drawing].colour else 1 for r in records]
    shares = [1 - FLAT_SHARE - COLOUR_SHARE, FLAT_SHARE, COLOUR_SHARE]
    counts = [kinds.count(k) for k in range(3)]
    white = [pictures.BACKGROUND_SHARE[r.background] for r in records]
    weights = torch.tensor([shares[k] / counts[k] * w
                            for k, w in zip(kinds, white, strict=True)])
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
    predict = torch.compile(unet) if args.compile else unet     # 1.4x after minutes of compiling
    saved_at = shown_at = time.time()
    running = torch.zeros(())
    shown_step = step
    while step < total:
        rate = (args.rate or 8e-4) * min(1, (step + 1) / 100)
        if step > total * 0.5:
            rate *= 0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * (step / total - 0.5) / 0.5))
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        chosen = torch.multinomial(weights, batch, replacement=True)
        x = latents[chosen].float()
        texts = [say(records[i], drawings[records[i].drawing], rng) for i in chosen.tolist()]
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
    """A classifier of the subjects in any inks, for the measures (core/judge.py)."""
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
        if step % 2:            # as soft as the autoencoder draws
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
    _save_judge(args, net, names, drawings)


def _save_judge(args: argparse.Namespace, net: JudgeNet, names: list[str],
                drawings: list[pictures.Drawing]) -> None:
    from safetensors.torch import save_file
    plain = {d.subject: i for i, d in enumerate(drawings) if not d.colour}
    def truth(style: str, subjects: tuple[str, ...]) -> Tensor:
        return as_tensor(draw(drawings, [Record(plain[s], "white", style, (0, 0))
                                         for s in subjects]))
    with torch.no_grad():
        target = net.style(truth(pictures.LORA_STYLE, pictures.HELD_OUT)).mean(0)
        scale = net.style(truth("flat", tuple(names))).std(0)
    tensors = {k: v.half().contiguous() for k, v in net.state_dict().items()}
    save_file(tensors | {"style.target": target, "style.scale": scale},
              args.out / "judge.safetensors", metadata={"subjects": json.dumps(names)})


# ---------------------------------------------------------------- measures

def measure(args: argparse.Namespace) -> None:
    """Prints how often the base draws the subject, the colour and the ground it was asked for."""
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
    placed = [_nearest_ground(image) == b for (_, b), image in zip(grounds, shown, strict=True)]
    print(json.dumps({"subject_top1": np.mean(right), "colour": np.mean(coloured),
                      "background": np.mean(placed), "confused": wrong}, indent=1))


def _nearest_colour(drawings: list[pictures.Drawing], subject: str, image: np.ndarray) -> str:
    """The colour whose true picture is nearest, both seen small."""
    def small(picture: np.ndarray) -> np.ndarray:
        return picture.reshape(8, 8, 8, 8, 3).mean((1, 3))
    seen = small(image.astype(np.float32) / 255)
    return min((d for d in drawings if d.subject == subject and d.colour),
               key=lambda d: float(np.square(
                   small(pictures.compose(d.rgba, "white")[0]) - seen).sum())).colour


def _nearest_ground(image: np.ndarray) -> str:
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
    _old_names(folder / "text_encoder" / "model.safetensors")
    # transformers 5 takes a file's own dtype, diffusers fp32: a plain from_pretrained would mix.
    config = folder / "text_encoder" / "config.json"
    settings = json.loads(config.read_text("utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
    for name in ("tokenizer.json", "special_tokens_map.json"):     # vocab and merges suffice
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_bytes((args.work / "tokenizer" / name).read_bytes())
    _export_pictures(args)


def _old_names(path: Path) -> None:
    """transformers 5 leaves out `text_model.`; with it, 4.x and other tools read the file too."""
    from safetensors.torch import load_file, save_file
    tensors = load_file(path)
    save_file({k if k.startswith("text_model.") else f"text_model.{k}": v
               for k, v in tensors.items()}, path, metadata={"format": "pt"})


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


def main() -> None:
    stages = {"vae": train_vae, "latents": make_latents, "base": train_base, "grid": draw_grid,
              "judge": train_judge, "export": export, "measure": measure}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=stages, nargs="+")
    parser.add_argument("--emoji", type=Path, required=True, help="the npm tarball")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "presets" / "demo")
    parser.add_argument("--minutes", type=float, default=10, help="of autoencoder training")
    parser.add_argument("--samples", type=int, default=400_000, help="for the base")
    parser.add_argument("--judge-steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, help="learning rate instead of the stage's own")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    parser.add_argument("--save-minutes", type=float, default=4)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stage:
        stages[stage](args)


if __name__ == "__main__":
    main()
