"""A loaded base that draws, with any number of LoRAs; draw.py is the job around it."""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from core import families, i18n, paths, prompt_markup
from core.adapters import from_file, lora
from core.config import GenerateConfig, size_of
from core.dataset.text_embeddings import reading_of, trimmed, unread, unused_of
from core.errors import UserError
from core.failures import ran_out
from core.families import distilled, schedulers
from core.families.base import ALL_PARTS, Family, Objective, Parts
from core.families.common import UNetFamily
from core.families.components import lookup
from core.families.loading import tell_numbers
from core.families.registry import CHUNK, SPECS, STANDARD
from core.hashes import data_hash, fingerprint, short_hash
from core.inference.trash import TRASH
from core.jobs.events import Event, Note
from core.lora_files import formats, textual_inversion
from core.lora_files.files import read_lora
from core.lora_files.layers import kind_of
from core.lora_files.library import Lora, checked
from core.lora_files.metadata import BASE_KEY, CONFIG_KEY
from core.objectives.diffusion import zero_terminal
from core.safetensors_header import read_header
from core.weights.precision import Precision, autocast, choose


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Everything that decides one picture, besides base and LoRAs."""

    prompt: str
    negative: str
    seed: int
    steps: int
    cfg: float
    size: tuple[int, int]                  # px, width and height
    sampler: str = "auto"


class PipelineSession:
    """A loaded base that draws; LoRA files are read once and switched by weight."""

    def __init__(self, source: Path, config: GenerateConfig, emit: Callable[[Event], None]) -> None:
        self.source, self.emit, self.distilled = source, emit, config.distilled
        kind = families.detect(source) if config.family == "auto" else config.family
        self.family: Family = families.get(kind, lookup.files_from_config(config))
        self.precision = choose(config.precision, config.device, families.outgrows_fp16(kind))
        tell_numbers(config.precision, kind, self.precision, emit)
        self._adapters: dict[Path, str] = {}
        self._words: dict[Path, dict[str, str]] = {}
        self._active_words: dict[str, str] = {}     # new words -> their tokens
        self._negative_unused_reported = False

    def _note(self, key: str, **params: Any) -> None:
        self.emit(Note(key=key, params=params))

    def shot(self, config: GenerateConfig, prompt: str) -> SampleRequest:
        """The request for one picture; the base's own numbers where the config has none. Raises
        UserError for a size that the base can't draw."""
        side = self.parts.native_size
        size = size_of(config.size) or (side, side)
        # a flow's transformer takes 2 x 2 latents as one token
        unit = min(self.parts.bucket_step, max(8, getattr(self.pipeline, "vae_scale_factor", 8) * (
            2 if self.parts.flow else 1)))
        if any(side % unit for side in size):
            raise UserError("generate.bad_size", width=size[0], height=size[1], unit=unit,
                            near=" x ".join(str(max(unit, round(side / unit) * unit))
                                            for side in size))
        cfg, steps = distilled.drawing(config.cfg, config.steps, self.family.spec.cfg,
                                       distilled.STEPS, self.parts.distilled)
        if (few := self.parts.distilled) and None in (config.cfg, config.steps):
            self._note("distilled.drawn", sign=few.sign, steps=steps, cfg=f"{cfg:g}")
        return SampleRequest(prompt, config.negative, config.seed, steps, cfg, size, config.sampler)

    def tell_unread(self, shot: SampleRequest) -> None:
        """Reports the end of a prompt that is beyond the base's token limit, and weights that this
        base's text encoders can't take."""
        limit = self.family.token_limit(self.parts)
        for key, text in (("prompt", shot.prompt), ("negative", shot.negative)):
            is_clip = isinstance(self.family, UNetFamily)
            if not is_clip:
                self._tell_markup(text)
            text = textual_inversion.expand(text, self._active_words)
            sections = prompt_markup.sections(text) if is_clip else [text]
            begin, total, rest = 0, 0, []
            for section in sections:
                tokens = self.family.count_tokens(self.parts, [section])[0]
                rest.append(unread(self.family, self.parts, section, max(0, limit - begin)))
                # BREAK leaves the rest of a chunk empty
                begin, total = begin + max(1, -(-tokens // CHUNK)) * CHUNK, begin + tokens
            if any(rest):
                self._note(f"generate.{key}_too_long", tokens=total, limit=limit,
                           rest=" BREAK ".join(filter(None, rest))[:200])

    def _tell_markup(self, text: str) -> None:
        others = frozenset(prompt_markup.KINDS) - prompt_markup.BY_CLIP
        if parts := prompt_markup.found(text, others):
            self._note("generate.not_by_this_base", parts=", ".join(parts.values()),
                       family=self.family.spec.title)

    def read_as(self, config: GenerateConfig, loras: Sequence[Lora]) -> None:
        """Sets how prompts are read. Where the config leaves clip skip open, it is that of the
        first LoRA whose metadata name one."""
        skips: dict[str, int] = {}
        for item in loras if self.family.spec.skips else ():
            skip = read_header(formats.weights_file(item.path)).metadata.get("ss_clip_skip", "")
            if skip.isdigit() and 1 <= int(skip) <= 12:
                skips[item.path.stem] = int(skip)
        reading = reading_of(config, next(iter(skips.values()), 1))
        if unused := unused_of(self.family, reading):
            self._note("engine.not_for_family", keys=", ".join(unused),
                       family=self.family.spec.title)
        others = ", ".join(f"{name} ({skip})" for name, skip in skips.items()
                           if skip != reading.clip_skip)
        if others:
            self._note("generate.other_clip_skip", clip_skip=reading.clip_skip, loras=others)
        elif config.clip_skip is None and reading.clip_skip > 1:
            self._note("generate.clip_skip", clip_skip=reading.clip_skip, loras=", ".join(skips))
        self.parts.reading = reading

    def predict_as(self, config: GenerateConfig, loras: Sequence[Lora]) -> None:
        """Sets what the base predicts, and whether its schedule ends in pure noise: as the config
        says; else as the LoRAs say that were trained on this very base."""
        parts = self.parts
        if parts.flow is not None:
            if config.prediction_type != "auto":
                self._note("engine.not_for_flows", keys="prediction_type")
            return
        trained = [(item.path.stem, trained_as) for item in loras
                   if (trained_as := TrainedAs.of(item.path))]
        on_this_base = [(name, trained_as) for name, trained_as in trained
                        if trained_as.on(self.family, self.source)]
        prediction = on_this_base[0][1].prediction if on_this_base else parts.objective
        if config.prediction_type == "auto" and prediction != parts.objective:
            self._note("generate.prediction", prediction=prediction, base=parts.objective,
                       lora=on_this_base[0][0])
        parts.objective = prediction if config.prediction_type == "auto" else config.prediction_type
        parts.scheduler["prediction_type"] = parts.objective
        others = [f"{name} ({trained_as.prediction})" for name, trained_as in trained
                  if trained_as.prediction != parts.objective]
        if others:
            self._note("generate.other_prediction", prediction=parts.objective,
                       loras=", ".join(others))
        zero = [name for name, trained_as in on_this_base if trained_as.zero_snr]
        if zero and parts.objective == "v_prediction" and not parts.scheduler.get(
                "rescale_betas_zero_snr"):
            zero_terminal(parts)
            self._note("generate.zero_snr", loras=", ".join(zero))

    def load(self) -> None:
        lookup.announce(self.family, self.source, self.emit)
        self.parts: Parts = self.family.load(self.source, self.precision, ALL_PARTS)
        self.take_distilled()
        self.pipeline: Any = self.family.pipeline(self.parts)

    def take_distilled(self) -> None:
        """Takes the base for distilled or not as the user says, where its name doesn't tell."""
        if self.distilled != "auto":
            self.parts.take_as(distilled.of(self.source, self.distilled))

    def check(self, loras: Iterable[Lora]) -> None:
        """Raises UserError for a LoRA of another family, by its header; needs no loaded base."""
        if self.family.spec.id in families.SPECS:   # a family of the user's own may take any file
            for path in {item.path: None for item in loras}:
                checked(formats.weights_file(path), self.family.spec.id)

    def use(self, loras: Sequence[Lora]) -> None:
        """Switches to these LoRAs and reads new ones. Weight 0 switches a file off: the picture is
        the base's own, to the bit. Raises UserError for a file that doesn't fit the base."""
        family, components = self.family.spec.id, self.pipeline.components
        active = [item for item in loras if item.weight != 0 or item.text]
        for path in {item.path: None for item in active if item.path not in self._adapters}:
            name = load_adapter(self.pipeline, path, f"lora{len(self._adapters)}", family)
            found, expected = lora.count(components.values(), name), modules_in(path, family)
            if found < expected:
                self._note("generate.lora_partly", file=str(path), found=found, expected=expected)
            self._adapters[path] = name
            self._words[path] = load_words(self.parts, path, self.emit)
        self._active_words = {word: tokens for item in active
                              for word, tokens in self._words[item.path].items()}
        # text encoders may have a weight of their own
        text_encoders = [model for _, model in textual_inversion.encoders(self.parts.text).values()]
        others = [component for component in components.values()
                  if not any(component is model for model in text_encoders)]
        lora.use(others, {self._adapters[item.path]: item.weight for item in active})
        lora.use(text_encoders, {self._adapters[item.path]: (
            item.weight if item.text is None else item.text) for item in active})

    def draw(self, shot: SampleRequest,
             each_step: Callable[[], None] = lambda: None) -> Image.Image:
        """`each_step` is called after each denoising step; what it raises ends the picture."""
        def on_step_end(_: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            each_step()
            return values
        prompt, negative = (textual_inversion.expand(text, self._active_words)
                            for text in (shot.prompt, shot.negative))
        arguments = read_prompt(self.family, self.parts, self.precision, prompt, negative,
                                weighted=True)
        if shot.negative and not self._negative_unused_reported and (
                shot.cfg <= 1 or not any("negative" in name for name in arguments)):
            self._negative_unused_reported = True
            self._note("generate.negative_unused", cfg=f"{shot.cfg:g}",
                       family=self.family.spec.title)
        return draw(self.pipeline, self.parts, shot,
                    {**arguments, "callback_on_step_end": on_step_end}, self.precision)

    def describe(self, shot: SampleRequest, loras: Sequence[Lora]) -> str:
        """The parameters in A1111's form, as other programs read them from the PNG."""
        lines = [shot.prompt + "".join(f" {item.tag}" for item in loras)]
        if shot.negative:
            lines.append(f"Negative prompt: {shot.negative}")
        facts = [f"Steps: {shot.steps}", f"Sampler: {schedulers.label(self.pipeline.scheduler)}",
                 f"CFG scale: {shot.cfg:g}", f"Seed: {shot.seed}",
                 f"Size: {shot.size[0]}x{shot.size[1]}"]
        if self.parts.reading.clip_skip > 1:
            facts.append(f"Clip skip: {self.parts.reading.clip_skip}")
        facts.append(f"Model: {self.source.stem}")
        if loras:
            hashes = [f"{item.path.stem}: {data_hash(formats.weights_file(item.path))[:12]}"
                      for item in loras]
            facts.append(f'Lora hashes: "{", ".join(hashes)}"')
        return "\n".join([*lines, ", ".join(facts)])


def read_prompt(family: Family, parts: Parts, precision: Precision, prompt: str,
                negative: str = "", weighted: bool = False) -> dict[str, Any]:
    """The pipeline's arguments for a prompt, encoded as captions are (core/dataset/examples.py).
    `weighted`: where CLIP reads it, its parts may have weights."""
    texts = [prompt, negative]
    spans = [prompt_markup.spans(text) if weighted else [(text, 1.0)] for text in texts]
    with torch.no_grad(), autocast(precision):
        both = (family.encode_spans(parts, spans)
                if isinstance(family, UNetFamily) and spans != [[(text, 1.0)] for text in texts]
                else family.encode_text(parts, texts))
        rows = [trimmed({name: value[n:n + 1].to(precision.compute)
                         for name, value in both.items()}) for n in range(2)]
        return family.prompt_arguments(*rows)


def draw(pipeline: Any, parts: Parts, shot: SampleRequest, arguments: dict[str, Any],
         precision: Precision) -> Image.Image:
    """One picture. Noise comes from a CPU generator of its own, so that neither the device's
    generator nor the number of pictures changes it."""
    pipeline.scheduler = schedulers.create(shot.sampler, parts)
    with torch.no_grad(), autocast(precision):
        image: Image.Image = pipeline(
            **arguments, width=shot.size[0], height=shot.size[1], num_inference_steps=shot.steps,
            **{parts.guidance: shot.cfg - 1 + parts.no_guidance_value},
            generator=torch.Generator().manual_seed(shot.seed),
        ).images[0]
    return image


def load_adapter(pipeline: Any, path: Path, name: str, family: str = "") -> str:
    """Loads a LoRA file by diffusers' own reader, or by core.adapters.from_file what that can't
    read. Raises UserError where none of it fits the base."""
    keys = read_header(formats.weights_file(path)).tensors
    known = family if family in SPECS else ""
    beyond_diffusers = from_file.is_ours(keys)
    source: Any = (formats.read if beyond_diffusers else formats.for_diffusers)(path, known)
    if source is None:
        read_lora(path)                     # raises where it is no LoRA, or holds NaN
    try:
        with warnings.catch_warnings():     # peft warns of a second adapter, which is meant
            warnings.simplefilter("ignore")
            # diffusers refuses a file that holds words
            without_words = textual_inversion.unbundled(path)
            if beyond_diffusers:
                from_file.load(pipeline.components, source, name)
            elif source or without_words:
                pipeline.load_lora_weights(source or without_words, adapter_name=name)
            else:
                pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name,
                                           local_files_only=True)
    except Exception as error:              # its key parsers raise nearly anything
        if ran_out(error):
            raise
        reason = (str(error).strip().splitlines() or ["?"])[0][:200]
        raise UserError("generate.lora_refused", file=path, keys=len(keys),
                        reason=reason) from error
    # its readers pass over keys that name no layer of the model, even all of them
    if not lora.count(pipeline.components.values(), name):
        raise UserError("generate.lora_refused", file=path, keys=len(keys),
                        reason=i18n.tr("generate.no_key_fits"))
    return name


def load_words(parts: Parts, path: Path,
               emit: Callable[[Event], None] | None = None) -> dict[str, str]:
    """Adds the new words of a LoRA file to the base's encoders. -> word: its tokens in a text.
    A file that was trained with words and lost them is reported by a note."""
    tokens = textual_inversion.add_to(parts.text, textual_inversion.read(path),
                                      path) if parts.text else {}
    run_config = "" if path.is_dir() else read_header(path).metadata.get(CONFIG_KEY, "")
    if not tokens and emit and "pivotal_tokens" in run_config:
        emit(Note(key="generate.words_missing", params={
            "file": path.name, "words": textual_inversion.beside(path).name}))
    return tokens


@dataclass(frozen=True, slots=True)
class TrainedAs:
    """What the metadata of a LoRA file say about the base that it was trained on."""

    prediction: Objective
    zero_snr: bool
    fingerprint: str                        # in files of this trainer
    short_hash: str                         # in kohya's, where the base was a file

    @classmethod
    def of(cls, path: Path) -> TrainedAs | None:
        """None: the file doesn't say what its base predicted."""
        metadata = read_header(formats.weights_file(path)).metadata
        objectives: dict[str, Objective] = {"epsilon": "epsilon", "v": "v_prediction"}
        objective = objectives.get(metadata.get("modelspec.prediction_type", ""))
        return objective and cls(objective, metadata.get("ss_zero_terminal_snr") == "True",
                                 metadata.get(BASE_KEY, ""), metadata.get("ss_sd_model_hash", ""))

    def on(self, family: Family, source: Path) -> bool:
        """Whether that base was `source`."""
        if self.fingerprint:
            return self.fingerprint == fingerprint(family.weight_files(source, "denoiser"))
        return source.is_file() and self.short_hash == short_hash(source)


def modules_in(path: Path, family: str = "") -> int:
    """The number of adapted layers in a file. A fused layer counts as the layers that it is made
    of."""
    layers = formats.read(path, family if family in SPECS else STANDARD.id).layers.values()
    # whole differences are read by `convert` alone
    return sum(kind_of(layer) != "full" for layer in layers)


def save_png(image: Image.Image, path: Path, parameters: str,
             put: Callable[[Path, Path], object] | None = None) -> Path:
    """PNG with its parameters in the A1111 text chunk; `put`: see paths.atomic."""
    with paths.atomic(path, put) as temporary:
        write_png(image, temporary, parameters)
    return path


def write_png(image: Image.Image, path: Path, parameters: str) -> None:
    info = PngInfo()
    # a plain text chunk is Latin-1
    info.add_itxt("parameters", parameters) if not parameters.isascii() else info.add_text(
        "parameters", parameters)
    image.save(path, "PNG", pnginfo=info)


def save_numbered(image: Image.Image, folder: Path, parameters: str, stem: str = "") -> Path:
    """Saves under the next free number: nothing is overwritten, whoever else draws there."""
    paths.mark(folder)
    # deleted pictures count: they may be restored
    taken = [int(m[1]) for p in (*folder.glob("*.png"), *folder.glob(f"{TRASH}/*.png"))
             if (m := re.search(r"(\d+)$", p.stem))]
    for number in itertools.count(max(taken, default=0) + 1):
        with contextlib.suppress(FileExistsError):
            return save_png(image, folder / f"{stem}{number:05d}.png", parameters, paths.move)
    raise AssertionError("numbers have no end")
