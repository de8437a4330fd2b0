"""The demo world's captioners: a tiny CLIP and a tiny BLIP of the real classes, trained here.

Stages `clip` and `blip` of make_demo_world.py; both resume from their checkpoint in --work.
demo_scenes.py has the pictures that they learn from, and those held out.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import demo_pictures as pictures
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import yaml
from demo_scenes import (
    MEAN,
    PRINT,
    STD,
    STYLE_WORDS,
    WORDS,
    World,
    as_pixels,
    augment,
    sentence,
    world,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

POOL = 24_000                               # training pictures

CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 12, "patch_size": None},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 2}},
    "preprocess_cfg": {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic",
                       "resize_mode": "shortest"}}


# ---------------------------------------------------------------- training in general

def run(model: nn.Module, args: argparse.Namespace, name: str, total: int, rate: float,
        loss_of: Callable[[], Tensor], look: Callable[[nn.Module], str]) -> nn.Module:
    """AdamW with warm-up and cosine; returns the moving average of the weights."""
    path = args.work / f"{name}.pt"
    # Weight decay would shrink the token rows of words that a batch doesn't have.
    decayed = [p for p in model.parameters() if p.ndim > 1 and len(p) != 49408]
    others = [p for p in model.parameters() if not (p.ndim > 1 and len(p) != 49408)]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05},
                                   {"params": others, "weight_decay": 0.0}], lr=rate,
                                  betas=(0.9, 0.98), fused=True)
    average = copy.deepcopy(model)
    step, spent = 0, 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent = saved["step"], saved["spent"]
        torch.manual_seed(step)
    last, saved_at, losses = time.time(), time.time(), []
    while step < total:
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 150) * (
                0.01 + 0.495 * (1 + math.cos(math.pi * step / total)))
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        follow(average, model, min(0.998, (1 + step) / (10 + step)))
        losses.append(float(loss.detach()))
        step += 1
        if time.time() - saved_at > 60 or step == total:
            spent += time.time() - last
            last = saved_at = time.time()
            torch.save({"model": model.state_dict(), "average": average.state_dict(),
                        "optimizer": optimizer.state_dict(), "step": step, "spent": spent},
                       path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
            print(f"{name} {spent:5.0f}s step {step}/{total} loss {np.mean(losses):.3f} "
                  f"{look(average.eval())}", flush=True)
            losses = []
    return average.eval()


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moving average of weights and running statistics. torch's AveragedModel would turn the
    causal mask's infinities into NaN."""
    for mean, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(new, 1 - decay)
        else:
            mean.copy_(new)


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: (v.half() if v.is_floating_point() else v).contiguous().clone()
            for k, v in state.items()}


# ---------------------------------------------------------------- CLIP

TEMPLATES = {
    "subject": ("{a}", "a picture of {a}", "{}"),
    "style": ("{} style", "a picture in {} style"),
    "background": ("on a {} background", "a {} background"),
    "colour": ("a {} thing", "something {}"),
}
WRITTEN = {"subject": "{}", "style": "{} style", "background": "{} background", "colour": "{}"}


def fill(template: str, word: str) -> str:
    article = "an" if word[0] in "aeiou" else "a"
    return template.replace("{a}", f"{article} {word}").replace("{}", word)


@functools.cache
def _tokens(text: str) -> Tensor:
    return open_clip.tokenize([text], 24)[0]


def tokens(texts: Iterable[str]) -> Tensor:
    return torch.stack([_tokens(text) for text in texts])


def new_clip() -> open_clip.CLIP:
    """Only the words in use have token rows; the others stay zero and cost nothing in git."""
    cfg = CLIP_CONFIG["model_cfg"]
    model = open_clip.CLIP(embed_dim=cfg["embed_dim"], vision_cfg=cfg["vision_cfg"],
                           text_cfg=cfg["text_cfg"])
    texts = [sentence({"subject": s, "colour": c, "background": b, "style": t})
             for s in WORDS["subject"] for c, b, t in zip(
                 WORDS["colour"] * 2, WORDS["background"] * 2, STYLE_WORDS, strict=False)]
    texts += [fill(t, w) for kind in WORDS for t in TEMPLATES[kind] for w in WORDS[kind]]
    used = torch.unique(tokens(texts))
    with torch.no_grad():
        rows = torch.zeros_like(model.token_embedding.weight)
        rows[used] = torch.randn(len(used), rows.shape[1]) * 0.3
        model.token_embedding.weight.copy_(rows)
    return model


def clip_loss(model: open_clip.CLIP, data: World, batch: int = 128) -> Tensor:
    """Contrasts the batch's sentences with its pictures, and each fact with its whole list, as
    tagging does."""
    chosen = torch.randint(len(data.images), (batch,))
    image_embeddings = model.encode_image(augment(data.images[chosen]), normalize=True)
    facts = [data.facts[i] for i in chosen.tolist()]
    texts = sorted({sentence(f) for f in facts})
    lists = {k: [fill(random.choice(TEMPLATES[k]), w) for w in words] for k, words in WORDS.items()}
    every = texts + [t for words in lists.values() for t in words]
    text_embeddings = model.encode_text(tokens(every), normalize=True)
    scores = model.logit_scale.exp().clamp(max=100) * image_embeddings @ text_embeddings.T
    of_text = torch.tensor([texts.index(sentence(f)) for f in facts])
    pairs = scores[:, :len(texts)]
    # Several pictures of a batch may have the same sentence: they share its probability.
    loss = F.cross_entropy(pairs, of_text) + F.cross_entropy(
        pairs.T, F.normalize(F.one_hot(of_text, len(texts)).T.float(), p=1))
    start = len(texts)
    for kind, words in WORDS.items():
        weight = 2.0 if kind == "subject" else 0.5
        loss = loss + weight * of_list(scores[:, start:start + len(words)], kind, facts)
        start += len(words)
    return loss / 4


def of_list(scores: Tensor, kind: str, facts: list[dict[str, str]]) -> Tensor:
    """Cross-entropy of each picture's word among its list, without the pictures that don't show
    one; zero if no picture of the batch does."""
    # -100 is the index that cross_entropy ignores.
    target = torch.tensor([WORDS[kind].index(f[kind]) if kind in f else -100 for f in facts])
    total = F.cross_entropy(scores, target, label_smoothing=0.02, reduction="sum")
    return total / max(1, int((target >= 0).sum()))


@torch.no_grad()
def clip_right(model: open_clip.CLIP, data: World) -> dict[str, float]:
    """The share of pictures whose best word of each list is right; for subjects also whether the
    right one is among the best five."""
    image_embeddings = model.encode_image(as_pixels(data.images), normalize=True)
    shares = {}
    for kind, words in WORDS.items():
        text_embeddings = sum(
            model.encode_text(tokens(fill(t, w) for w in words), normalize=True)
            for t in TEMPLATES[kind])
        ranked = (image_embeddings @ text_embeddings.T).argsort(1, descending=True)
        target = torch.tensor([words.index(f[kind]) if kind in f else -1 for f in data.facts])
        known = target >= 0
        if known.any():
            shares[kind] = (ranked[:, 0] == target)[known].float().mean().item()
        if kind == "subject":
            shares["subject@5"] = (ranked[:, :5] == target[:, None]).any(1).float().mean().item()
    return shares


def train_clip(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    random.seed(0)
    data = world(args, POOL, 11, held=False)
    held, dusk = world(args, 400, 21, True), world(args, 200, 31, True, pictures.LORA_STYLE)
    model = new_clip().to(memory_format=torch.channels_last)

    def look(average: nn.Module) -> str:
        shares = {n: clip_right(average, w) for n, w in (("held", held), ("dusk", dusk))}
        save_clip(average, args.work / "captioners" / "clip")
        return " ".join(f"{n}:{k}={v:.3f}" for n, s in shares.items() for k, v in s.items())
    trained = run(model, args, "clip", args.caption_steps or 1950, args.rate or 2e-3,
                  lambda: clip_loss(model, data), look)
    print("clip", look(trained))
    save_clip(trained, args.out / "captioners" / "clip")
    save_sample(args)


def save_sample(args: argparse.Namespace, count: int = 100, columns: int = 10) -> None:
    """Writes a sheet of held-out pictures with their facts for the tests, which don't have the
    package of the drawings."""
    sample = world(args, count, 41, True)
    folder = Path(__file__).resolve().parents[1] / "tests" / "data"
    folder.mkdir(exist_ok=True)
    rows = [np.concatenate(list(sample.images[i:i + columns].numpy()), 1)
            for i in range(0, count, columns)]
    Image.fromarray(np.concatenate(rows)).save(folder / "demo_held_out.webp", lossless=True,
                                               method=6)
    lines = ",\n ".join(json.dumps(facts) for facts in sample.facts)
    (folder / "demo_held_out.json").write_text(f"[{lines}]\n", "utf-8")


def save_clip(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG, indent=2) + "\n", "utf-8")
    save_file(half(model.state_dict()), folder / "open_clip_model.safetensors",
              metadata={"format": "pt"})
    (folder / "open_clip_model.safetensors").chmod(0o644)
    vocabulary = {
        kind: {"templates": list(TEMPLATES[kind]), "most": 3 if kind == "subject" else 1,
               "threshold": 0.02 if kind == "subject" else 0.5, "relative": 0.1,
               "written": WRITTEN[kind], "entries": list(words)} for kind, words in WORDS.items()}
    (folder / "vocabulary.yaml").write_text(
        "# The words of the demo world, for its CLIP.\n"
        + yaml.safe_dump(vocabulary, sort_keys=False, width=96, default_flow_style=None), "utf-8")


# ---------------------------------------------------------------- BLIP

WIDTH = 128
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
LONGEST = 24                                # tokens of a sentence
# Of the CLIP's second stage, which has 8 x 8 positions like BLIP's patches.
TEACHER_CHANNELS = 96


def blip_tokenizer() -> BertTokenizer:
    """BLIP's kind of tokenizer with the words of the demo world; others are split into letters."""
    words = " ".join([*WORDS["subject"], *WORDS["style"], *WORDS["background"], *WORDS["colour"],
                      "a an on background style picture of the in with , . : ?", pictures.TRIGGER])
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocab = list(dict.fromkeys([*SPECIAL, *letters, *(f"##{c}" for c in letters),
                                *sorted(set(words.split()))]))
    return BertTokenizer({word: i for i, word in enumerate(vocab)}, bos_token="[DEC]",
                         model_max_length=64, clean_up_tokenization_spaces=True)


def new_blip(tokenizer: BertTokenizer) -> BlipForConditionalGeneration:
    text = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "encoder_hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
            "projection_dim": WIDTH, "max_position_embeddings": 64,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 4,
              "num_attention_heads": 4, "image_size": pictures.SIZE, "patch_size": 8,
              "projection_dim": WIDTH, "initializer_range": 0.02}
    return BlipForConditionalGeneration(BlipConfig(
        text_config=text, vision_config=vision, projection_dim=WIDTH, image_text_hidden_size=WIDTH))


class Pupil(nn.Module):
    """BLIP with heads for its training only: they name the facts, and predict the trained CLIP's
    embedding and 8 x 8 features (distillation from a convolutional teacher, Touvron et al. 2021,
    arXiv 2012.12877). Without them, a vision transformer this small needs several times the
    pictures, and can't read prints in unknown inks."""

    def __init__(self, blip: BlipForConditionalGeneration) -> None:
        super().__init__()
        self.blip = blip
        self.heads = nn.ModuleDict({k: nn.Linear(WIDTH, len(w)) for k, w in WORDS.items()})
        self.whole = nn.Linear(WIDTH, CLIP_CONFIG["model_cfg"]["embed_dim"])
        self.parts = nn.Linear(WIDTH, TEACHER_CHANNELS)

    def loss(self, pixels: Tensor, ids: Tensor, facts: list[dict[str, str]],
             whole: Tensor, parts: Tensor) -> Tensor:
        # Padding is not learned.
        labels = ids.masked_fill(ids == self.blip.decoder_pad_token_id, -100)
        features = self.blip.vision_model(pixel_values=pixels).last_hidden_state
        loss: Tensor = self.blip.text_decoder(
            ids, attention_mask=(labels != -100).long(), encoder_hidden_states=features,
            labels=labels).loss
        for kind, head in self.heads.items():
            loss = loss + 0.25 * of_list(head(features[:, 0]), kind, facts)
        loss = loss + 2 * (1 - F.cosine_similarity(self.whole(features[:, 0]), whole,
                                                   dim=-1)).mean()
        return loss + F.mse_loss(self.parts(features[:, 1:]).float(), parts)


class Teacher:
    """The demo CLIP's (N, 64) embeddings and (N, 8 * 8, channels) features of a batch."""

    def __init__(self, folder: Path) -> None:
        self.clip = new_clip()
        self.clip.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
        self.clip.eval().requires_grad_(False)
        self.clip.visual.layer2.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, given: tuple[Tensor], made: Tensor) -> None:
        self.map = made

    @torch.no_grad()
    def view(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        whole = self.clip.encode_image(pixels, normalize=True).float()
        rows = self.map.float().flatten(2).transpose(1, 2)
        return whole, F.layer_norm(rows, rows.shape[-1:])


def blip_loss(pupil: Pupil, teacher: Teacher, tokenizer: BertTokenizer, data: World,
              shares: Tensor, batch: int = 96) -> Tensor:
    chosen = torch.multinomial(shares, batch, replacement=True)
    facts = [data.facts[i] for i in chosen.tolist()]
    ids = tokenizer([sentence(f) for f in facts], padding=True, return_tensors="pt").input_ids
    ids[:, 0] = tokenizer.bos_token_id
    pixels = augment(data.images[chosen])
    # It halves the time of a step on CPUs that have bfloat16.
    with torch.autocast("cpu", torch.bfloat16):
        return pupil.loss(pixels.contiguous(), ids, facts, *teacher.view(pixels))


@torch.no_grad()
def blip_right(blip: BlipForConditionalGeneration, tokenizer: BertTokenizer, data: World
               ) -> dict[str, float]:
    """The share of sentences that name the subject, and of those that are right in every word."""
    ids = blip.generate(pixel_values=as_pixels(data.images), max_new_tokens=LONGEST,
                        do_sample=False)
    sentences = tokenizer.batch_decode(ids, skip_special_tokens=True)
    named = [f" {f['subject']} " in f" {t.replace(',', '')} "
             and not (f["subject"] == "tree" and "pine tree" in t)
             for t, f in zip(sentences, data.facts, strict=True)]
    exact = [t == sentence(f) for t, f in zip(sentences, data.facts, strict=True)]
    return {"subject": float(np.mean(named)), "sentence": float(np.mean(exact))}


def train_blip(args: argparse.Namespace) -> None:
    torch.manual_seed(1)
    data = world(args, POOL, 11, held=False)
    held, dusk = world(args, 400, 21, True), world(args, 200, 31, True, pictures.LORA_STYLE)
    tokenizer = blip_tokenizer()
    pupil, teacher = Pupil(new_blip(tokenizer)), Teacher(args.out / "captioners" / "clip")
    # Prints in random inks are the hardest to learn.
    shares = torch.tensor([2.0 if f["style"] == PRINT else 1.0 for f in data.facts])

    def look(average: nn.Module) -> str:
        results = {n: blip_right(average.blip, tokenizer, w)
                   for n, w in (("held", held), ("dusk", dusk))}
        save_blip(average.blip, tokenizer, args.work / "captioners" / "blip")
        return " ".join(f"{n}:{k}={v:.3f}" for n, s in results.items() for k, v in s.items())
    trained = run(pupil, args, "blip", args.caption_steps or 3500, args.rate or 1e-3,
                  lambda: blip_loss(pupil, teacher, tokenizer, data, shares), look)
    print("blip", look(trained))
    save_blip(trained.blip, tokenizer, args.out / "captioners" / "blip")


def save_blip(blip: BlipForConditionalGeneration, tokenizer: BertTokenizer, folder: Path) -> None:
    # A copy, as half() would change the model that goes on learning.
    copied = BlipForConditionalGeneration(blip.config)
    copied.load_state_dict(blip.state_dict())
    copied.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    # The file is in half precision; with this from_pretrained loads it in full precision.
    config = folder / "config.json"
    settings = json.loads(config.read_text("utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
    size = {"height": pictures.SIZE, "width": pictures.SIZE}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(folder)
