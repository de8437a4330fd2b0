"""kohya's arguments: lora-scripts' TOML, `--config_file`, kohya_ss' presets; its dataset TOML,
and musubi's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core import prompt_markup
from core.config import other_names as tables
from core.config import resolve
from core.errors import UserError
from core.importers import lines
from core.importers.kohya_values import literal, pairs, several, shot
from core.importers.lines import Entry, Lines
from core.importers.reader import Imported, Reader, absent, number, plain
from core.serialization import json_of


class Kohya(Reader):
    """kohya's arguments: lora-scripts' TOML, `--config_file`, kohya_ss' presets. Sections are only
    for the eye."""

    table = tables.KOHYA
    choices = tables.KOHYA_CHOICES
    switches = tables.KOHYA_SWITCHES
    defaults = tables.KOHYA_DEFAULTS
    act_with = tables.KOHYA_ACT_WITH

    def name(self, entry: Entry) -> str:
        return entry.keys[-1]

    def entries(self, data: Mapping[str, Any], line_of: Lines) -> Iterable[Entry]:
        """The keys that others depend on come first."""
        first = ("max_train_steps", "lr_warmup_steps", "network_module", "LoRA_type")
        return sorted(lines.entries(data, line_of), key=lambda entry: entry.keys[-1] not in first)

    def finish(self) -> None:
        # of the configs of other programs, which have a key or two of the same name
        unknown = sum(left.why == "unknown" for left in self.result.left)
        if unknown > 3 * max(1, len(self.result.values)):
            raise UserError("config_import.not_settings", file=self.result.file)
        # a key that is left out has another default there than here
        self.assume("network_dim")
        self.assume("network_alpha")
        if self.result.values.get("save_steps"):
            self.assume("save_last_n_steps")
        self.layers()
        if not {"epochs", "max_train_steps"} & self.result.values.keys():
            self.assume("max_train_epochs")
        if "unet_lr" not in self.theirs:
            self.assume("learning_rate")

    def layers(self) -> None:
        """A network trains all layers in the model's blocks; OFT, and a preset of LyCORIS, only
        those of attention. LyCORIS' preset `full`, taken where none is named, trains the
        convolutions too, at the same rank where conv_dim is left out; its others don't."""
        values, assumed = self.result.values, self.result.assumed
        network = dict(pairs(self.theirs.get("network_args", "")))
        network |= dict(pairs(self.theirs.get("network_args_custom", "")))
        module = str(self.theirs.get("network_module", ""))
        if "target_modules" not in values:
            found = "attention" if module.startswith("networks.oft") and str(
                network.get("enable_all_linear")).lower() != "true" else (
                self.spec.kohya_targets if self.spec else "all-linear")
            values["target_modules"] = found if isinstance(found, str) else list(found)
            assumed["target_modules"] = found if isinstance(found, str) else ", ".join(found)
        preset = network.get("preset", self.theirs.get("LyCORIS_preset", "full"))
        if preset != "full" and self.acts("LyCORIS_preset") and self.acts("preset"):
            values.pop("conv_rank", None)
            values.pop("conv_alpha", None)
        elif module == "lycoris.kohya" and not {"conv_dim", "conv_rank"} & {*network, *values} and (
                "lora_rank" in values):
            values["conv_rank"] = assumed["conv_dim"] = values["lora_rank"]
            if "lora_alpha" in values:
                values["conv_alpha"] = values["lora_alpha"]

    def take_preset(self, value: Any, entry: Entry) -> None:
        if plain(value) == "attnonly":
            self.put("target_modules", "attention", entry)
        elif plain(value) not in ("full", "fulllin", "attnmlp", "unettransformeronly"):
            self.leave(entry, "value")

    take_LyCORIS_preset = take_preset

    # rates

    def take_learning_rate(self, value: Any, entry: Entry) -> None:
        if not number(self.theirs.get("unet_lr")):
            self.put("learning_rate", value, entry)

    def take_unet_lr(self, value: Any, entry: Entry) -> None:
        if number(value):
            self.put("learning_rate", value, entry)

    def take_text_encoder_lr(self, value: Any, entry: Entry) -> None:
        value = value[0] if isinstance(value, list) and len(set(map(str, value))) == 1 else value
        if not self.theirs.get("network_train_unet_only"):
            self.put("text_encoder_lr", value, entry)

    # how long

    def take_max_train_epochs(self, value: Any, entry: Entry) -> None:
        if number(value):
            self.put("epochs", value, entry)
            self.result.values.pop("max_train_steps", None)

    def take_epoch(self, value: Any, entry: Entry) -> None:
        if not number(self.theirs.get("max_train_epochs")) and not number(
                self.theirs.get("max_train_steps")):
            self.take_max_train_epochs(value, entry)

    def take_max_train_steps(self, value: Any, entry: Entry) -> None:
        if number(value) and not number(self.theirs.get("max_train_epochs")):
            self.put("max_train_steps", value, entry)

    take_lr_warmup_steps = Reader.warm_up

    def take_lr_warmup(self, value: Any, entry: Entry) -> None:
        """kohya_ss gives it in percent, where it gives no steps."""
        if (share := number(value)) and not number(self.theirs.get("lr_warmup_steps")):
            self.warm_up(share / 100, entry)

    def take_base_weights(self, value: Any, entry: Entry) -> None:
        """LoRAs on the base. Their multipliers are another list, which may be shorter."""
        files = several(value)
        multipliers = several(self.theirs.get("base_weights_multiplier", []))
        try:
            weights = [*map(float, multipliers), *[1.0] * len(files)]
        except (TypeError, ValueError):
            return self.leave(entry, "value")
        self.put("base_loras", [f"{file}:{weight:g}" for file, weight in zip(
            files, weights, strict=False)], entry)

    take_network_train_unet_only = take_base_weights_multiplier = Reader.read_with_another_key

    # files beside the base

    def take_clip_l(self, value: Any, entry: Entry) -> None:
        known = self.result.values.get("text_encoders", [])
        self.put("text_encoders", [*known, str(value)], entry)

    take_clip_g = take_t5xxl = take_gemma2 = take_qwen3 = take_text_encoder = take_clip_l
    take_flux1_clip_l = take_flux1_t5xxl = take_sd3_clip_l = take_sd3_clip_g = take_clip_l
    take_sd3_t5xxl = take_clip_l

    # choices

    def take_optimizer_type(self, value: Any, entry: Entry) -> None:
        if "." in str(value):
            self.put("optimizer", value, entry)
        else:
            self.choose("optimizer", tables.OPTIMIZERS, entry)

    take_optimizer = take_optimizer_type

    def take_use_8bit_adam(self, value: Any, entry: Entry) -> None:
        if value and "optimizer_type" not in self.theirs:
            self.put("optimizer", "adamw8bit", entry)

    def take_network_module(self, value: Any, entry: Entry) -> None:
        """networks.lora, networks.loha; networks.lora_flux ...: one for each family."""
        _, _, module = str(value).partition("networks.")
        kind, _, family = module.partition("_")
        if family and family != "fa":
            self.family(family, entry)
        # of LyCORIS, network_args say which kind
        if str(value) != "lycoris.kohya":
            ours = "" if family == "fa" else tables.ADAPTERS.get(kind, "")
            self.choose("adapter", {plain(value): ours}, entry)

    def take_dora_wd(self, value: Any, entry: Entry) -> None:
        if str(value).lower() != "true":
            return
        algo = dict(pairs(self.theirs.get("network_args", ""))).get("algo", "lora")
        kind = tables.ADAPTERS.get(plain(self.theirs.get("LoRA_type", algo)))
        # LoHa and LoKr have no such form here
        if kind == "lora":
            self.put("adapter", "dora", entry)
        else:
            self.leave(entry, "value")

    take_model_train_type = take_model_type = Reader.family

    def take_sdxl(self, value: Any, entry: Entry) -> None:
        if value:
            self.family("sdxl-lora", entry)

    def take_v2(self, value: Any, entry: Entry) -> None:
        if value:
            self.family("sd2-lora", entry)

    def take_flux1_checkbox(self, value: Any, entry: Entry) -> None:
        if value:
            self.family(entry.keys[-1].removesuffix("_checkbox"), entry)

    take_sd3_checkbox = take_flux1_checkbox
    take_noise_offset_type = take_enable_preview = Reader.read_with_another_key
    take_enable_base_weight = take_enable_block_weights = Reader.read_with_another_key
    take_sample_height = take_randomly_choice_prompt = Reader.read_with_another_key

    def take_clip_skip(self, value: Any, entry: Entry) -> None:
        if number(value) > 1:
            self.put("clip_skip", value, entry)

    def take_max_token_length(self, value: Any, entry: Entry) -> None:
        """lora-scripts writes 255, of which kohya uses three chunks of 75."""
        self.put("max_tokens", int(number(value)) // 75 * 75 or value, entry)

    def take_caption_prefix(self, value: Any, entry: Entry) -> None:
        self.put("trigger_word", str(value).strip(" ,"), entry)

    def take_save_last_n_steps(self, value: Any, entry: Entry) -> None:
        """How many steps a checkpoint is kept, beside the newest."""
        every = number(self.theirs.get("save_every_n_steps"))
        if number(value) and every:
            self.put("keep_checkpoints", int(number(value) // every) + 1, entry)

    def take_lr_decay_steps(self, value: Any, entry: Entry) -> None:
        """Steps, or a share of them (below 1)."""
        steps = number(value)
        if steps >= 1:
            steps /= self.result.values.get("max_train_steps", 0) or steps * 2
        if plain(self.theirs.get("lr_scheduler")) == "warmupstabledecay":
            self.put("lr_decay_share", steps, entry)

    def take_blocks_to_swap(self, value: Any, entry: Entry) -> None:
        if number(value):
            self.leave(entry, "blocks")

    # noise levels of flows

    def take_timestep_sampling(self, value: Any, entry: Entry) -> None:
        """`sigma` leaves the choice to weighting_scheme."""
        kind = plain(value)
        if kind == "sigma":
            return
        self.choose("timestep_sampling", tables.LEVELS, entry)
        # of these, kohya takes no discrete_flow_shift
        if kind in ("uniform", "sigmoid"):
            self.put("flow_shift", 1.0, entry)

    def take_weighting_scheme(self, value: Any, entry: Entry) -> None:
        # these two weigh the loss and choose no noise levels
        if plain(value) in ("sigmasqrt", "cosmap"):
            self.leave(entry, "value")
        elif self.by_scheme:
            self.choose("timestep_sampling", tables.SCHEMES, entry)

    def take_discrete_flow_shift(self, value: Any, entry: Entry) -> None:
        if self.by_scheme or plain(self.theirs["timestep_sampling"]) == "shift":
            self.put("flow_shift", value, entry)

    def take_sigmoid_scale(self, value: Any, entry: Entry) -> None:
        if not self.by_scheme and plain(self.theirs["timestep_sampling"]) != "uniform":
            self.put("logit_std", value, entry)

    def take_logit_mean(self, value: Any, entry: Entry) -> None:
        if self.by_scheme and plain(self.theirs.get("weighting_scheme")) == "logitnormal":
            self.put(entry.keys[-1], value, entry)

    take_logit_std = take_logit_mean

    def take_mode_scale(self, value: Any, entry: Entry) -> None:
        if self.by_scheme and plain(self.theirs.get("weighting_scheme")) == "mode":
            self.put("mode_scale", value, entry)

    @property
    def by_scheme(self) -> bool:
        """Whether weighting_scheme chooses the noise levels."""
        return plain(self.theirs.get("timestep_sampling", "sigma")) == "sigma"

    # lists and texts

    def take_network_args(self, value: Any, entry: Entry) -> None:
        # the algorithm before its variant
        for key, text in sorted(pairs(value), key=lambda pair: pair[0] == "dora_wd"):
            self.dispatch({"dropout": "network_dropout"}.get(key, key),
                          Entry((*entry.keys, key), text, entry.line))

    take_network_args_custom = take_network_args

    def take_optimizer_args(self, value: Any, entry: Entry) -> None:
        rest = {}
        for key, text in pairs(value):
            if key == "weight_decay":
                self.put("weight_decay", text, entry)
            elif key == "betas" and len(numbers := re.findall(r"[\d.eE-]+", text)) == 2:
                self.put("adam_beta1", numbers[0], entry)
                self.put("adam_beta2", numbers[1], entry)
            else:
                rest[key] = literal(text)
        if rest:
            self.put("optimizer_args", rest, Entry(entry.keys, rest, entry.line))

    take_optimizer_args_custom = take_optimizer_args

    def take_sample_prompts(self, value: Any, entry: Entry) -> None:
        """The prompts themselves, or a text file of them."""
        text = str(value) if not isinstance(value, list) else "\n".join(map(str, value))
        if text.endswith((".txt", ".toml", ".json")):
            file = resolve(text, self.result.file.parent)
            if file.suffix != ".txt" or not file.is_file():
                return self.leave(entry, "file")
            text = lines.text_of(file)
        self.prompts([shot(line) for line in map(str.strip, text.splitlines())
                      if line and not line.startswith("#")], entry)

    take_prompt_file = take_positive_prompts = take_sample_prompts

    def take_sample_width(self, value: Any, entry: Entry) -> None:
        self.put("sample_size", f"{value},{self.theirs.get('sample_height', value)}", entry)

    def take_keep_tokens_separator(self, value: Any, entry: Entry) -> None:
        """Those of kohya's own examples are obeyed wherever a caption has them."""
        if not prompt_markup.KINDS["separator"].fullmatch(str(value)):
            self.leave(entry, "value")

    take_secondary_separator = take_keep_tokens_separator

    def take_resume(self, value: Any, entry: Entry) -> None:
        self.leave(entry, "state")

    def take_dataset_config(self, value: Any, entry: Entry) -> None:
        file = resolve(str(value), self.result.file.parent)
        if not file.is_file():
            return self.leave(entry, "file")
        data, line_of = lines.read(file)
        reader = Dataset if "datasets" in data else Kohya
        self.include(reader(file, "kohya dataset").take(data, line_of))


class Dataset(Kohya):
    """A dataset TOML: [general], [[datasets]], [[datasets.subsets]]; musubi's has no subsets. One
    folder is trained, and one is of regularisation pictures: of several, the first one is taken."""

    table = tables.KOHYA_DATASET
    folders = ("image_dir", "image_directory", "image_jsonl_file", "metadata_file")

    def take(self, data: Mapping[str, Any], line_of: Lines) -> Imported:
        # general keys first: those of a dataset, then of a subset, override them
        entries = sorted((entry for entry in lines.entries(data, line_of)
                          if not absent(entry.value)), key=lambda entry: len(entry.keys))
        regular = {entry.keys[:-1] for entry in entries
                   if entry.keys[-1] == "is_reg" and entry.value is True}
        places = [entry.keys[:-1] for entry in entries if entry.keys[-1] in self.folders]
        chosen = next((place for place in places if place not in regular), ("datasets", "0"))
        self.regular = next((place for place in places if place in regular), ())
        for entry in entries:
            above, key = entry.keys[:-1], entry.keys[-1]
            if above == self.regular and key in self.folders:
                self.put("reg_data_dir", entry.value, entry)
            elif above == chosen[:len(above)] or above == ("general",) or key == "num_repeats":
                self.dispatch(key, entry)
            elif key in self.folders:
                self.leave(entry, "second")
        return self.result

    def take_image_dir(self, value: Any, entry: Entry) -> None:
        self.put("train_data_dir", value, entry)

    take_image_directory = take_image_dir

    def take_image_jsonl_file(self, value: Any, entry: Entry) -> None:
        """musubi's captions, each with the path of its picture, which lie in one folder."""
        self.put("metadata_path", value, entry)
        file = resolve(str(value), self.result.file.parent)
        rows = [json_of(line, dict) for line in lines.text_of(file).splitlines()
                ] if file.is_file() else []
        folders = {str(Path(str(row["image_path"]).replace("\\", "/")).parent)
                   for row in rows if "image_path" in row}
        if len(folders) == 1:
            self.put("train_data_dir", folders.pop(), entry)
        else:
            self.leave(entry, "jsonl")

    take_is_reg = Reader.read_with_another_key

    def take_num_repeats(self, value: Any, entry: Entry) -> None:
        if value != 1:
            self.leave(entry, "repeats")

    def take_class_tokens(self, value: Any, entry: Entry) -> None:
        self.leave(entry, "class_tokens")

    def take_metadata_file(self, value: Any, entry: Entry) -> None:
        if str(value).lower().endswith((".jsonl", ".csv")):
            self.put("metadata_path", value, entry)
        else:
            self.leave(entry, "value")
