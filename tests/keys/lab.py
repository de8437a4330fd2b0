"""What the rows of config/test_config_keys.py share: a tiny base, pictures,
trainers, whole runs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from core import families, paths
from core.config import TrainConfig
from core.dataset.examples import Encoder, Examples, find
from core.dataset.sampler import Batch
from core.families.base import Cond, Parts
from core.families.detection import Base
from core.jobs.control import Control
from core.jobs.events import Event, Note
from core.memory import plan
from core.memory.plan import Data, Machine, Plan
from core.objectives.noise import Draw
from core.training import regularization
from core.training.previews import Previewer
from core.training.run import train
from core.training.trainer import Trainer
from core.weights.precision import Precision, choose
from tests import tiny

Row = Callable[["Lab"], None]
ROWS: dict[str, Row] = {}                   # a key of TrainConfig -> what shows that it works
CAUGHT: list[dict[str, Any]] = []           # what the callback of a run saw, update by update
SAME_CAPTION = "ink, red, flat, disc, paper, number"
CARD = Machine("cuda", "a card", 8188, 7600, (8, 9), 12_000)


def row(key: str) -> Callable[[Row], Row]:
    def keep(function: Row) -> Row:
        assert key not in ROWS, key
        ROWS[key] = function
        return function
    return keep


def catch(trainer: Trainer, done: int) -> None:
    """Called by the callback of `Lab.CALLBACK` while the adapter is still there."""
    CAUGHT.append({"done": done, "device": trainer.precision.device.type,
                   "objective": trainer.parts.objective,
                   "signal": trainer.diffusion.signal.cpu()})


@dataclass(frozen=True)
class Shown:
    """What the loss of one batch is made of."""

    latents: Tensor
    draw: Draw
    cond: Cond
    weights: Tensor | None


@dataclass
class Run:
    config: TrainConfig
    result: dict[str, Any]
    events: list[Event]
    caught: list[dict[str, Any]] = field(default_factory=list)

    @property
    def file(self) -> Path:
        path = Path(self.result["lora"])
        return path if path.is_file() else next(path.rglob("*.safetensors"))

    @property
    def metadata(self) -> dict[str, str]:
        with safe_open(self.file, "pt") as file:
            return dict(file.metadata())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.file)

    def notes(self, key: str) -> list[Note]:
        return [e for e in self.events if isinstance(e, Note) and e.key == key]


class Lab:
    PROCESSOR = "from PIL import ImageOps\n\n\ndef invert(image, path):\n" \
                "    return ImageOps.invert(image)\n"
    CALLBACK = "from tests.keys import lab\n\n\nclass Catch:\n    def __call__(self, event):\n" \
               "        pass\n\n    def after_update(self, trainer, done):\n" \
               "        lab.catch(trainer, done)\n"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = tiny.tiny_base(folder / "tiny")
        self.pictures = tiny.pictures(folder / "pictures")
        self.own = folder / "own.py"
        self.own.write_text(f"{self.PROCESSOR}\n\n{self.CALLBACK}", "utf-8")

    def config(self, **changes: Any) -> TrainConfig:
        return TrainConfig.model_validate({
            "base_model": str(self.base), "train_data_dir": str(self.pictures), "lora_rank": 4,
            "output_dir": str(self.folder / "out"), "learning_rate": 1e-3, "weight_decay": 0.0,
            "max_train_steps": 4, "target_modules": "to_q", "device": "cpu"} | changes)

    # --- parts of a run, made as the engine makes them ---

    @functools.cache                        # noqa: B019 - as long as the module's tests
    def parts(self, precision: str = "auto") -> tuple[Any, Precision, Parts]:
        family, numbers = families.get("sd15"), choose(precision, "cpu")    # type: ignore[arg-type]
        return family, numbers, family.load(self.base, numbers, frozenset({"denoiser", "vae"}))

    def found(self, **changes: Any) -> Examples:
        """Scanned, not encoded."""
        config = self.config(**changes)
        metadata = Path(config.metadata_path) if config.metadata_path else None
        return find(config, Path(config.train_data_dir), metadata, 32, 8, lambda event: None)

    def examples(self, **changes: Any) -> Examples:
        config = self.config(**changes)
        family, precision, parts = self.parts(config.precision)
        found = self.found(**changes)
        if config.regularized:
            regularization.add(config, found, family, parts, precision, lambda event: None,
                               Control())
        Encoder(family, self.base, precision, config, lambda event: None, Control()).fill(
            found, config.sample_prompts)
        return found

    def trainer(self, **changes: Any) -> Trainer:
        config = self.config(**changes)
        family, precision, parts = self.parts(config.precision)
        own = replace(parts, denoiser=copy.deepcopy(parts.denoiser), text={})
        return Trainer(config, family, own, precision, self.examples(**changes),
                       lambda event: None, Control())

    def run(self, **changes: Any) -> Run:
        config, events = self.config(**changes), list[Event]()
        CAUGHT.clear()
        result = train(config, events.append, Control())
        return Run(config, result, events, list(CAUGHT))

    @functools.cached_property
    def plain_run(self) -> Run:
        return self.run(output_dir=str(self.folder / "plain"), max_train_steps=0, epochs=1)

    @functools.cached_property
    def other_run(self) -> Run:
        """With another value for most keys that only a whole run can show."""
        other = tiny.tiny_base(self.folder / "other")
        data = tiny.pictures(self.folder / "5_other", 4, captions=False)
        listed = self.folder / "captions.csv"
        listed.write_text("file,caption\n" + "".join(
            f"{path.name},listed words\n" for path in sorted(data.glob("*.png"))), "utf-8")
        return self.run(
            base_model=str(other), train_data_dir=str(data), metadata_path=str(listed),
            output_dir=str(self.folder / "elsewhere"), output_name="blue", batch_size=2,
            precision="bf16", prediction_type="v_prediction", zero_terminal_snr=True,
            validation_split=0.25, save_steps=2, keep_checkpoints=1, validation_steps=3,
            sample_prompts=["a red disc", "a blue disc"], sample_every=3, sample_size="40,48",
            sample_cfg=1.0, sample_inference_steps=2, save_precision="bf16",
            save_format="diffusers", callbacks=[f"{self.own}:Catch"])

    def preview(self, **changes: Any) -> dict[str, Any]:
        """One preview of an adapter that is not at its start: its picture, and how it was drawn."""
        trainer = self.trainer(sample_prompts=["red disc"], **changes)
        generator = torch.Generator().manual_seed(5)
        for parameter in trainer.parameters:
            parameter.data = torch.randn(parameter.shape, generator=generator)
        found: dict[str, Any] = {"calls": 0, "scales": set()}

        def hook(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            found["calls"] += 1
            found["batch"] = len(given[0] if given else named["sample"])
            found["scales"] |= {scale for layer in module.modules()
                                for scale in getattr(layer, "scaling", {}).values()}
        handle = trainer.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
        drawn = Previewer(trainer.family, trainer.parts, trainer.precision, trainer.config,
                          trainer.cond, self.folder / "samples", trainer.emit).draw(1, "ink")
        handle.remove()
        image = Image.open(drawn[0])
        return found | {"image": image.copy(), "told": image.info["parameters"]}

    def plan(self, machine: Machine = CARD, **changes: Any) -> Plan:
        """Of the demo base: its traces are kept for the whole session."""
        config = self.config(base_model="demo", **changes)
        return plan.plan_run(config, Base.of(paths.DEMO / "base"), machine, Data(20, 20))


# --- what rows ask of a trainer ---

def shown(trainer: Trainer, batches: Sequence[Batch]) -> Shown:
    """What the step makes its losses of, without the forward pass."""
    seen: list[Shown] = []

    def losses(latents: Tensor, draw: Draw, cond: Cond, weights: Tensor | None = None) -> Tensor:
        seen.append(Shown(latents, draw, cond, weights))
        return torch.zeros(len(latents), requires_grad=True)
    trainer.losses = losses                 # type: ignore[method-assign, assignment]
    trainer.accumulate(batches)
    del trainer.losses
    return Shown(
        torch.cat([one.latents for one in seen]),
        Draw(torch.cat([one.draw.noise for one in seen]),
             torch.cat([one.draw.timesteps for one in seen])),
        {name: torch.cat([one.cond[name] for one in seen]) for name in seen[0].cond},
        None if seen[0].weights is None else torch.cat(
            [one.weights for one in seen if one.weights is not None]))


def of_one(count: int, index: int = 0) -> list[Batch]:
    """`count` samples of the same picture."""
    return [Batch((index,) * count, tuple(range(count)))]


def moves(trainer: Trainer, update: int = 0) -> dict[str, float]:
    """How far the largest of a parameter's weights goes in one update, by name. AdamW's first step
    is the learning rate wherever there is a gradient."""
    text = trainer.text.models["text_encoder"] if trainer.text else torch.nn.Module()
    rows = {f"words.{n}": one.rows for n, one in trainer.text.rows.items()} if trainer.text else {}
    named = {**dict(trainer.denoiser.named_parameters()), **rows,
             **{f"text.{name}": p for name, p in text.named_parameters()}}
    before = {name: p.detach().clone() for name, p in named.items() if p.requires_grad}
    trainer.update(update)
    return {name: float((named[name].detach() - old).abs().max()) for name, old in before.items()}


def started(trainer: Trainer) -> Trainer:
    """With an adapter away from zero, so that all of it has a gradient."""
    generator = torch.Generator().manual_seed(3)
    for parameter in trainer.parameters:
        if not parameter.any():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return trainer


def near(share: float, wanted: float, count: int) -> bool:
    """Within five deviations of a binomial distribution."""
    return abs(share - wanted) <= 5 * (wanted * (1 - wanted) / count) ** 0.5
