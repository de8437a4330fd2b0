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

from core import families, i18n, paths
from core.adapters import from_file, lora
from core.config import GenerateConfig, size_of
from core.dataset.text_embeddings import reading_of, trimmed, unread, unused_of
from core.errors import UserError
from core.families import distilled, schedulers
from core.families.base import ALL_PARTS, Family, Objective, Parts
from core.families.components import lookup
from core.families.loading import tell_numbers
from core.families.registry import SPECS
from core.hashes import data_hash, fingerprint, short_hash
from core.inference.trash import TRASH
from core.jobs.events import Event, Note
from core.lora_files import formats, textual_inversion
from core.lora_files.files import read_lora
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

    def __init__(self, source: Path, config: GenerateConfig,
                 emit: Callable[[Event], None]) -> None:
        self.source, self.emit, self.distilled = source, emit, config.distilled
        kind = families.detect(source) if config.family == "auto" else config.family
        self.family: Family = families.get(kind, lookup.files_from_config(config))
        self.precision = choose(config.precision, config.device,
                                families.outgrows_fp16(kind))
        tell_numbers(config.precision, kind, self.precision, emit)
        self._adapters: dict[Path, str] = {}
        self._words: dict[Path, dict[str, str]] = {}
        self._active: dict[str, str] = {}           # new words -> their tokens
        self._told: set[str] = set()

    def shot(self, config: GenerateConfig, prompt: str) -> SampleRequest:
        """What a config asks of one picture; its own numbers where it says nothing."""
        side = self.parts.native_size
        size = size_of(config.size) or (side, side)
        unit = min(self.parts.bucket_step, max(8, getattr(self.pipeline, "vae_scale_factor", 8) * (
            2 if self.parts.flow else 1)))
        if any(side % unit for side in size):
            near = " x ".join(str(max(unit, round(side / unit) * unit)) for side in size)
            raise UserError("generate.bad_size", width=size[0], height=size[1], unit=unit,
                            near=near)
        cfg, steps = distilled.drawing(config.cfg, config.steps, self.family.spec.cfg,
                                       distilled.STEPS, self.parts.distilled)
        if (few := self.parts.distilled) and None in (config.cfg, config.steps):
            self.emit(Note(key="distilled.drawn", params={
                "sign": few.sign, "steps": steps, "cfg": f"{cfg:g}"}))
        return SampleRequest(prompt, config.negative, config.seed, steps, cfg, size,
                             config.sampler)

    def tell_unread(self, shot: SampleRequest) -> None:
        """What of the prompts is beyond the base's limit."""
        for key, text in (("prompt", shot.prompt), ("negative", shot.negative)):
            text = textual_inversion.expand(text, self._active)
            if rest := unread(self.family, self.parts, text):
                self.emit(Note(key=f"generate.{key}_too_long", params={
                    "tokens": self.family.count_tokens(self.parts, [text])[0],
                    "limit": self.family.token_limit(self.parts), "rest": rest[:200]}))

    def read_as(self, config: GenerateConfig, loras: Sequence[Lora]) -> None:
        """How prompts are read: where the config leaves clip skip open, as the first LoRA that says
        something was trained."""
        told = {one.path.stem: skip for one in loras if (skip := trained_skip(one.path))
                } if self.family.spec.skips else {}
        reading = reading_of(config, next(iter(told.values()), 1))
        if unused := unused_of(self.family, reading):
            self.emit(Note(key="engine.not_for_family", params={
                "keys": ", ".join(unused), "family": self.family.spec.title}))
        others = ", ".join(f"{name} ({skip})" for name, skip in told.items()
                           if skip != reading.clip_skip)
        if others:
            self.emit(Note(key="generate.other_clip_skip", params={
                "clip_skip": reading.clip_skip, "loras": others}))
        elif config.clip_skip is None and reading.clip_skip > 1:
            self.emit(Note(key="generate.clip_skip", params={
                "clip_skip": reading.clip_skip, "loras": ", ".join(told)}))
        self.parts.reading = reading

    def predict_as(self, config: GenerateConfig, loras: Sequence[Lora]) -> None:
        """What the base predicts, and whether its schedule ends in noise alone: as the config
        says; else as previews of the LoRAs that were trained on this very base were drawn."""
        parts = self.parts
        if parts.flow is not None:
            if config.prediction_type != "auto":
                self.emit(Note(key="engine.not_for_flows", params={"keys": "prediction_type"}))
            return
        told = [(one.path.stem, said) for one in loras if (said := trained_prediction(one.path))]
        here = [(name, said) for name, said in told if said.on(self.family, self.source)]
        own = here[0][1].prediction if here else parts.objective
        if config.prediction_type == "auto" and own != parts.objective:
            self.emit(Note(key="generate.prediction", params={
                "prediction": own, "base": parts.objective, "lora": here[0][0]}))
        parts.objective = own if config.prediction_type == "auto" else config.prediction_type
        parts.scheduler["prediction_type"] = parts.objective
        others = [f"{name} ({said.prediction})" for name, said in told
                  if said.prediction != parts.objective]
        if others:
            self.emit(Note(key="generate.other_prediction", params={
                "prediction": parts.objective, "loras": ", ".join(others)}))
        if (zero := [name for name, said in here if said.zero_snr]) and (
                parts.objective == "v_prediction"
                and not parts.scheduler.get("rescale_betas_zero_snr")):
            zero_terminal(parts)
            self.emit(Note(key="generate.zero_snr", params={"loras": ", ".join(zero)}))

    def load(self) -> None:
        lookup.announce(self.family, self.source, self.emit)
        self.parts: Parts = self.family.load(self.source, self.precision, ALL_PARTS)
        self.take_distilled()
        self.pipeline: Any = self.family.pipeline(self.parts)

    def take_distilled(self) -> None:
        """As the user says, where the name doesn't tell."""
        if self.distilled != "auto":
            self.parts.take_as(distilled.of(self.source, self.distilled))

    def use(self, loras: Sequence[Lora]) -> None:
        """Switches LoRAs. Weight 0 switches a file off: the base's own picture, to the bit."""
        active = [item for item in loras if item.weight != 0 or item.text]
        for item in active:
            if item.path not in self._adapters:
                self._adapters[item.path] = self._load(item.path)
                self._words[item.path] = load_words(self.parts, item.path, self.emit)
        self._active = {word: tokens for item in active
                        for word, tokens in self._words[item.path].items()}
        texts = [model for _, model in textual_inversion.encoders(self.parts.text).values()]
        others = [one for one in self.pipeline.components.values()
                  if not any(one is model for model in texts)]
        lora.use(others, {self._adapters[item.path]: item.weight for item in active})
        lora.use(texts, {self._adapters[item.path]: item.weight if item.text is None else item.text
                         for item in active})

    def _load(self, path: Path) -> str:
        family = self.family.spec.id
        if family in families.SPECS:      # a family of the user's own may take any file
            checked(formats.weights_file(path), family)
        name = load_adapter(self.pipeline, path, f"lora{len(self._adapters)}", family)
        found = lora.count(self.pipeline.components.values(), name)
        expected = modules_in(path, family)
        if found < expected:
            self.emit(Note(key="generate.lora_partly", params={
                "file": str(path), "found": found, "expected": expected}))
        return name

    def draw(self, shot: SampleRequest,
             each_step: Callable[[], None] = lambda: None) -> Image.Image:
        """`each_step` is called after each denoising step; what it raises ends the picture."""
        def called(_: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            each_step()
            return values
        texts = [textual_inversion.expand(text, self._active) for text in (shot.prompt,
                                                                           shot.negative)]
        arguments = read_prompt(self.family, self.parts, self.precision, *texts)
        if shot.negative and "cfg" not in self._told and (
                shot.cfg <= 1 or not any("negative" in name for name in arguments)):
            self._told.add("cfg")
            self.emit(Note(key="generate.negative_unused", params={
                "cfg": f"{shot.cfg:g}", "family": self.family.spec.title}))
        return draw(self.pipeline, self.parts, shot,
                    {**arguments, "callback_on_step_end": called}, self.precision)

    def describe(self, shot: SampleRequest, loras: Iterable[Lora]) -> str:
        """The parameters in A1111's form, as other programs read them from the PNG."""
        loras = list(loras)
        tags = "".join(f" {one.tag}" for one in loras)
        sampler = schedulers.label(self.pipeline.scheduler)
        lines = [shot.prompt + tags]
        if shot.negative:
            lines.append(f"Negative prompt: {shot.negative}")
        facts = [f"Steps: {shot.steps}", f"Sampler: {sampler}", f"CFG scale: {shot.cfg:g}",
                 f"Seed: {shot.seed}", f"Size: {shot.size[0]}x{shot.size[1]}",
                 *([f"Clip skip: {skip}"] if (skip := self.parts.reading.clip_skip) > 1 else []),
                 f"Model: {self.source.stem}"]
        hashes = ", ".join(f"{x.path.stem}: {data_hash(formats.weights_file(x.path))[:12]}"
                           for x in loras)
        if hashes:
            facts.append(f'Lora hashes: "{hashes}"')
        return "\n".join([*lines, ", ".join(facts)])


def read_prompt(family: Family, parts: Parts, precision: Precision, prompt: str,
                negative: str = "") -> dict[str, Any]:
    """The pipeline's arguments for a prompt, encoded as captions are (core/dataset/examples.py)."""
    with torch.no_grad(), autocast(precision):
        both = family.encode_text(parts, [prompt, negative])
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
    ours = from_file.is_ours(keys)
    source: Any = formats.read(path, known) if ours else (
        formats.for_diffusers(path, known))
    if source is None:
        read_lora(path)                     # refuses what is none, and NaN
    try:
        with warnings.catch_warnings():     # peft warns of a second adapter, which is meant
            warnings.simplefilter("ignore")
            # diffusers refuses a file that holds words
            plain = textual_inversion.unbundled(path)
            if ours:
                from_file.load(pipeline.components, source, name)
            elif source or plain:
                pipeline.load_lora_weights(source or plain, adapter_name=name)
            else:
                pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name,
                                           local_files_only=True)
    except Exception as error:              # its key parsers raise nearly anything
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            raise
        reason = (str(error).strip().splitlines() or ["?"])[0][:200]
        raise UserError("generate.lora_refused", file=path, keys=len(keys),
                        reason=reason) from error
    if not lora.count(pipeline.components.values(), name):
        raise UserError("generate.lora_refused", file=path, keys=len(keys),
                        reason=i18n.tr("generate.no_key_fits"))
    return name


def load_words(parts: Parts, path: Path,
               emit: Callable[[Event], None] | None = None) -> dict[str, str]:
    """The new words of a LoRA file, added to the base's encoders. -> word: its tokens in a text.
    A file that was trained with words and lost them is told by a note."""
    found = textual_inversion.add_to(parts.text, textual_inversion.read(path),
                                     path) if parts.text else {}
    told = "" if path.is_dir() else read_header(path).metadata.get(CONFIG_KEY, "")
    if not found and emit and "pivotal_tokens" in told:
        emit(Note(key="generate.words_missing", params={
            "file": path.name, "words": textual_inversion.beside(path).name}))
    return found


@dataclass(frozen=True, slots=True)
class TrainedAs:
    """What a LoRA file says of the base that it was trained on."""

    prediction: Objective
    zero_snr: bool
    fingerprint: str                        # of our files
    short: str                              # of kohya's, where the base was a file

    def on(self, family: Family, source: Path) -> bool:
        """Whether that base was `source`."""
        if self.fingerprint:
            return self.fingerprint == fingerprint(family.weight_files(source, "denoiser"))
        return source.is_file() and self.short == short_hash(source)


def trained_prediction(path: Path) -> TrainedAs | None:
    """None: the file doesn't say what its base predicted."""
    told = read_header(formats.weights_file(path)).metadata
    kinds: dict[str, Objective] = {"epsilon": "epsilon", "v": "v_prediction"}
    kind = kinds.get(told.get("modelspec.prediction_type", ""))
    return kind and TrainedAs(kind, told.get("ss_zero_terminal_snr") == "True",
                              told.get(BASE_KEY, ""), told.get("ss_sd_model_hash", ""))


def trained_skip(path: Path) -> int:
    """The clip skip that a LoRA file says it was trained with; 0: it says nothing."""
    told = read_header(formats.weights_file(path)).metadata.get("ss_clip_skip", "")
    return int(told) if told.isdigit() and 1 <= int(told) <= 12 else 0


def modules_in(path: Path, family: str = "") -> int:
    """Adapted layers of a file: one of these each, but fused ones count as their parts."""
    if formats.fuses(family):
        return len(formats.read(path, family).layers)
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(k.endswith((".lora_down.weight", ".lora_A.weight", ".hada_w1_a", ".lokr_w1",
                           ".lokr_w1_a", ".oft_blocks"))
               for file in files for k in read_header(file).tensors)


def save_png(image: Image.Image, path: Path, parameters: str,
             put: Callable[[Path, Path], object] | None = None) -> Path:
    """PNG with its parameters in the A1111 text chunk; `put`: see paths.atomic."""
    with paths.atomic(path, put) as temporary:
        write_png(image, temporary, parameters)
    return path


def write_png(image: Image.Image, path: Path, parameters: str) -> None:
    info = PngInfo()
    info.add_itxt("parameters", parameters) if not parameters.isascii() else info.add_text(
        "parameters", parameters)
    image.save(path, "PNG", pnginfo=info)


def save_numbered(image: Image.Image, folder: Path, parameters: str, stem: str = "") -> Path:
    """Saves under the next free number: nothing is overwritten, whoever else draws there."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(m[1]) for p in (*folder.glob("*.png"), *folder.glob(f"{TRASH}/*.png"))
             if (m := re.search(r"(\d+)$", p.stem))]
    for number in itertools.count(max(taken, default=0) + 1):
        with contextlib.suppress(FileExistsError):
            return save_png(image, folder / f"{stem}{number:05d}.png", parameters, paths.move)
    raise AssertionError("numbers have no end")
