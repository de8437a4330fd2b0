"""What a run leaves behind: checkpoints, the best one, the final LoRA with its metadata."""

from __future__ import annotations

import contextlib
import io
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from core import (
    __version__,
    adapter_file,
    base_loras,
    captions,
    checkpoint,
    lora,
    lora_file,
    lora_formats,
    lora_metadata,
    lowering,
    new_words,
    optim,
    paths,
    pictures,
)
from core.cache import key
from core.checkpoint import Position, State
from core.config import dump_yaml, size_of
from core.events import Checkpoint, Note
from core.examples import Example
from core.failures import one_line
from core.families import companions
from core.faults import Fault, Fix
from core.lora_layers import Lora
from core.lora_metadata import Bucket, Folder, TrainFacts, build_metadata
from core.naming import NAMINGS, SD1

if TYPE_CHECKING:
    from core.engine import Trainer

SAVE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Made = tuple[Lora, new_words.NewWord | None]
AGAIN_S = 60.0              # after a checkpoint failed: a disk may be emptied meanwhile
_THUMBNAIL = 256            # px


class Keeper:
    """Owns the output folder's names. A LoRA that is there already is kept: the new one gets the
    next free name."""

    def __init__(self, trainer: Trainer, output: Path, began: float) -> None:
        self.trainer, self.output, self.began = trainer, output, began
        self.config = trainer.config
        self.session = str(uuid.uuid4().int % 10**10)
        self.dtype = SAVE_DTYPES[self.config.save_precision]
        self.own = lora.file_format(self.config, trainer.family.spec)
        self.format = lora.file_format(self.config, trainer.family.spec, self.config.save_format)
        self.name = self._free_name()
        self.last: Path | None = None
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self.before_s, self._since = 0.0, began     # s that earlier runs trained; Unix time
        self._base = _BaseHash(trainer.parts.source)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self._again: float | None = None        # monotonic, s: when to try a failed one again

    def resume(self) -> int:
        """Restores the newest checkpoint that can be read; 0 and a note where there is none."""
        folders = [self.output, _spare(self.output)]
        for folder in folders:
            checkpoint.sweep(folder, self.config.name)
        for found in checkpoint.find(folders, self.config.name):
            try:
                position, state = checkpoint.load(found)
            except Fault as fault:              # torn by a power cut or a full disk
                self.trainer.emit(Note(key=fault.code, params=fault.params))
                continue
            return self._restore(found, position, state)
        self.trainer.emit(Note(key="engine.nothing_to_resume",
                               params={"folder": str(self.output)}))
        return 0

    def _restore(self, found: Path, position: Position, state: State) -> int:
        trainer = self.trainer
        optim.check_same(position.config.get("optimizer", "adamw"), self.config.optimizer)
        base_loras.refuse_others(trainer.base_loras.told, position.base_loras,
                                 position.config.get("base_loras", []))
        lowering.apply(trainer, position.lowered)
        trainer.restore(state)
        self.name, self.session, self.last = position.name, position.session, found
        self.best_loss, self.best_step = position.best_loss, position.best_step
        self.began, self.before_s = position.started, position.seconds
        self._since = time.time()
        if position.samples not in (0, trainer.course.samples_per_epoch):
            trainer.emit(Note(key="engine.other_pictures", params={
                "here": trainer.course.samples_per_epoch, "there": position.samples}))
        trainer.emit(Note(key="engine.resumed", params={
            "step": position.update, "path": str(found)}))
        return position.update

    def remember(self, step: int, validation: float) -> None:
        if self.best_loss is None or validation < self.best_loss:
            self.best_loss, self.best_step = validation, step

    def checkpoint(self, step: int, last: bool = False) -> None:
        """Copies the state now and writes it beside the training; waits for the one before. One
        that fails is told and tried again. `last`: written when this returns, in the spare
        folder if it must be; raises Fault `engine.cant_save`."""
        self.settle()
        state, made = self.trainer.snapshot(step), self._made()
        position = Position(
            update=step, name=self.name, config=self.config.model_dump(), session=self.session,
            started=self.began, seconds=self.before_s + time.time() - self._since,
            best_loss=self.best_loss, best_step=self.best_step, scaler=state.scaler,
            lowered=state.lowered, samples=self.trainer.course.samples_per_epoch,
            base_loras=self.trainer.base_loras.told)
        if last:
            self._saved(self._somewhere(lambda folder: self._save(folder, position, state, made)))
        else:
            self._writing = self._writer.submit(self._save, self.output, position, state, made)

    def tend(self, step: int) -> None:
        """Between updates: hears what became of a checkpoint, tries a failed one again."""
        if self._writing and self._writing.done():
            self.settle()
        if self._again is not None and time.monotonic() >= self._again:
            self.checkpoint(step)

    def settle(self) -> None:
        """Waits for the checkpoint that is being written; a failed one becomes a note."""
        writing, self._writing, self._again = self._writing, None, None
        if writing is None:
            return
        try:
            path = writing.result()
        except Exception as error:          # whatever it was, the training can go on
            self._again = time.monotonic() + AGAIN_S
            self.trainer.emit(Note(key="engine.checkpoint_failed", params={
                "folder": str(self.output), "reason": one_line(error)}))
            return
        self._saved(path)

    def _saved(self, path: Path) -> None:
        """Told from the training's own thread: listeners may look at it."""
        self.last, step = path, int(path.name.rpartition("-")[2])
        self.trainer.emit(Checkpoint(step=step, path=str(path), best=step == self.best_step))

    def final(self) -> Path:
        """Writes the LoRA file that the user takes away. Raises Fault `engine.cant_save` where
        neither the output folder nor the spare one takes it."""
        self.settle()
        step, made, format_ = self.trainer.total, self._made(), self.format

        def write(folder: Path) -> Path:
            path = folder / lora_formats.file_name(self.name, format_)
            self._write(path, made, step, format_)
            return path
        path = self._somewhere(write)
        self.trainer.emit(Checkpoint(step=step, path=str(path), final=True,
                                     best=step == self.best_step))
        return path

    def close(self) -> None:
        """Whatever ends the run: a checkpoint that is being written is finished."""
        self.settle()
        self._writer.shutdown()

    def _somewhere(self, write: Callable[[Path], Path]) -> Path:
        """`write` to the output folder; where that is full, gone or forbidden, to the spare one."""
        try:
            return write(self.output)
        except OSError as error:
            reason, spare = one_line(error), _spare(self.output)
        try:
            path = write(spare)
        except OSError:
            raise Fault("engine.cant_save", folder=self.output, spare=spare, reason=reason, fixes=[
                Fix("fixes.save_again", {"resume": True}),
                Fix("fixes.other_folder", {"output_dir": str(Path.home() / self.output.name)}),
            ]) from None
        self.trainer.emit(Note(key="engine.saved_elsewhere", params={
            "folder": str(self.output), "path": str(path), "reason": reason}))
        return path

    def _save(self, folder: Path, position: Position, state: State, made: Made) -> Path:
        path = checkpoint.save(folder, position, state,
                               lambda path: self._write(path, made, position.update))
        checkpoint.prune(folder, self.name, self.config.keep_checkpoints,
                         {s for s in (self.best_step,) if s is not None})
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
                   for f in ("kohya", self.format))
               or new_words.beside(self.output / f"{name}.safetensors").exists()
               or checkpoint.steps_of(self.output, name)):
            n += 1
            name = f"{self.config.name}-{n}"
        return name

    def _made(self) -> Made:
        """What a LoRA file holds now: the adapter, or its average, and the new words."""
        text, family = self.trainer.text, self.trainer.family.spec.id
        with self.trainer.averaged():
            model, part = self.trainer.denoiser, NAMINGS.get(family, SD1)[0].name
            tensors = adapter_file.tensors(model, lora.state(model), self.dtype, part, None)
            found = lora_formats.from_tensors(tensors, family)
            if text is not None:
                found.layers |= lora_formats.from_tensors(lora_file.to_kohya(
                    text.adapter_state(), text.alpha, self.dtype,
                    naming=NAMINGS.get(family, SD1)), family).layers
            return found, text.word() if text is not None else None

    def _write(self, path: Path, made: Made, step: int, format_: str = "") -> None:
        """The LoRA, and beside it the new words, if there are any. A checkpoint's file is in its
        family's own format, whatever the final one's is. In the writer's thread: the trainer's
        weights are moving."""
        found, word = made
        format_ = format_ or self.own
        if word is not None:
            new_words.write(new_words.beside(path), word, self.dtype)
        found.metadata = build_metadata(self._facts(step))
        if format_ in lora_formats.SINGLE:
            lora_file.write_lora(path, lora_formats.spell(found, format_), found.metadata)
        else:
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
            base_version=spec.base_version,
            architecture=trainer.parts.architecture or spec.architecture,
            implementation=spec.implementation, prediction_type=trainer.parts.objective,
            base_name=trainer.parts.source.name, base_sha256=self._base.sha256(),
            base_short_hash=self._base.short, folders=_folders(chosen),
            buckets=tuple(Bucket(width=w, height=h, pictures=n)
                          for (w, h), n in counts.items()),
            bucket_sides=(min(sides), max(sides)), aspect_error=_aspect_error(chosen),
            resolution=size_of(config.max_resolution) or (native, native),
            validation_pictures=len(examples.held_out), regular=_folders(
                [examples.items[i] for i in sorted(examples.regular)]),
            text_encoder_lr=config.text_encoder_lr,
            clip_skip=config.clip_skip if spec.skips else None,
            max_token_length=config.max_tokens if spec.chunked and config.max_tokens > 75 else None,
            session_id=self.session,
            started_at=self.began, finished_at=time.time(),
            batches_per_epoch=course.batches_per_epoch,
            planned_epochs=-(-trainer.total // course.updates_per_epoch),
            planned_steps=trainer.total, epoch=int(course.epoch_of(step)), step=step,
            optimizer=optim.describe(trainer.optimizer),
            mixed_precision={torch.float16: "fp16", torch.bfloat16: "bf16"}.get(
                trainer.precision.compute, "no"),
            gradient_checkpointing=config.gradient_checkpointing,
            extra=base_loras.metadata(trainer.base_loras.told)
            | companions.metadata(trainer.parts.beside))

    def _thumbnail(self) -> bytes:
        """The newest preview, else the first training picture."""
        previews = sorted((self.output / "samples").glob(f"{self.name}-*.png"))
        path = (previews[-1] if previews
                else self.trainer.examples.items[0].picture.path)
        try:
            image = pictures.open_picture(path)
        except (OSError, Fault):            # deleted in the meantime
            return b""
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        return buffer.getvalue()


def _spare(output: Path) -> Path:
    """Where a run's last state goes if its own folder takes nothing any more."""
    return paths.data_dir() / "rescued" / f"{output.name}-{key(str(output))[:8]}"


class _BaseHash:
    """The hashes of a single-file base, computed beside the training: gigabytes take seconds."""

    def __init__(self, source: Path) -> None:
        self._sha256, self.short = "", ""
        self._thread = threading.Thread(target=self._compute, args=(source,), daemon=True)
        if source.is_file():
            self._thread.start()

    def _compute(self, source: Path) -> None:
        with contextlib.suppress(OSError):          # gone: the LoRA can do without
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
