"""python -m tests.fuzz --files 10000: mutated files of every kind that the program reads. Each must
give a value or a UserError within seconds, write nothing outside its folder and run or call
nothing.

`--seed` repeats a run; `--only NAME` reads one kind; a file that breaks something is kept in
`--keep` under the name of its reader and number.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

LIMIT_S = 10.0                              # for one file; a hang beyond
MEMORY = 6 * 2**30                          # bytes; a bomb beyond
TOKENS = (b"", b"0", b"-1", b"9" * 30, b"1e999", b"NaN", b"null", b"true", b"[", b"]", b"{", b"}",
          b'"', b"'", b",", b":", b"\n", b"\r\n", b"\t", b"\\", b"\\u0000", b"\\ud800", b"\0",
          b"\xff\xfe", b"\xef\xbb\xbf", b"../", b"..\\", b"/etc/passwd", b"C:\\CON", b"nul",
          b"&a [*a, *a]", b"!!python/object:os.system ", b"<<: *a", b"%s%n", "猫，".encode(),
          b"\xd0\xd2", b"\x80\x04", b"PK\x03\x04", b"=cmd|' /C calc'!A0")


class Hang(BaseException):
    """Not an Exception, so that nothing on the way swallows it."""


@dataclass
class Kind:
    """What is mutated and who reads it. `read` gets the box with the file `name` in it."""

    name: str
    samples: list[bytes]
    read: Callable[[Path, Path], object]
    suffixes: tuple[str, ...] = ("",)
    share: float = 1.0
    outcomes: Counter[str] = field(default_factory=Counter)


# --- mutating ---------------------------------------------------------------------------------

def mutated(sample: bytes, rng: random.Random) -> bytes:
    data = bytearray(sample)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(9):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at] = rng.choice(TOKENS)
            case 2:
                data[at:at + rng.randrange(1, 40)] = rng.choice(TOKENS)
            case 3:
                del data[at:]
            case 4:
                del data[at:at + rng.randrange(1, 200)]
            case 5:
                end = at + rng.randrange(1, 200)
                data[at:at] = data[at:end] * rng.choice((1, 2, 50))
            case 6:
                value = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data)))
                form = rng.choice(["<Q", ">Q", "<I", ">I", "<H", ">H"])
                size = struct.calcsize(form)
                data[at:at + size] = struct.pack(form, value % 256**size)
            case 7:
                data[at:at] = rng.choice((b"[", b'{"a":', b"- ", b"(")) * rng.choice((5, 3000))
            case _:
                data[at:at] = rng.randbytes(rng.randrange(1, 30))
        if len(data) > 300_000:
            del data[300_000:]
    return bytes(data)


def with_header_length(content: bytes, before: int) -> bytes:
    """A safetensors header that was edited, its length put right: else most die there."""
    if len(content) < 9:
        return content
    length = int.from_bytes(content[:8], "little") + len(content) - before
    return struct.pack("<Q", max(0, length) % 2**64) + content[8:]


# --- samples ----------------------------------------------------------------------------------

def lora_samples() -> list[bytes]:
    import torch
    from safetensors.torch import save
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    kohya = f"lora_unet_{name.replace('.', '_')}"
    metadata = {"ss_tag_frequency": '{"d": {"cat": 3}}', "ss_steps": "7", "modelspec.title": "t",
                "ss_resolution": "(64, 64)", "darkroom.config": "lora_rank: 4\nepochs: 2\n",
                "ss_dataset_dirs": '{"d": {"img_count": 3}}'}
    nan = torch.full((2, 32), float("nan"))
    odd = {f"../{kohya}.lora_down.weight": down, f"{kohya}..lora_up.weight": up,
           "": torch.ones(1), "a" * 5000: torch.ones(2), "lora_unet_\0.alpha": torch.tensor(2.0)}
    return [save({f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up,
                  f"{kohya}.alpha": torch.tensor(2.0)}, metadata),
            save({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, metadata),
            save({f"{kohya}.lora_down.weight": nan, f"{kohya}.lora_up.weight": up}, metadata),
            save({f"{kohya}.lora_down.weight": up, f"{kohya}.lora_up.weight": down}),
            save({f"{kohya}.hada_w1_a": up, f"{kohya}.dora_scale": down}), save(odd, metadata)]


PARTS = {"vae": b"AutoencoderKL", "text_encoder": b"CLIPText", "scheduler": b"DDIM"}


def base_configs() -> list[bytes]:
    _pipeline()
    return [path.read_bytes() for path in sorted(_made["base"].glob("*/*config.json"))
            if path.parent.name != "tokenizer"]


def picture_samples() -> list[bytes]:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    image = Image.radial_gradient("L").resize((24, 16)).convert("RGB")
    info = PngInfo()
    info.add_text("parameters", "a cat", zip=True)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    found = []
    for form, options in (("PNG", {"pnginfo": info}), ("JPEG", {"exif": exif}), ("WEBP", {}),
                          ("JPEG", {"progressive": True}), ("BMP", {}), ("TIFF", {}), ("AVIF", {}),
                          ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})):
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        found.append(buffer.getvalue())
    for form in ("GIF", "WEBP", "PNG"):
        buffer = io.BytesIO()
        image.save(buffer, form, save_all=True, append_images=[image.rotate(90)] * 3)
        found.append(buffer.getvalue())
    return [*found, *picture_bombs()]


def picture_bombs() -> list[bytes]:
    """Small files of huge pictures and texts."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))

    def png(width: int, height: int, *more: bytes) -> bytes:
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        rows = zlib.compress(bytes(200_000))
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(
            b"IDAT", rows) + chunk(b"IEND", b"")

    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000)))
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(20_000_000)))
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\xf0\0\0" + bytes(6) + (
        b"," + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\0\x02\x02\x4c\x01\0") * 40 + b";"
    return [png(65000, 65000), png(2**31 - 1, 2**31 - 1), png(8, 8, text), png(8, 8, profile), gif]


CONFIG = b"""train_data_dir: ./p
base_model: "demo"
lora_rank: 8
learning_rate: 2e-4
target_modules: [to_q, to_v]
sample_prompts:
  - a cat
output_name: my_style
max_resolution: 512,512
"""
BOMBS = [b"a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: [*b,*b,*b,*b]\n", b"[" * 20_000,
         b"{a: " * 20_000, b"seed: 0x" + b"f" * 20_000, b"seed: " + b"9" * 20_000,
         b"seed: " + b"1:" * 20_000 + b"1", b"? [a]\n: 1\n", b"seed: 2001-99-99\n",
         b"a: !!binary '===='\n", b"!!timestamp x", b"seed: !!float x\n", b"<<: [1]\n",
         b"output_name: ../../x\n", b"output_name: CON\n", b"- " * 30_000]
EVENTS = b"\n".join((
    b'{"kind": "started", "at": 1.5, "job": "train", "pid": 1, "config": {"output_dir": "o"}}',
    b'{"kind": "phase", "at": 2, "name": "train", "done": 0, "total": 9}',
    b'{"kind": "step", "at": 3, "step": 1, "total": 9, "epoch": 0.1, "loss": 0.5, "lr": 1e-4, '
    b'"steps_per_s": 2.0, "eta_s": 4.0}',
    b'{"kind": "sample", "at": 3, "step": 1, "path": "a.png", "prompt": "p", "seed": 1}',
    b'{"kind": "checkpoint", "at": 4, "step": 1, "path": "a.safetensors"}',
    b'{"kind": "plan", "at": 4, "plan": {"verdict": "fits"}}',
    b'{"kind": "note", "at": 5, "key": "jobs.paused", "params": {}}',
    b'{"kind": "fault", "at": 6, "code": "jobs.crash", "params": {"reason": "x"}}',
    b'{"kind": "ended", "at": 6, "state": "failed", "result": {"steps": 2}}', b""))
PRESET = b"""title: {en: Eight, zh-CN: x}
family: sd15
purpose: style
about: {en: A, zh-CN: B}
needs: {vram_gb: 8, ram_gb: 16}
set: {lora_rank: 8, epochs: 4}
"""


# --- readers ----------------------------------------------------------------------------------

def read_a_lora(file: Path, box: Path) -> None:
    from core.errors import UserError
    from core.hashes import data_hash
    from core.importers import load_train_config
    from core.lora_files import files as lora_file
    lora_file.describe(file)
    data_hash(file)
    for more in (lora_file.read_lora, load_train_config):
        try:
            more(file)
        except UserError as fault:
            str(fault)
    _load_into_base(file)


def _load_into_base(file: Path) -> None:
    from core.inference.generate import load_adapter
    pipeline = _pipeline()
    try:
        load_adapter(pipeline, file, "fuzz")
    finally:
        pipeline.unload_lora_weights()


_made: dict[str, Any] = {}


def _pipeline() -> Any:
    if "pipeline" not in _made:
        from diffusers import StableDiffusionPipeline

        from tests.tiny import tiny_base
        folder = tiny_base(Path(tempfile.mkdtemp(dir=_made["home"])) / "base")
        _made["base"] = folder
        _made["pipeline"] = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    return _made["pipeline"]


def read_a_base(file: Path, box: Path) -> None:
    from core import families
    from core.families.detection import Base
    Base.of(file)
    families.get(families.detect(file)).weight_files(file, "vae")


def read_a_folder_of_a_base(file: Path, box: Path) -> None:
    """The file stands in for each of the base's configs in turn."""
    import torch

    from core import families
    from core.weights.precision import Precision
    base = box / "base"
    shutil.copytree(_made["base"], base, ignore=shutil.ignore_patterns("*.safetensors"))
    text = file.read_bytes()
    part = next((part for part, mark in PARTS.items() if mark in text), "unet")
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    shutil.copyfile(file, base / part / name)
    meta = Precision(torch.device("meta"), *[torch.float32] * 3)
    families.get("sd15").skeleton(base, meta)


def read_a_config(file: Path, box: Path) -> None:
    from core.importers import load_train_config
    load_train_config(file)


def read_settings(file: Path, box: Path) -> None:
    from core import paths
    from core.workspace import project, settings
    for place in (paths.data_dir() / "settings.yaml", paths.data_dir() / "projects" / "a.yaml"):
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    settings.SettingsFile()
    projects = project.Projects("a")
    projects.now.data(box)
    projects.now.sources()


def read_a_preset(file: Path, box: Path) -> None:
    from core import paths
    from core.workspace import presets
    place = paths.data_dir() / "presets" / "sd15" / "x.yaml"
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, place)
    try:
        presets.list_presets()
    finally:
        place.unlink()


def read_a_vocabulary(file: Path, box: Path) -> None:
    from captioner.models.tagging import load_vocabulary
    load_vocabulary(file)


def read_rules(file: Path, box: Path) -> None:
    from captioner.captions.rule_parser import parse
    from captioner.captions.rules import apply
    from core.serialization import from_json
    try:
        given = from_json(file.read_bytes())
    except ValueError:
        return
    apply("a cat, red hair", parse(given if isinstance(given, list) else [given]))


def read_captions(file: Path, box: Path) -> None:
    """As the folder's metadata or a picture's caption: what training reads, and what a change of
    every caption writes."""
    from captioner.captions.edits import perform
    from captioner.captions.store import Store
    from core.dataset.image_folder import scan
    folder = box / "pictures"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copyfile(_made["picture"], folder / name)
    shutil.copyfile(file, folder / ({".csv": "metadata.csv", ".jsonl": "metadata.jsonl"}.get(
        file.suffix) or "a.txt"))
    scan(folder)
    store = Store(folder)
    perform(store.swaps(dict.fromkeys(store.entries, "new, caption")))
    scan(folder)


def read_a_picture(file: Path, box: Path) -> None:
    from core.dataset import images
    from core.dataset.checks import image_stats
    images.look_at(file)
    images.open_picture(file)
    images.open_picture(file, None)
    image_stats.Looks()


def read_a_run(file: Path, box: Path) -> None:
    """The file stands in for each file of a run's folder in turn."""
    from core.jobs import journal, runs
    folder = runs.create_run("train", "lora_rank: 4\n", "fuzz")
    names = (journal.EVENTS, journal.EVENTS, runs.RUN, runs.OWNER, journal.CONFIG, runs.REQUESTS)
    (folder / journal.EVENTS).write_bytes(EVENTS)
    shutil.copyfile(file, folder / names[file.stat().st_size % len(names)])
    try:
        runs.list_runs()
        runs.load_run(folder.name)
        runs.log_tail(folder.name)
        journal.append_line(folder / journal.EVENTS, "{}")
    finally:
        shutil.rmtree(folder)


def read_state(file: Path, box: Path) -> None:
    """What the program wrote itself and someone edited: choices, undo, progress, checkpoints."""
    from captioner.captions.undo import History
    from captioner.progress import Progress
    from core.dataset import curation
    from core.errors import UserError
    from core.training import checkpoint
    folder = box / "state"
    folder.mkdir()
    progress = Progress(folder, "ab", read_only=True)
    for place in (curation._file(folder), History(folder).file, progress.file,
                  folder / "state.json"):
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    shutil.copyfile(_made["state"], folder / "state.safetensors")
    for read in (lambda: curation.load(folder), lambda: History(folder).actions(),
                 lambda: Progress(folder, "ab", read_only=True), lambda: checkpoint.load(folder)):
        try:
            read()
        except UserError as fault:
            str(fault)


def read_a_prompt(file: Path, box: Path) -> None:
    from core.errors import UserError
    from core.lora_files.library import Tag, find_lora, parse_lora, split_prompt
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    for tag in [*split_prompt(text)[1], Tag(*parse_lora(text))]:
        try:
            find_lora(tag.name, tag.weight)
        except UserError as fault:
            str(fault)


STATE = [b'{"left_out": ["a.png"], "focus": {"b.png": [0.5, 0.5]}}',
         b'{"do":"begin","id":1,"what":"edit","params":{},"at":1.0}\n{"do":"change","id":1,'
         b'"picture":"a.png","kind":"sidecar","row":"","file":"a.txt","before":null,'
         b'"after":"eA=="}\n{"do":"undo","id":1}\n',
         b'{"name":"a.png","size":1,"mtime_ns":2,"sha256":"ab","sentence":"s","tags":[["a",1,"b"]]}'
         b"\n", json.dumps({"update": 3, "name": "a", "config": {"lora_rank": 4}, "session": "1",
                            "started": 1.0, "seconds": 2.0}).encode()]
RULES = [b'[{"rule": "replace", "find": "(a+)+$", "with": "b", "regex": true}, {"rule": "dedupe"}]',
         b'[{"rule": "trigger", "word": "sks", "inside": "move"}, {"rule": "sort", "by": "name"}]']
TABLES = [b"filename,prompt\na.png,a cat\nb.png,\"one, two\"\n", b"a.png;x\nb.png;y\n",
          b"../a.png,x\n/etc/passwd,y\nCON,z\nC:\\a.png,w\n", "a.png,一只猫\n".encode("gb18030")]
LINES = [b'{"file_name": "a.png", "text": "x", "n": 1}\n{"file_name": "b.png", "tags": ["u", "v"]}',
         b'{"file_name": "../../a.png", "text": "x"}\n']
PROMPTS = [b"a cat <lora:../../x:1> <lora:/etc/shadows:1>", b"<lora:C:\\CON:0.5><lora:~root/x:1>",
           b"<lora:.:1><lora:/:1><lora:a/../b:2>", b"<lora:" + b"a" * 5000 + b":1>"]


def kinds(base: bytes) -> list[Kind]:
    return [
        Kind("lora", lora_samples(), read_a_lora, (".safetensors",), 2.5),
        Kind("base", [base], read_a_base, (".safetensors", ".ckpt", ".bin"), 0.5),
        Kind("base-config", base_configs(), read_a_folder_of_a_base, (".json",), 0.3),
        Kind("config", [CONFIG, CONFIG, *BOMBS], read_a_config, (".yaml",), 1.5),
        Kind("settings", [b"language: en\ntheme: dark\n", b"name: a\nedits: {lora_rank: 4}\n",
                          *BOMBS], read_settings, (".yaml",), 0.7),
        Kind("preset", [PRESET, PRESET, *BOMBS], read_a_preset, (".yaml",), 0.5),
        Kind("vocabulary", [b"general:\n  - cat\n  - dog\n", *BOMBS], read_a_vocabulary,
             (".yaml", ".txt"), 0.3),
        Kind("rules", RULES, read_rules, (".json",), 0.5),
        Kind("csv", TABLES, read_captions, (".csv",)),
        Kind("jsonl", LINES, read_captions, (".jsonl",)),
        Kind("caption", ["a cat, 猫".encode(), "a\nb\n".encode("utf-16")], read_captions, (".txt",),
             0.5),
        Kind("picture", picture_samples(), read_a_picture, (".png", ".jpg", ".gif"), 2.5),
        Kind("run", [EVENTS, EVENTS, b'{"job": "train", "name": "x", "created": 1.0, "cwd": "/"}',
                     b'{"pid": 1, "create_time": 1.0}', b'{"ask": "stop"}\n', CONFIG], read_a_run),
        Kind("state", STATE, read_state, (".json",), 0.7),
        Kind("prompt", PROMPTS, read_a_prompt, (".txt",), 0.5)]


# --- the watch --------------------------------------------------------------------------------

class Watch:
    """Hears, by Python's audit events, what is written, run and called."""

    CALLS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class",
             "socket.connect", "ctypes.dlopen")
    PATHS: ClassVar = {"os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,),
             "os.symlink": (1,), "os.link": (1,), "os.chmod": (0,), "os.truncate": (0,),
             "shutil.rmtree": (0,)}

    def __init__(self, *allowed: Path) -> None:
        self.allowed = tuple(os.path.realpath(path) for path in allowed)
        self.on, self.seen = False, []      # type: ignore[var-annotated]
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in self.CALLS:
            self.seen.append(f"{event} {args[:1]}")
        elif event == "open" and isinstance(args[0], (str, bytes)) and (
                args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            self._check(event, args[0])
        elif event in self.PATHS:
            for index in self.PATHS[event]:
                self._check(event, args[index])

    def _check(self, event: str, path: Any) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            real = os.path.realpath(os.fsdecode(path))
            if real != os.devnull and not real.startswith(self.allowed):
                self.seen.append(f"{event} {real}")


@contextmanager
def limited() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)                   # of the processor's time
    faulthandler.dump_traceback_later(12 * LIMIT_S, exit=True)      # C code hears no signal
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


# --- the run ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Broken:
    kind: str
    number: int
    what: str
    content: bytes


def run(files: int, seed: int = 0, only: str = "", home: Path | None = None,
        say: Callable[[str], object] = print) -> tuple[list[Kind], list[Broken]]:
    """Reads `files` mutated files; -> the kinds with their outcomes, and what broke."""
    home = home or Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.environ["DARKROOM_HOME"] = str(home / "home")
    (home / "home" / "cache").mkdir(parents=True, exist_ok=True)
    _made["home"] = home
    _prepare(home)
    chosen = [kind for kind in kinds(_made["checkpoint"]) if only in ("", kind.name)]
    total = sum(kind.share for kind in chosen)
    broken: list[Broken] = []
    watch = Watch(home)
    for kind in chosen:
        _warm_up(kind, home)
        began = time.monotonic()
        count = math.ceil(files * kind.share / total)
        for number in range(count):
            rng = random.Random(f"{seed}-{kind.name}-{number}")
            content = _content(kind, number, rng)
            if what := _one(kind, content, rng, home / "box", watch):
                broken.append(Broken(kind.name, number, what, content))
                say(f"{kind.name} {number}: {what.strip().splitlines()[-1]}")
        say(f"{kind.name}: {count} files, {time.monotonic() - began:.0f} s, "
           + ", ".join(f"{n} {what}" for what, n in kind.outcomes.most_common(4)))
    return chosen, broken


def _prepare(home: Path) -> None:
    import diffusers.utils.logging
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    diffusers.utils.logging.set_verbosity(100)
    _made["picture"], _made["state"] = home / "one.png", home / "state.safetensors"
    Image.new("RGB", (8, 8), "red").save(_made["picture"])
    save_file({"adapter.x": torch.ones(1), "optimizer.0.step": torch.ones(1)}, _made["state"])
    unet = "model.diffusion_model.input_blocks"
    save_file({f"{unet}.0.0.weight": torch.ones(8, 4, 3, 3), "first_stage_model.x": torch.ones(1),
               f"{unet}.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(4, 768)},
              home / "checkpoint.safetensors")
    _made["checkpoint"] = (home / "checkpoint.safetensors").read_bytes()
    os.chdir(home)


def _content(kind: Kind, number: int, rng: random.Random) -> bytes:
    if number < len(kind.samples):
        return kind.samples[number]         # the bombs themselves, and that samples are read
    sample = rng.choice(kind.samples)
    content = mutated(sample, rng)
    if kind.suffixes[0] == ".safetensors" and rng.random() < 0.7:
        return with_header_length(sample[:8] + content[8:], len(sample))
    return content


def _warm_up(kind: Kind, home: Path) -> None:
    """Imports and first uses outside of the limits and the watch."""
    box = _box(home / "box")
    file = box / f"file{kind.suffixes[0]}"
    file.write_bytes(kind.samples[0])
    kind.read(file, box)


def _box(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def _one(kind: Kind, content: bytes, rng: random.Random, where: Path, watch: Watch) -> str:
    """'' or what went wrong."""
    from core.errors import UserError
    box = _box(where)
    file = box / f"file{rng.choice(kind.suffixes)}"
    file.write_bytes(content)
    watch.seen, watch.on = [], True
    try:
        with limited():
            kind.read(file, box)
        outcome = "read"
    except UserError as fault:
        outcome = fault.code
        if "\n" in (said := str(fault)) or len(said) > 20_000:
            return f"not one sentence: {said[:300]!r}"
    except Hang:
        return f"hang: {''.join(traceback.format_exc(limit=-6))}"
    except BaseException:
        return traceback.format_exc(limit=-6)
    finally:
        watch.on = False
    kind.outcomes[outcome] += 1
    return f"outside: {watch.seen[:3]}" if watch.seen else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-broken"))
    options = parser.parse_args()
    keep = options.keep.absolute()
    resource.setrlimit(resource.RLIMIT_AS, (max(MEMORY, 24 * 2**30),) * 2)
    began = time.monotonic()
    found, broken = run(options.files, options.seed, options.only)
    gc.collect()
    faults = sum(n for kind in found for what, n in kind.outcomes.items() if what != "read")
    read = sum(kind.outcomes["read"] for kind in found)
    print(f"{read + faults + len(broken)} files in {time.monotonic() - began:.0f} s: {read} read, "
          f"{faults} refused with one sentence, {len(broken)} broken something; peak "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    for one in broken:
        keep.mkdir(exist_ok=True)
        (keep / f"{one.kind}-{one.number}").write_bytes(one.content)
        (keep / f"{one.kind}-{one.number}.txt").write_text(one.what)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
