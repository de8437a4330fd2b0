"""kohya's arguments: lora-scripts' TOML, `--config_file`, kohya_ss' presets; its dataset TOML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from core.config import resolve
from core.importers import lines, tables
from core.importers.lines import Entry, Lines
from core.importers.reader import Imported, Reader, absent, number, plain

_OPTIONS = re.compile(r"\s--[a-z]+(\s|$)")            # kohya's prompts: `a cat --w 512 --n blurry`


class Kohya(Reader):
    """kohya's arguments: lora-scripts' TOML, `--config_file`, kohya_ss' presets. Sections are only
    for the eye."""

    table = tables.KOHYA
    choices = tables.KOHYA_CHOICES
    switches = tables.KOHYA_SWITCHES
    defaults = tables.KOHYA_DEFAULTS

    def name(self, entry: Entry) -> str:
        return entry.keys[-1]

    def entries(self, data: Mapping[str, Any], line_of: Lines) -> Iterable[Entry]:
        """The keys that others depend on come first."""
        first = ("max_train_steps", "network_module")
        return sorted(lines.entries(data, line_of), key=lambda entry: entry.keys[-1] not in first)

    def finish(self) -> None:
        # a key that is left out has another default there than here
        self.assume("network_dim")
        self.assume("network_alpha")
        if not {"epochs", "max_train_steps"} & self.result.values.keys():
            self.assume("max_train_epochs")
        if "unet_lr" not in self.theirs:
            self.assume("learning_rate")

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
        """kohya_ss gives it in percent."""
        if share := number(value):
            self.warm_up(share / 100, entry)

    def take_base_weights(self, value: Any, entry: Entry) -> None:
        """LoRAs on the base. Their multipliers are another list, which may be shorter."""
        files = _several(value)
        multipliers = _several(self.theirs.get("base_weights_multiplier", []))
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
        # of LyCORIS, network_args say which kind
        if str(value) != "lycoris.kohya":
            self.choose("adapter", tables.ADAPTERS, entry)

    def take_dora_wd(self, value: Any, entry: Entry) -> None:
        if str(value).lower() == "true":
            self.put("adapter", "dora", entry)

    take_model_train_type = Reader.family

    def take_sdxl(self, value: Any, entry: Entry) -> None:
        if value:
            self.family("sdxl-lora", entry)

    def take_v2(self, value: Any, entry: Entry) -> None:
        if value:
            self.leave(entry, "family")

    def take_clip_skip(self, value: Any, entry: Entry) -> None:
        if number(value) > 1:
            self.put("clip_skip", value, entry)

    def take_max_token_length(self, value: Any, entry: Entry) -> None:
        """lora-scripts writes 255, of which kohya uses three chunks of 75."""
        self.put("max_tokens", int(number(value)) // 75 * 75 or value, entry)

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
        for key, text in _pairs(value):
            self.dispatch({"dropout": "network_dropout"}.get(key, key),
                          Entry((*entry.keys, key), text, entry.line))

    def take_optimizer_args(self, value: Any, entry: Entry) -> None:
        rest = {}
        for key, text in _pairs(value):
            if key == "weight_decay":
                self.put("weight_decay", text, entry)
            elif key == "betas" and len(numbers := re.findall(r"[\d.eE-]+", text)) == 2:
                self.put("adam_beta1", numbers[0], entry)
                self.put("adam_beta2", numbers[1], entry)
            else:
                rest[key] = _literal(text)
        if rest:
            self.put("optimizer_args", rest, Entry(entry.keys, rest, entry.line))

    def take_sample_prompts(self, value: Any, entry: Entry) -> None:
        """The prompts themselves, or a text file of them."""
        text = str(value) if not isinstance(value, list) else "\n".join(map(str, value))
        if text.endswith((".txt", ".toml", ".json")):
            file = resolve(text, self.result.file.parent)
            if file.suffix != ".txt" or not file.is_file():
                return self.leave(entry, "file")
            text = file.read_text("utf-8", "replace")
        lines = [line.strip() for line in text.splitlines()]
        prompts = [_OPTIONS.split(f" {line}")[0].strip() for line in lines
                   if line and not line.startswith("#")]
        if any(_OPTIONS.search(line) for line in lines):
            self.leave(entry, "prompt_options")
        self.put("sample_prompts", [prompt for prompt in prompts if prompt], entry)

    def take_resume(self, value: Any, entry: Entry) -> None:
        self.leave(entry, "state")

    def take_dataset_config(self, value: Any, entry: Entry) -> None:
        file = resolve(str(value), self.result.file.parent)
        if not file.is_file():
            return self.leave(entry, "file")
        data, line_of = lines.read(file)
        reader = Dataset if "datasets" in data else Kohya
        inner = reader(file, "kohya dataset").take(data, line_of)
        self.result.values |= inner.values
        self.result.left += inner.left


class Dataset(Kohya):
    """kohya's dataset TOML: [general], [[datasets]], [[datasets.subsets]]. One subset is one
    folder; of several, the first one is taken."""

    table = tables.KOHYA_DATASET

    def take(self, data: Mapping[str, Any], line_of: Lines) -> Imported:
        for entry in lines.entries(data, line_of):
            if absent(entry.value):
                continue
            if any(key.isdigit() and key != "0" for key in entry.keys[:-1]):
                self.leave(entry, "second")
            else:
                self.dispatch(entry.keys[-1], entry)
        return self.result

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


def _pairs(value: Any) -> list[tuple[str, str]]:
    """["conv_dim=4", "algo=loha"], or kohya_ss' one line of them."""
    parts = value if isinstance(value, list) else re.findall(r"[^\s=]+=\S+", str(value))
    return [(key.strip(), text.strip()) for part in parts
            for key, equals, text in [str(part).partition("=")] if equals]


def _literal(text: str) -> Any:
    """A Python literal as kohya reads it; other words stay text."""
    lowered = text.lower()
    if lowered in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[lowered]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _several(value: Any) -> list[Any]:
    """A list; or text with one item a line, or on one line between spaces, as on kohya's command
    line."""
    if isinstance(value, list):
        return value
    text = str(value)
    return [line.strip() for line in text.splitlines() if line.strip()] if (
        "\n" in text.strip()) else text.split()
