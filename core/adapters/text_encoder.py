"""Text encoders that learn: a LoRA on them, new words, captions encoded in the step.

Only token numbers are cached. After `text_encoder_stop` all captions are encoded once, and the
encoders leave the device: from then on a step is what it is without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from core.adapters import lora
from core.config import TrainConfig
from core.dataset.text_embeddings import batched, grouped, sizes_of
from core.errors import UserError
from core.families.base import Cond, Family, Parts
from core.lora_files import textual_inversion
from core.lora_files.textual_inversion import NewWord, Rows
from core.weights.precision import Precision, autocast

WORDS = "words."                            # prefix of the rows' names in a checkpoint


class TextTraining:
    """Learns in `parts.text`, which must be loaded."""

    def __init__(self, config: TrainConfig, family: Family, parts: Parts, precision: Precision,
                 cast: Callable[[], AbstractContextManager[object]] | None = None) -> None:
        self.config, self.family, self.parts, self.precision = config, family, parts, precision
        self.cast = cast or (lambda: autocast(precision))
        self.models = {name: model for name, (_, model)
                       in textual_inversion.encoders(parts.text).items()}
        self.live = True
        self.tokens: dict[str, dict[str, Tensor]] = {}          # by text, (1, L) each
        self.adapters: list[nn.Parameter] = []
        self.words: dict[str, str] = {}                         # new word -> its tokens
        self.rows: dict[str, Rows] = {}                         # by encoder
        # first, as it freezes everything else
        if config.text_encoder_lr:
            of_text = TrainConfig(lora_rank=config.text_encoder_rank or config.lora_rank,
                                  lora_alpha=self.alpha, seed=config.seed,
                                  lora_dropout=config.lora_dropout,
                                  target_modules=list(family.spec.text_targets))
            # presets and aliases name layers of the denoiser
            plain = replace(family.spec, lora_aliases={}, lora_presets={})
            for model in self.models.values():
                self.adapters += lora.attach(model, of_text, plain)
                lora.set_training(model, True)
        if config.pivotal_tokens:
            word = config.trigger_word.strip()
            if not word:
                raise UserError("engine.words_need_trigger", count=config.pivotal_tokens)
            for name, (tokenizer, encoder) in textual_inversion.encoders(parts.text).items():
                rows = textual_inversion.start_rows(
                    tokenizer, encoder, config.pivotal_init or word, config.pivotal_tokens)
                self.rows[name], self.words[word] = textual_inversion.install(tokenizer, encoder,
                                                                              rows)

    @property
    def alpha(self) -> float:
        """Such that alpha / rank is that of the denoiser's adapter."""
        config = self.config
        return config.alpha * (config.text_encoder_rank or config.lora_rank) / config.lora_rank

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.adapters, *(rows.rows for rows in self.rows.values())]

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer. `factor` multiplies the rate of the step."""
        config = self.config
        # no decay of words: it would pull them towards zero, away from all other tokens
        groups: list[dict[str, Any]] = [
            {"params": self.adapters, "lr": config.text_encoder_lr,
             "factor": config.text_encoder_lr / config.learning_rate},
            {"params": [rows.rows for rows in self.rows.values()],
             "weight_decay": 0.0, "lr": config.pivotal_lr,
             "factor": config.pivotal_lr / config.learning_rate}]
        return [group for group in groups if group["params"]]

    def cond(self, texts: Sequence[str]) -> Cond:
        """Embeddings (B, ...), with gradients where they are wanted."""
        # captions come back every epoch: each is tokenised once
        for text in {*texts} - self.tokens.keys():
            self.tokens[text] = self.family.tokenize(
                self.parts, [textual_inversion.expand(text, self.words)])
        rows = [self.tokens[text] for text in texts]

        def encode(group: list[int]) -> Cond:
            with self.cast():
                cond = self.family.encode_tokens(self.parts, {
                    name: torch.cat([rows[i][name] for i in group]) for name in rows[0]})
            return {name: value.to(self.precision.compute) for name, value in cond.items()}
        # texts of equal length are encoded together
        return batched(grouped([sizes_of(row) for row in rows], encode), self.precision.device)

    @torch.no_grad()
    def rest(self, texts: Sequence[str]) -> dict[str, Cond]:
        """Ends the training of text encoders and takes them off the device. -> embeddings of all
        texts, (1, ...) each, on the CPU."""
        self.set_training(False)
        embeddings = {text: {name: value.cpu() for name, value in self.cond([text]).items()}
                      for text in texts}
        self.live, self.parts.text = False, {}
        for model in self.models.values():
            model.to("cpu")
        return embeddings

    def set_training(self, on: bool) -> None:
        for model in self.models.values():
            lora.set_training(model, on)

    # --- what is kept ---

    def adapter_state(self) -> dict[str, Tensor]:
        """The LoRA by peft's names behind the encoder's, fp32, on the CPU."""
        if not self.adapters:
            return {}
        return {f"{name}.{key}": value for name, model in self.models.items()
                for key, value in lora.state(model).items()}

    def word(self) -> NewWord | None:
        """The new word with its rows as they are now, on the CPU; None: none is learned."""
        if not self.rows:
            return None
        return NewWord(next(iter(self.words)), {name: rows.rows.detach().cpu().clone()
                                                for name, rows in self.rows.items()})

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint needs to go on."""
        word = self.word()
        return self.adapter_state() | {
            f"{WORDS}{name}": rows for name, rows in (word.rows if word else {}).items()}

    def owns(self, key: str) -> bool:
        """Whether a key of a checkpoint belongs to `state`."""
        return key.partition(".")[0] in (*self.models, WORDS[:-1])

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from `state`. Raises UserError where a checkpoint is of other settings."""
        if {key: value.shape for key, value in tensors.items()} != {
                key: value.shape for key, value in self.state().items()}:
            raise UserError("engine.other_adapter", here=len(self.state()), there=len(tensors))
        for name, rows in self.rows.items():
            rows.rows.data.copy_(tensors[f"{WORDS}{name}"])
        for name, model in self.models.items() if self.adapters else ():
            lora.load_state(model, {key.removeprefix(f"{name}."): value for key, value
                                    in tensors.items() if key.startswith(f"{name}.")})
