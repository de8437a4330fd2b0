"""What a run leaves behind: checkpoints, the best one, the final LoRA with its metadata."""

from __future__ import annotations

import io
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from core import (
    __version__,
    adapter_file,
    captions,
    checkpoint,
    lora,
    lora_file,
    lora_formats,
    lora_metadata,
    new_words,
    optim,
    pictures,
)
from core.config import dump_yaml, size_of
from core.events import Checkpoint, Note
from core.examples import Example
from core.lora_metadata import Bucket, Folder, TrainFacts, build_metadata

if TYPE_CHECKING:
    from core.engine import Trainer

SAVE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_THUMBNAIL = 256            # px


class Keeper:
    """Owns the output folder's names. A LoRA that is there already is kept: the new one gets the
    next free name."""

    def __init__(self, trainer: Trainer, output: Path, began: float) -> None:
        self.trainer, self.output, self.began = trainer, output, began
        self.config = trainer.config
        self.session = str(uuid.uuid4().int % 10**10)
        self.name = self._free_name()
        self.last: Path | None = None
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self._base = _BaseHash(trainer.parts.source)

    def resume(self) -> int:
        """Restores the newest checkpoint; 0 and a note where there is none."""
        found = checkpoint.find(self.output, self.config.name)
        if found is None:
            self.trainer.emit(Note(key="engine.nothing_to_resume",
                                   params={"folder": str(self.output)}))
            return 0
        position, adapter, optimizer = checkpoint.load(found)
        optim.check_same(position.config.get("optimizer", "adamw"), self.config.optimizer)
        self.trainer.load_state(adapter)
        checkpoint.restore_optimizer(self.trainer.optimizer, optimizer)
        if position.scaler:
            self.trainer.scaler.load_state_dict(position.scaler)
        self.name, self.session, self.last = position.name, position.session, found
        self.best_loss, self.best_step = position.best_loss, position.best_step
        self.trainer.emit(Note(key="engine.resumed", params={
            "step": position.update, "path": str(found)}))
        return position.update

    def remember(self, step: int, validation: float) -> None:
        if self.best_loss is None or validation < self.best_loss:
            self.best_loss, self.best_step = validation, step

    def checkpoint(self, step: int) -> None:
        trainer = self.trainer
        scaler = trainer.scaler.state_dict() or None
        position = checkpoint.Position(
            update=step, name=self.name, config=self.config.model_dump(), session=self.session,
            started=self.began, seconds=time.time() - self.began, best_loss=self.best_loss,
            best_step=self.best_step, scaler=scaler)
        self.last = checkpoint.save(self.output, position, trainer.state(), trainer.optimizer,
                                    lambda path: self._write(path, step))
        trainer.emit(Checkpoint(step=step, path=str(self.last), best=step == self.best_step))
        checkpoint.prune(self.output, self.name, self.config.keep_checkpoints,
                         {s for s in (self.best_step,) if s is not None})

    def final(self) -> Path:
        """Writes the LoRA file that the user takes away."""
        step = self.trainer.total
        path = self.output / lora_formats.file_name(self.name, self.config.save_format)
        self._write(path, step, self.config.save_format)
        self.trainer.emit(Checkpoint(step=step, path=str(path), final=True,
                                     best=step == self.best_step))
        return path

    def best(self) -> dict[str, object] | None:
        """The checkpoint with the lowest validation loss, where there is one."""
        if self.best_step is None:
            return None
        name = f"{self.name}-{self.best_step:06d}"
        path = self.output / checkpoint.FOLDER / name / f"{name}.safetensors"
        return {"step": self.best_step, "validation": self.best_loss,
                "lora": str(path) if path.exists() else None}

    def kept(self) -> list[str]:
        return [str(self.output / checkpoint.FOLDER / f"{self.name}-{step:06d}")
                for step in sorted(checkpoint.steps_of(self.output, self.name))]

    def _free_name(self) -> str:
        name, n = self.config.name, 1
        while (any((self.output / lora_formats.file_name(name, f)).exists()
                   for f in ("kohya", self.config.save_format))
               or new_words.beside(self.output / f"{name}.safetensors").exists()
               or checkpoint.steps_of(self.output, name)):
            n += 1
            name = f"{self.config.name}-{n}"
        return name

    def _write(self, path: Path, step: int, format_: str = "kohya") -> None:
        """The LoRA, and beside it the new words, if there are any."""
        config, text = self.config, self.trainer.text
        dtype = SAVE_DTYPES[config.save_precision]
        with self.trainer.averaged():
            model = self.trainer.denoiser
            tensors = adapter_file.tensors(model, lora.state(model), dtype)
            if text is not None:
                tensors |= lora_file.to_kohya(text.adapter_state(), text.alpha, dtype)
            word = text.word() if text is not None else None
        if word is not None:
            new_words.write(new_words.beside(path), word, dtype)
        metadata = build_metadata(self._facts(step))
        if format_ == "kohya":
            lora_file.write_lora(path, tensors, metadata)
            return
        found = lora_formats.from_tensors(tensors, self.trainer.family.spec.id)
        found.metadata = metadata
        lora_formats.save(found, format_, path)

    def _facts(self, step: int) -> TrainFacts:
        trainer, config, spec = self.trainer, self.config, self.trainer.family.spec
        examples, course = trainer.examples, trainer.course
        chosen = [examples.items[i] for i in examples.trained()]
        sides = [side for item in chosen for side in item.bucket]
        counts = Counter({b: 0 for b in sorted({i.bucket for i in chosen})})
        for item in chosen:
            counts[item.bucket] += item.picture.repeats
        native = trainer.parts.native_size
        named = config.with_changes(output_name=self.name)
        return TrainFacts(
            config=named, config_text=dump_yaml(config), title=self.name,
            description=f"LoRA Darkroom {__version__}", thumbnail=self._thumbnail(),
            base_version=spec.base_version, architecture=spec.architecture,
            implementation=spec.implementation, prediction_type=trainer.parts.objective,
            base_name=trainer.parts.source.name, base_sha256=self._base.sha256(),
            base_short_hash=self._base.short, folders=_folders(chosen),
            buckets=tuple(Bucket(width=w, height=h, pictures=n)
                          for (w, h), n in counts.items()),
            bucket_sides=(min(sides), max(sides)), aspect_error=_aspect_error(chosen),
            resolution=size_of(config.max_resolution) or (native, native),
            validation_pictures=len(examples.held_out), regular=_folders(
                [examples.items[i] for i in sorted(examples.regular)]),
            text_encoder_lr=config.text_encoder_lr, session_id=self.session,
            started_at=self.began, finished_at=time.time(),
            batches_per_epoch=course.batches_per_epoch,
            planned_epochs=-(-trainer.total // course.updates_per_epoch),
            planned_steps=trainer.total, epoch=int(course.epoch_of(step)), step=step,
            optimizer=optim.describe(trainer.optimizer),
            mixed_precision={torch.float16: "fp16", torch.bfloat16: "bf16"}.get(
                trainer.precision.compute, "no"),
            gradient_checkpointing=config.gradient_checkpointing)

    def _thumbnail(self) -> bytes:
        """The newest preview, else the first training picture."""
        previews = sorted((self.output / "samples").glob(f"{self.name}-*.png"))
        path = (previews[-1] if previews
                else self.trainer.examples.items[0].picture.path)
        image = pictures.open_picture(path)
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        return buffer.getvalue()


class _BaseHash:
    """The hashes of a single-file base, computed beside the training: gigabytes take seconds."""

    def __init__(self, source: Path) -> None:
        self._sha256, self.short = "", ""
        self._thread = threading.Thread(target=self._compute, args=(source,), daemon=True)
        if source.is_file():
            self._thread.start()

    def _compute(self, source: Path) -> None:
        self.short = lora_metadata.short_hash(source)
        self._sha256 = lora_metadata.model_hash(source)

    def sha256(self) -> str:
        if self._thread.ident is not None:
            self._thread.join()
        return self._sha256


def _folders(items: list[Example]) -> dict[str, Folder]:
    """Kohya's view of the data: folder name -> repeats, pictures, tags."""
    pictures = [i.picture for i in items]
    tags = captions.tag_frequency(pictures)
    found: dict[str, Folder] = {}
    for name in dict.fromkeys(p.path.parent.name for p in pictures):
        own = [p for p in pictures if p.path.parent.name == name]
        found[name] = Folder(repeats=own[0].repeats, pictures=len(own), tags=tags.get(name, {}))
    return found


def _aspect_error(items: list[Example]) -> float:
    errors = [abs(i.picture.size[0] / i.picture.size[1]
                  - i.bucket[0] / i.bucket[1]) for i in items]
    return sum(errors) / len(errors)
