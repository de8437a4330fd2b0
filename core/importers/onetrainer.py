"""OneTrainer's JSON: presets and saved configs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core.config import other_names as tables
from core.importers import lines
from core.importers.lines import Entry, Lines
from core.importers.reader import Imported, Reader, number, plain

# Beginnings of model types whose bases learn no flow.
NO_FLOWS = ("stablediffusion15", "stablediffusion2", "stablediffusionxl")
# Parts of models. Every saved config has all of them, whichever its model has.
PARTS = ("unet", "prior", "transformer")
TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
OTHER_PARTS = ("decoder", "decoder_text_encoder", "decoder_vqgan", "effnet_encoder", "embedding")


class OneTrainer(Reader):
    table = tables.ONETRAINER
    choices = tables.ONETRAINER_CHOICES
    switches = tables.ONETRAINER_SWITCHES
    defaults = tables.ONETRAINER_DEFAULTS
    act_with = tables.ONETRAINER_ACT_WITH

    def entries(self, data: Mapping[str, Any], line_of: Lines) -> Iterable[Entry]:
        """A group that has no meaning here is reported in one line."""
        self.lines = line_of
        known = {name.split(".")[0] for name in (
            *self.table, *self.special, *self.choices, *self.switches)}
        flow = not plain(data.get("model_type", "")).startswith(NO_FLOWS)
        # older versions called a transformer `prior`
        used = next(part for part in (["transformer", "prior"] if flow else []) + ["unet"]
                    if part in data or part == "unet")
        for key, value in data.items():
            if key in PARTS and key == used and isinstance(value, dict):
                for entry in lines.entries(value, line_of, (key,)):
                    if entry.keys[-1] in ("learning_rate", "weight_dtype", "train"):
                        yield entry
            elif (key in PARTS and isinstance(value, dict) and "train" in value) or (
                    key in OTHER_PARTS):
                continue
            elif key == "vae" and isinstance(value, dict):
                named = (key, "model_name")
                yield Entry(named, value.get(named[1]), line_of.get(named, 1))
            elif key in known and key not in ("concepts", "samples"):
                yield from lines.entries(value, line_of, (key,))
            else:
                yield Entry((key,), value, line_of.get((key,), 1))

    def name(self, entry: Entry) -> str:
        """The trained part of a model has another name in each kind."""
        head, *rest = entry.keys
        return ".".join(["denoiser" if head in PARTS and rest else head, *rest])

    def finish(self) -> None:
        for name in self.defaults:
            self.assume(name)
        if "target_modules" not in self.result.values and not self.theirs.get("layer_filter"):
            self.every_layer()

    def every_layer(self) -> None:
        """Its default: all linear layers and convolutions, those outside of blocks too."""
        values = self.result.values
        values["target_modules"] = "all-linear"
        if self.convolutional:
            values |= {f"conv_{end}": values[f"lora_{end}"] for end in ("rank", "alpha")
                       if f"lora_{end}" in values}
        key = ("layer_filter_preset",)
        entry = Entry(key, "full", self.lines.get(key, 1))
        self.leave(entry, "layers")

    @property
    def convolutional(self) -> bool:
        return plain(self.theirs.get("model_type", "")).startswith(NO_FLOWS)

    def take_layer_filter(self, value: Any, entry: Entry) -> None:
        """Parts of layers' names, or regular expressions; the preset is their name."""
        kind = next((kind for pattern, kind in tables.FILTERS.items() if re.fullmatch(
            pattern, plain(value))), "")
        # of a UNet `attentions`, which holds proj_in and proj_out as well
        if plain(value) == "attnmlp" and self.convolutional:
            kind = "all-linear"
        if kind:
            self.put("target_modules", kind, entry)
        else:
            self.leave(entry, "value")

    def take_layer_filter_preset(self, value: Any, entry: Entry) -> None:
        if not self.theirs.get("layer_filter") and plain(value) not in ("full", "custom"):
            self.take_layer_filter(value, entry)

    def dispatch(self, name: str, entry: Entry) -> None:
        head, _, key = name.partition(".")
        if head in TEXT and key:
            if key == "train" and entry.value:
                self.text_encoder(head, entry)
        elif not name.startswith("__"):
            super().dispatch(name, entry)

    # concepts and samples: lists, or files of their own

    def take_concepts(self, value: Any, entry: Entry) -> None:
        self.include(Concepts(self.result.file, self.result.kind).take(
            {"concepts": value}, self.lines))

    def take_concept_file_name(self, value: Any, entry: Entry) -> None:
        if "concepts" in self.theirs:
            return
        if file := self.beside(value):
            self.include(Concepts(file, self.result.kind).take(*lines.read(file)))
        else:
            self.leave(entry, "concepts")

    def take_sample_definition_file_name(self, value: Any, entry: Entry) -> None:
        if "samples" in self.theirs:
            return
        if file := self.beside(value):
            self.take_samples(lines.read(file)[0].get(lines.LIST), entry)
        else:
            self.leave(entry, "file")

    def take_samples(self, value: Any, entry: Entry) -> None:
        shots = [sample for sample in value if isinstance(sample, dict)
                 and sample.get("enabled", True)] if isinstance(value, list) else []
        self.prompts([{
            "prompt": str(shot.get("prompt", "")),
            "sample_size": f"{shot.get('width', 512)},{shot.get('height', 512)}",
            "sample_inference_steps": shot.get("diffusion_steps", 20),
            "sample_cfg": shot.get("cfg_scale", 7.0),
            **({"negative_prompt": shot["negative_prompt"]} if shot.get("negative_prompt") else {})}
            for shot in shots], entry)

    def beside(self, value: Any) -> Path | None:
        """Another file of OneTrainer's, if it is there. Its path starts in OneTrainer's folder:
        that of the config, or the one above it."""
        folder, name = self.result.file.absolute().parent, str(value).replace("\\", "/")
        return next((folder / name for folder in (folder, folder.parent, Path())
                     if "\0" not in name and (folder / name).is_file()), None)

    def take_learning_rate(self, value: Any, entry: Entry) -> None:
        if not number(self.theirs.get("denoiser.learning_rate")):
            self.put("learning_rate", value, entry)

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

    def take_denoiser__weight_dtype(self, value: Any, entry: Entry) -> None:
        if plain(value) == "none":
            value = self.theirs.get("weight_dtype", "NONE")
        if plain(value) not in {**tables.PRECISIONS, "none": ""}:
            self.choose("base_precision", tables.BASE_PRECISIONS, Entry(
                entry.keys, value, entry.line))

    def take_denoiser__train(self, value: Any, entry: Entry) -> None:
        if value is False:
            self.leave(entry, "value")

    def text_encoder(self, name: str, entry: Entry) -> None:
        """One that trains: its rate, or that of all, and when it rests."""
        self.put("text_encoder_lr", self.theirs.get(f"{name}.learning_rate") or self.theirs.get(
            "learning_rate", 0), entry)
        unit = self.theirs.get(f"{name}.stop_training_after_unit", "NEVER")
        after = Entry((name, "stop_training_after"), self.theirs.get(
            f"{name}.stop_training_after", 0), entry.line)
        if unit == "STEP":
            self.put("text_encoder_stop", after.value, after)
        elif unit != "NEVER" and number(after.value) < number(self.theirs.get("epochs", 100)):
            self.leave(after, "text_epochs")

    def take_huber_strength(self, value: Any, entry: Entry) -> None:
        if number(value) and not number(self.theirs.get("mse_strength", 1.0)):
            self.put("loss_type", "huber", entry)
            self.put("huber_schedule", "constant", entry)
        elif number(value):
            self.leave(entry, "value")

    def take_mse_strength(self, value: Any, entry: Entry) -> None:
        if number(value) != 1 and not number(self.theirs.get("huber_strength")):
            self.leave(entry, "value")

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
        if self.convolutional:
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
        if self.every("save_steps", "save_every", value, entry):
            # all of them stay there
            self.put("keep_checkpoints", 0, entry)

    def take_sample_after(self, value: Any, entry: Entry) -> None:
        self.every("sample_every", "sample_after", value, entry)

    def take_validate_after(self, value: Any, entry: Entry) -> None:
        if self.theirs.get("validation"):
            self.every("validation_steps", "validate_after", value, entry)

    def every(self, ours: str, theirs: str, value: Any, entry: Entry) -> bool:
        unit = self.theirs.get(f"{theirs}_unit", "NEVER")
        if unit == "STEP":
            self.put(ours, value, entry)
        elif unit != "NEVER":
            self.leave(entry, "epochs")
        return bool(unit == "STEP")

    take_timestep_shift = take_dynamic_timestep_shifting = Reader.read_with_another_key
    take_noising_bias = take_noising_weight = take_loss_weight_strength = take_timestep_shift
    take_ema_decay = take_save_every_unit = take_sample_after_unit = take_timestep_shift
    take_validate_after_unit = take_validation = take_weight_dtype = take_timestep_shift
    take_layer_filter_regex = take_timestep_shift
    take_text_encoder = take_text_encoder_2 = take_text_encoder_3 = take_timestep_shift
    take_text_encoder_4 = take_timestep_shift


class Concepts(Reader):
    """OneTrainer's folders. Those that are switched off are left out without a word; one is
    trained, one keeps what the base knows."""

    table = tables.ONETRAINER_CONCEPT

    def take(self, data: Mapping[str, Any], line_of: Lines) -> Imported:
        (name, concepts), = data.items()
        for number_, concept in enumerate(concepts if isinstance(concepts, list) else ()):
            if not isinstance(concept, dict) or concept.get("enabled", True) is False:
                continue
            kind = plain(concept.get("type", "STANDARD"))
            found = list(lines.entries(concept, line_of, (name, str(number_))))
            path = next((entry for entry in found if entry.keys[2:] == ("path",)), None)
            if path is None:
                continue
            if kind == "validation" or concept.get("validation_concept"):
                self.leave(path, "validation")
            elif kind == "priorprediction" and "reg_data_dir" not in self.result.values:
                self.put("reg_data_dir", path.value, path)
            elif kind != "standard" or "train_data_dir" in self.result.values:
                self.leave(path, "second")
            else:
                for entry in found:
                    self.dispatch(".".join(entry.keys[2:]), entry)
        return self.result

    def dispatch(self, name: str, entry: Entry) -> None:
        # of the many ways to change pictures and texts, those that are on are told
        if name in self.table or name in self.special or (
                entry.value is True and "enable_" in name):
            super().dispatch(name, entry)

    def take_balancing(self, value: Any, entry: Entry) -> None:
        if number(value) != 1:
            self.leave(entry, "repeats")

    def take_image_variations(self, value: Any, entry: Entry) -> None:
        if number(value) != 1:
            self.leave(entry, "unknown")

    take_text_variations = take_loss_weight = take_image_variations

    def take_text__prompt_source(self, value: Any, entry: Entry) -> None:
        """`sample`: a text beside each picture; else one text for all, or the files' names."""
        if value != "sample":
            self.leave(entry, "class_tokens")
