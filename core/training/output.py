"""Writes what a run leaves behind: checkpoints, the best one, the final LoRA with its metadata."""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from core import __version__, hashes, paths, prompt_markup
from core.adapters import base_loras, from_file, lora
from core.config import size_of
from core.dataset import captions, images
from core.dataset.buckets import Size
from core.dataset.examples import Example
from core.dataset.image_folder import Picture
from core.errors import UserError
from core.failures import one_line
from core.families.base import PARTS, Family
from core.families.components import lookup
from core.families.registry import naming
from core.hashes import data_hash, fingerprint
from core.jobs.events import Checkpoint, Note
from core.lora_files import files as lora_file
from core.lora_files import formats, metadata, textual_inversion
from core.lora_files.layers import Lora
from core.lora_files.metadata import Folder, TrainFacts, build_metadata
from core.optim import optimizers
from core.serialization import readable_name
from core.training import checkpoint
from core.training import resume as resuming
from core.training.checkpoint import Position, State
from core.training.output_names import Output

if TYPE_CHECKING:
    from core.training.trainer import Trainer

SAVE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LoraAndWord = tuple[Lora, textual_inversion.NewWord | None]
# modelspec names SD 2 by what it predicts: the name of the base if it predicts noise.
OF_EPSILON = {"stable-diffusion-v2-768-v": "stable-diffusion-v2-512"}
AGAIN_S = 60.0              # until a failed checkpoint is tried again: disks may be emptied
CLOCKS_S = 2.0              # exFAT counts a file's time in steps of so many seconds
_THUMBNAIL = 256            # px


class OutputWriter:
    """Writes the run's files under the name that `output` holds. Checkpoints are written by a
    thread of its own, beside the training."""

    def __init__(self, trainer: Trainer, output: Output, began: float) -> None:
        self.trainer, self.output, self.began = trainer, output, began
        self.config = trainer.config
        self.dtype = SAVE_DTYPES[self.config.save_precision]
        # A checkpoint's LoRA is in its family's own format, whatever the final one's is.
        self.native_format = lora.file_format(self.config, trainer.family.spec)
        self.format = lora.file_format(self.config, trainer.family.spec, self.config.save_format)
        self.there_already = False              # the very same LoRA was there before
        self.last: Path | None = None
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self.before_s, self._since = 0.0, began     # s that earlier starts trained; Unix time
        self.starts = 0                             # how many earlier starts there were
        self._base = _BaseHash(trainer.family, trainer.parts.source)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self._again: float | None = None        # monotonic, s: when to try a failed one again

    def resume(self, checkpoints: list[Path]) -> int:
        """Restores the newest of these checkpoints that can be read. Returns how many updates are
        done then; 0 where none can be read."""
        restored = resuming.restore(checkpoints, self.trainer, self.output, self._base.parts)
        if restored is None:
            return 0
        self.last, position = restored
        self.best_loss, self.best_step = position.best_loss, position.best_step
        self.began, self.before_s = position.started, position.seconds
        self._since = time.time()
        # More than any of its checkpoints has, also where it goes back to an older one.
        self.starts = 1 + max(map(checkpoint.starts_of, self.output.checkpoints(
            self.output.session)), default=0)
        return position.update

    def seconds(self) -> float:
        """How long the run has trained, its earlier starts included."""
        return self.before_s + time.time() - self._since

    def remember(self, step: int, validation: float) -> None:
        """Remembers the step with the lowest validation loss."""
        if self.best_loss is None or validation < self.best_loss:
            self.best_loss, self.best_step = validation, step

    def checkpoint(self, step: int, last: bool = False) -> None:
        """Copies the state now and writes it beside the training; waits for the checkpoint before.
        One that fails becomes a note and is tried again. With `last` it is written when this
        returns, in the spare folder if it must be; raises UserError `engine.cant_save`."""
        self.settle()
        state, content = self.trainer.snapshot(step), self._lora_content()
        sampler = self.trainer.sampler
        position = Position(
            update=step, name=self.output.name, config=self.config.model_dump(mode="json"),
            session=self.output.session, started=self.began,
            seconds=self.seconds(),
            best_loss=self.best_loss, best_step=self.best_step, scaler=state.scaler,
            lowered=state.lowered, samples=sampler.samples_per_epoch,
            place=asdict(sampler.place(step)), start=asdict(sampler.start), order=sampler.order,
            starts=self.starts, objective=self.trainer.parts.objective,
            rate=self.trainer.planned_rate(step),
            base_loras=self.trainer.base_loras.labels, base=self._base.parts)
        if last:
            self._saved(self.output.somewhere(
                lambda folder: self._save(folder, position, state, content)))
        else:
            self._writing = self._writer.submit(self._save, self.output.folder, position, state,
                                                content)

    def tend(self, step: int) -> None:
        """Called between updates: finishes a written checkpoint, tries a failed one again."""
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
        except Exception as error:
            # Whatever it was, the training can go on.
            self._again = time.monotonic() + AGAIN_S
            self.trainer.emit(Note(key="engine.checkpoint_failed", params={
                "folder": str(self.output.folder), "reason": one_line(error)}))
            return
        self._saved(path)

    def _saved(self, path: Path) -> None:
        """Called from the training's own thread: listeners may look at the trainer."""
        self.last, step = path, int(path.name.rpartition("-")[2])
        self.trainer.emit(Checkpoint(step=step, path=str(path), best=step == self.best_step))

    def final(self, step: int) -> Path:
        """Writes the LoRA file that the user takes away. Raises UserError `engine.cant_save` where
        neither the output folder nor the spare one takes it."""
        self.settle()
        content = self._lora_content()

        def write(folder: Path) -> Path:
            # Nothing is replaced: where a LoRA has the name by now (an earlier end of this run, or
            # one that somebody put there), the new one gets the next free name. The very same
            # LoRA, left by a run that was killed after writing it, is taken as it is.
            folder.mkdir(parents=True, exist_ok=True)
            name = self.output.name
            while True:
                path = folder / formats.file_name(name, self.format)
                with tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=".tmp", dir=folder,
                                                 ignore_cleanup_errors=True) as beside:
                    fresh = Path(beside) / path.name
                    self._write(fresh, content, step, self.format, name)
                    if _is_same_lora(fresh, path):
                        self.there_already = True
                        return path
                    with contextlib.suppress(FileExistsError):
                        _move_lora(fresh, path)
                        return path
                name = self.output.next_name()

        path = self.output.somewhere(write)
        self.trainer.emit(Checkpoint(step=step, path=str(path), final=True,
                                     best=step == self.best_step))
        return path

    def close(self) -> None:
        """Called whatever ends the run: a checkpoint that is being written is finished."""
        self.settle()
        self._writer.shutdown()

    def _save(self, folder: Path, position: Position, state: State, content: LoraAndWord) -> Path:
        path = checkpoint.save(folder, position, state,
                               lambda path: self._write(path, content, position.update))
        checkpoint.prune(folder, position.name, position.session, self.config.keep_checkpoints,
                         {s for s in (self.best_step,) if s is not None})
        return path

    def best(self) -> dict[str, object] | None:
        """The checkpoint with the lowest validation loss, where there is one."""
        if self.best_step is None:
            return None
        folder = checkpoint.folder_of(self.output.folder, self.output.name, self.best_step)
        path = folder / f"{folder.name}.safetensors"
        return {"step": self.best_step, "validation": self.best_loss,
                "lora": str(path) if path.exists() else None}

    def kept(self) -> list[str]:
        """The folders of the checkpoints that are left."""
        folder, name = self.output.folder, self.output.name
        return [str(checkpoint.folder_of(folder, name, step))
                for step in sorted(checkpoint.steps_of(folder, name))]

    def _lora_content(self) -> LoraAndWord:
        """What a LoRA file would hold now: the adapter, or its average, and the new words."""
        text, family = self.trainer.text, self.trainer.family.spec.id
        with self.trainer.averaged():
            model, part = self.trainer.denoiser, naming(family)[0].name
            tensors = from_file.tensors(model, lora.state(model), self.dtype, part)
            adapter = formats.from_tensors(tensors, family)
            if text is not None:
                adapter.layers |= formats.from_tensors(formats.cast(
                    text.adapter_state(), self.dtype), family, text.alpha).layers
            return adapter, text.word() if text is not None else None

    def _write(self, path: Path, content: LoraAndWord, step: int, format_: str = "", name: str = ""
               ) -> None:
        """Writes the LoRA, and beside it the new words, if there are any. This may be the writer's
        thread, where the trainer's weights are moving: those in `content` stand still."""
        adapter, word = content
        format_ = format_ or self.native_format
        if word is not None:
            textual_inversion.write(textual_inversion.beside(path), word, self.dtype)
        adapter.metadata = build_metadata(self._facts(step, name or self.output.name))
        if format_ in formats.SINGLE:
            lora_file.write_lora(path, formats.spell(adapter, format_), adapter.metadata)
        else:
            formats.save(adapter, format_, path)

    def _facts(self, step: int, name: str) -> TrainFacts:
        """What the metadata say about the training."""
        trainer, config, spec = self.trainer, self.config, self.trainer.family.spec
        examples, sampler = trainer.examples, trainer.sampler
        chosen = [examples.items[i] for i in examples.trained()]
        counts: Counter[Size] = Counter()
        for item in sorted(chosen, key=lambda item: item.bucket):
            counts[item.bucket] += item.picture.repeats
        aspect_errors = [abs(item.picture.size[0] / item.picture.size[1]
                             - item.bucket[0] / item.bucket[1]) for item in chosen]
        architecture = trainer.parts.architecture or spec.architecture
        if trainer.parts.objective == "epsilon":
            architecture = OF_EPSILON.get(architecture, architecture)
        denoiser = self._base.parts.get("denoiser")
        native, epoch = trainer.parts.native_size, int(sampler.epoch_of(step))
        # A run that went on under a shorter plan has done more than it plans.
        planned = max(trainer.total, step)
        return TrainFacts(
            config=config.with_changes(output_name=name), config_text=metadata.shared_yaml(config),
            description=f"LoRA Darkroom {__version__}", thumbnail=self._thumbnail(step),
            base_version=spec.base_version, architecture=architecture,
            implementation=spec.implementation, prediction_type=trainer.parts.objective,
            base_name=trainer.parts.source.name, base_sha256=self._base.sha256(),
            base_short_hash=self._base.short, folders=_folders(chosen),
            regular=_folders([examples.items[i] for i in sorted(examples.regular)]),
            buckets=counts, aspect_error=sum(aspect_errors) / len(aspect_errors),
            resolution=size_of(config.max_resolution) or (native, native),
            validation_pictures=len(examples.held_out),
            clip_skip=config.clip_skip if spec.skips else None,
            max_token_length=config.max_tokens if spec.chunked and config.max_tokens > 75 else None,
            session_id=self.output.session, started_at=self.began, finished_at=time.time(),
            batches_per_epoch=sampler.batches_per_epoch, planned_steps=planned,
            planned_epochs=max(-(-planned // sampler.updates_per_epoch), epoch),
            epoch=epoch, step=step,
            optimizer=optimizers.describe(trainer.optimizer),
            mixed_precision={torch.float16: "fp16", torch.bfloat16: "bf16"}.get(
                trainer.precision.compute, "no"),
            extra=({metadata.BASE_KEY: denoiser} if denoiser else {})
            | base_loras.metadata(trainer.base_loras.labels)
            | lookup.metadata(trainer.parts.beside))

    def _thumbnail(self, step: int) -> bytes:
        """WebP of the newest preview of this run up to this step, else with `metadata: full` of the
        first training picture; empty where there is none that can be read."""
        try:
            # A run of the same name that was killed before its first checkpoint left pictures, too.
            previews = [(drawn_at, path) for path in checkpoint.previews_of(
                self.output.folder, self.output.name)
                if (drawn_at := path.stat().st_mtime) > self.began - CLOCKS_S
                and checkpoint.step_of(path) <= step]
            if not previews and self.config.metadata == "public":
                return b""
            path = max(previews)[1] if previews else self.trainer.examples.items[0].picture.path
            image = images.open_picture(path)
        except (OSError, UserError):
            return b""
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        return buffer.getvalue()


def _move_lora(fresh: Path, path: Path) -> None:
    """Moves a LoRA and its new words. Raises FileExistsError where one of the names is taken;
    then nothing has moved."""
    words, target = textual_inversion.beside(fresh), textual_inversion.beside(path)
    if brings_words := words.exists():
        paths.move(words, target)
    try:
        paths.move(fresh, path)
    except OSError:
        if brings_words:
            target.unlink()
        raise
    paths.sync_folder(path.parent)


def _is_same_lora(fresh: Path, path: Path) -> bool:
    """Whether the same LoRA is at `path`: all tensors, whatever the metadata say."""
    def hashes_of(path: Path) -> dict[str, str]:
        words = textual_inversion.beside(path)
        files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
        return {str(file.relative_to(path.parent)): data_hash(file)
                for file in [*files, *([words] if words.exists() else [])]}

    try:
        return path.exists() and hashes_of(fresh) == hashes_of(path)
    except (UserError, OSError):
        return False


def fingerprints(family: Family, source: Path) -> dict[str, str]:
    """Fingerprints of the base's parts; of none that can't be read."""
    parts = dict[str, str]()
    with contextlib.suppress(OSError):
        for part in PARTS:
            parts[part] = fingerprint(family.weight_files(source, part))
    return parts


class _BaseHash:
    """Fingerprints of the base's parts, and the hashes of a single file. Those are computed in a
    thread beside the training, since gigabytes take seconds."""

    def __init__(self, family: Family, source: Path) -> None:
        self._sha256 = self.short = ""
        self.parts = fingerprints(family, source)

        def compute() -> None:
            # A base that is gone by now: the LoRA can do without.
            with contextlib.suppress(OSError):
                self.short = hashes.short_hash(source)
                self._sha256 = hashes.sha256(source)

        self._thread = threading.Thread(target=compute, daemon=True)
        if source.is_file():
            self._thread.start()

    def sha256(self) -> str:
        """The file's SHA-256, waiting for it; empty for a folder."""
        if self._thread.ident is not None:
            self._thread.join()
        return self._sha256


def tag_frequency(pictures: Iterable[Picture]) -> Mapping[str, Mapping[str, int]]:
    """ss_tag_frequency: folder name -> tag in lower case -> number of pictures."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for picture in pictures:
        counts[readable_name(picture.path.parent.name)].update(
            map(str.lower, captions.split_tags(prompt_markup.joined(picture.caption))))
    return counts


def _folders(items: list[Example]) -> dict[str, Folder]:
    """The data as kohya's metadata have it: folder name -> repeats, pictures, tags."""
    tags = tag_frequency(item.picture for item in items)
    by_name: dict[str, list[Picture]] = defaultdict(list)
    for item in items:
        by_name[item.picture.path.parent.name].append(item.picture)
    return {name: Folder(repeats=members[0].repeats, pictures=len(members),
                         tags=tags[readable_name(name)]) for name, members in by_name.items()}
