"""The one look at a run's settings, its pictures and its length together, before it starts: what
can't act, and what can't come to its end. Nothing here keeps a run from starting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from core.config import TrainConfig
from core.dataset.captions import split_tags
from core.memory import advisor
from core.memory.advisor import Reason

# Keys that act only with another one: what they need -> these keys.
NEEDS = {
    "shuffle_tags": ("keep_tokens",), "conv_rank": ("conv_alpha",),
    "lr_scheduler: cosine_with_restarts": ("lr_cycles",),
    "lr_scheduler: polynomial": ("lr_power",),
    "lr_scheduler: warmup_stable_decay": ("lr_decay_share",),
    "multires_noise_iterations": ("multires_noise_discount",),
    "loss_type: huber / loss_type: smooth_l1": ("huber_c", "huber_schedule"),
    "masked_loss": ("unmasked_weight",), "base_loras": ("base_loras_in_previews",),
    "reg_data_dir / reg_from_base": ("reg_share", "prior_loss_weight"),
    "text_encoder_lr": ("text_encoder_rank",),
    "text_encoder_lr / pivotal_tokens": ("text_encoder_stop",),
    "pivotal_tokens": ("pivotal_lr", "pivotal_init"),
    "init_lora_weights": ("init_lora_resize",), "validation_split": ("validation_steps",),
    "sample_prompts": ("sample_every", "sample_size", "sample_weight"),
    "sample_prompts / reg_from_base": ("sample_cfg", "sample_inference_steps", "sample_sampler")}
# Steps that a run should come to.
WITHIN = ("save_steps", "validation_steps", "text_encoder_stop")


def remarks(config: TrainConfig, repeats: Sequence[int], captions: Sequence[str],
            held_out: int = 0) -> list[Reason]:
    """What to say before the start. `repeats` and `captions`: of each picture that is learned, or
    of all, as long as none is held out yet; `held_out`: how many others are."""
    length = advisor.length(config, repeats)
    return [*([length] if length else []), *_idle(config),
            *_course(config, updates(config, repeats)),
            *_pictures(config, repeats, captions, held_out)]


def updates(config: TrainConfig, repeats: Sequence[int]) -> int:
    """Optimizer steps of the run, up to buckets that don't fill their last batch."""
    if config.max_train_steps:
        return config.max_train_steps
    samples = sum(repeats)
    if config.regularized:
        samples += round(samples * config.reg_share / (1 - config.reg_share))
    batches = ceil(samples / config.batch_size)
    return config.epochs * ceil(batches / config.gradient_accumulation_steps)


def _idle(config: TrainConfig) -> Iterator[Reason]:
    for needs, keys in NEEDS.items():
        wanted = [one.partition(": ") for one in needs.split(" / ")]
        if any(getattr(config, key) == value if value else getattr(config, key)
               for key, _, value in wanted):
            continue
        for key in keys:
            if getattr(config, key) != TrainConfig.model_fields[key].default:
                yield Reason("advisor.idle", {"key": key, "needs": needs})


def _course(config: TrainConfig, total: int) -> Iterator[Reason]:
    late = [f"{key}: {steps}" for key in WITHIN if (steps := getattr(config, key)) > total]
    if late:
        yield Reason("advisor.after_the_end", {"keys": ", ".join(late), "total": total})
    warmup = config.lr_warmup_steps
    if 2 * warmup > total:
        yield Reason("advisor.long_warmup", {
            "warmup": warmup, "total": total, "share": round(100 * min(1, total / (warmup + 1))),
            "usual": min(advisor.MOST_WARMUP, round(total * advisor.WARMUP))})
    cycles = config.lr_cycles if config.lr_scheduler == "cosine_with_restarts" else 1
    if cycles > 1 and 2 * cycles > total - warmup:
        yield Reason("advisor.short_cycles", {"cycles": cycles, "total": total})


def _pictures(config: TrainConfig, repeats: Sequence[int], captions: Sequence[str],
              held_out: int) -> Iterator[Reason]:
    # a trigger word may come first
    most = max((len(split_tags(text)) for text in captions), default=0) + bool(config.trigger_word)
    if config.shuffle_tags and most - config.keep_tokens < 2:
        yield Reason("advisor.nothing_to_shuffle", {"keep": config.keep_tokens})
    if config.batch_size > sum(repeats):
        yield Reason("advisor.large_batch", {"batch": config.batch_size, "samples": sum(repeats)})
    if config.validation_split and len(repeats) + held_out < 2:
        yield Reason("advisor.none_held_out", {})
