"""OneTrainer's JSON: presets and saved configs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core.importers import lines, tables
from core.importers.lines import Entry, Lines
from core.importers.reader import Reader, number, plain

# Beginnings of model types whose bases learn no flow.
NO_FLOWS = ("stablediffusion15", "stablediffusion2", "stablediffusionxl")


class OneTrainer(Reader):
    table = tables.ONETRAINER
    choices = tables.ONETRAINER_CHOICES
    switches = tables.ONETRAINER_SWITCHES
    defaults = tables.ONETRAINER_DEFAULTS

    def entries(self, data: Mapping[str, Any], line_of: Lines) -> Iterable[Entry]:
        """A group that has no meaning here is reported in one line."""
        known = {name.split(".")[0] for name in (
            *self.table, *self.special, *self.choices, *self.switches)}
        for key, value in data.items():
            if key in known:
                yield from lines.entries(value, line_of, (key,))
            else:
                yield Entry((key,), value, line_of.get((key,), 1))

    def finish(self) -> None:
        for name in self.defaults:
            self.assume(name)

    def dispatch(self, name: str, entry: Entry) -> None:
        if name.startswith("concepts.") and name not in self.table:
            self.concept(entry)
        elif not name.startswith("__"):
            super().dispatch(name, entry)

    def concept(self, entry: Entry) -> None:
        name = ".".join(entry.keys[2:])
        if entry.keys[1] != "0":
            if name == "path":
                self.leave(entry, "second")
        elif name in ("balancing", "image_variations", "text_variations") and number(
                entry.value) != 1:
            self.leave(entry, "repeats" if name == "balancing" else "unknown")

    def take_concept_file_name(self, value: Any, entry: Entry) -> None:
        if "concepts.0.path" not in self.theirs:
            self.leave(entry, "concepts")

    take_model_type = Reader.family

    def take_training_method(self, value: Any, entry: Entry) -> None:
        if value != "LORA":
            self.leave(entry, "value")

    def take_output_model_destination(self, value: Any, entry: Entry) -> None:
        path = Path(str(value).replace("\\", "/"))
        self.put("output_dir", str(path.parent), entry)
        self.put("output_name", path.stem, entry)

    def take_resolution(self, value: Any, entry: Entry) -> None:
        """A comma stands between sizes to choose from at random."""
        if "," in str(value):
            self.leave(entry, "resolutions")
        else:
            self.put("max_resolution", value, entry)

    take_learning_rate_warmup_steps = Reader.warm_up

    def take_gradient_checkpointing(self, value: Any, entry: Entry) -> None:
        self.put("gradient_checkpointing", value not in ("OFF", False), entry)
        if value == "CPU_OFFLOADED":
            self.leave(entry, "unknown")

    def take_unet__weight_dtype(self, value: Any, entry: Entry) -> None:
        if plain(value) not in {**tables.PRECISIONS, "none": ""}:
            self.choose("base_precision", tables.BASE_PRECISIONS, entry)

    def take_unet__train(self, value: Any, entry: Entry) -> None:
        if value is False:
            self.leave(entry, "value")

    def take_text_encoder__train(self, value: Any, entry: Entry) -> None:
        if value and not self.theirs.get("text_encoder.learning_rate"):
            self.put("text_encoder_lr", self.theirs.get("learning_rate", 0), entry)

    def take_loss_weight_fn(self, value: Any, entry: Entry) -> None:
        if value == "MIN_SNR_GAMMA":
            self.put("min_snr_gamma", self.theirs.get("loss_weight_strength", 5.0), entry)
        elif value == "DEBIASED_ESTIMATION":
            self.put("debiased_estimation", True, entry)
        elif value != "CONSTANT":
            self.leave(entry, "value")

    def take_timestep_distribution(self, value: Any, entry: Entry) -> None:
        """Of flows: what noise schedules draw is uniform here. Its normal distribution of the
        logit has the mean noising_bias and the deviation noising_weight + 1."""
        if plain(self.theirs.get("model_type", "")).startswith(NO_FLOWS):
            if value != "UNIFORM":
                self.leave(entry, "value")
            return
        self.choose("timestep_sampling", tables.SCHEMES, entry)
        if not self.theirs.get("dynamic_timestep_shifting"):
            self.put("flow_shift", number(self.theirs.get("timestep_shift", 1.0)), entry)
        if value == "LOGIT_NORMAL":
            self.put("logit_mean", number(self.theirs.get("noising_bias", 0.0)), entry)
            self.put("logit_std", 1 + number(self.theirs.get("noising_weight", 0.0)), entry)

    def take_ema(self, value: Any, entry: Entry) -> None:
        if value not in ("OFF", False):
            self.put("ema_decay", self.theirs.get("ema_decay", 0.999), entry)

    def take_text_encoder_layer_skip(self, value: Any, entry: Entry) -> None:
        """0 is the last layer there, 1 here."""
        if number(value):
            self.put("clip_skip", int(number(value)) + 1, entry)

    def take_save_every(self, value: Any, entry: Entry) -> None:
        unit = self.theirs.get("save_every_unit", "NEVER")
        if unit == "STEP":
            self.put("save_steps", value, entry)
        elif unit != "NEVER":
            self.leave(entry, "epochs")

    take_timestep_shift = take_dynamic_timestep_shifting = Reader.read_with_another_key
    take_noising_bias = take_noising_weight = take_loss_weight_strength = take_timestep_shift
    take_ema_decay = take_save_every_unit = take_timestep_shift
