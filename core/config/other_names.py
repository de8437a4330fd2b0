"""Other trainers' config keys in our words: kohya's, lora-scripts', kohya_ss', OneTrainer's.

Facts of the formats. A key or a value that TrainConfig doesn't have is told, not carried over.
"""

from __future__ import annotations

from typing import Any

# Their key -> ours, the value as it is.
KOHYA = {key: key for key in (
    "train_data_dir", "max_resolution", "output_dir", "output_name", "conv_alpha", "rank_dropout",
    "module_dropout", "gradient_accumulation_steps", "gradient_checkpointing", "seed",
    "max_grad_norm", "keep_tokens", "enable_wildcard", "min_snr_gamma", "noise_offset",
    "multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma", "zero_terminal_snr",
    "loss_type", "huber_c", "huber_schedule", "masked_loss", "reg_data_dir",
    "prior_loss_weight", "bucket_no_upscale", "vae", "validation_split", "weight_decay")} | {
    "pretrained_model_name_or_path": "base_model", "resolution": "max_resolution",
    "network_dim": "lora_rank", "network_alpha": "lora_alpha", "network_dropout": "lora_dropout",
    "conv_dim": "conv_rank", "factor": "lokr_factor", "lokr_factor": "lokr_factor",
    "sample_cfg": "sample_cfg", "sample_steps": "sample_inference_steps", "dropout": "lora_dropout",
    "loraplus_lr_ratio": "lora_plus_ratio",
    "loraplus_unet_lr_ratio": "lora_plus_ratio",
    "network_weights": "init_lora_weights", "lora_network_weights": "init_lora_weights",
    "train_batch_size": "batch_size", "lr_scheduler_num_cycles": "lr_cycles",
    "lr_scheduler_power": "lr_power", "save_every_n_steps": "save_steps",
    "sample_every_n_steps": "sample_every", "shuffle_caption": "shuffle_tags",
    "caption_dropout_rate": "caption_dropout", "flip_aug": "flip",
    "debiased_estimation_loss": "debiased_estimation", "alpha_mask": "masked_loss",
    "min_bucket_reso": "min_bucket_side", "max_bucket_reso": "max_bucket_side", "ae": "vae",
    "cache_latents_to_disk": "cache_to_disk", "vae_batch_size": "cache_batch_size",
    "validate_every_n_steps": "validation_steps", "dit": "base_model", "in_json": "metadata_path",
}
KOHYA_DATASET = KOHYA | {"batch_size": "batch_size"}
ONETRAINER = {
    "base_model_name": "base_model", "lora_rank": "lora_rank", "lora_alpha": "lora_alpha",
    "dropout_probability": "lora_dropout", "lora_model_name": "init_lora_weights",
    "epochs": "epochs", "batch_size": "batch_size", "seed": "seed",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate_cycles": "lr_cycles", "layer_offload_fraction": "offload",
    "clip_grad_norm": "max_grad_norm", "offset_noise_weight": "noise_offset",
    "masked_training": "masked_loss", "unmasked_weight": "unmasked_weight",
    "rescale_noise_scheduler_to_zero_terminal_snr": "zero_terminal_snr",
    "optimizer.weight_decay": "weight_decay", "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2", "denoiser.learning_rate": "learning_rate",
    "vae.model_name": "vae", "huber_delta": "huber_c",
}
ONETRAINER_CONCEPT = {
    "path": "train_data_dir", "image.enable_random_flip": "flip",
    "text.enable_tag_shuffling": "shuffle_tags", "text.keep_tags_count": "keep_tokens"}

# Their value -> ours, compared without case and signs.
OPTIMIZERS = {"adamw": "adamw", "adamw8bit": "adamw8bit", "adafactor": "adafactor",
              "prodigy": "prodigy", "lion": "lion", "came": "came",
              "adamwschedulefree": "schedulefree", "schedulefreeadamw": "schedulefree"}
SCHEDULES = {"constant": "constant", "constantwithwarmup": "constant", "linear": "linear",
             "cosine": "cosine", "cosinewithrestarts": "cosine_with_restarts",
             "cosinewithhardrestarts": "cosine_with_restarts",
             "polynomial": "polynomial", "warmupstabledecay": "warmup_stable_decay"}
ADAPTERS = {                               # network_module, algo, LoRA_type, peft_type
    "lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "oft": "oft", "diagoft": "oft",
    "oft2": "oft", "standard": "lora", "kohyalocon": "lora", "lycorislocon": "lora",
    "lycorisloha": "loha", "lycorislokr": "lokr", "lycorisdiagoft": "oft", "flux1": "lora",
    "flux1oft": "oft"}
# OneTrainer's layer_filter, parts of names; and the names of its presets, in files of them alone.
FILTERS = {r"(attn\d?|attention(refiner)?)+|attnonly": "attention",
           r"(attn\d?|attentionrefiner)+(ff(net)?|(img|txt|proj)mlp|feedforwardrefiner)+|attnmlp":
           "attention+ff", r"attentions|(single)?(transformerblocks?)+|layers|blocks": "all-linear"}
PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16", "float": "fp32", "float32": "fp32",
              "float16": "fp16", "bfloat16": "bf16", "fp32": "fp32"}
BASE_PRECISIONS = {"nfloat4": "nf4", "int8": "int8", "intw8a8": "int8", "float8": "fp8",
                   "floatw8a8": "fp8"}
# Noise levels of flows: kohya's timestep_sampling and weighting_scheme, timestep_distribution.
LEVELS = {"uniform": "uniform", "sigmoid": "logit_normal", "shift": "logit_normal",
          "fluxshift": "logit_normal", "qwenshift": "logit_normal"}
SCHEMES = {"none": "uniform", "uniform": "uniform", "logitnormal": "logit_normal", "mode": "mode"}
SAMPLERS = {"ddim": "ddim", "euler": "euler", "keuler": "euler", "eulera": "euler_a",
            "keulera": "euler_a", "heun": "heun", "dpmsolver++": "dpm++2m", "dpmsolver": "dpm++2m",
            "pndm": "pndm"}

# Their key -> ours, and the table of its words.
KOHYA_CHOICES: dict[str, tuple[str, dict[str, str]]] = {
    "lr_scheduler": ("lr_scheduler", SCHEDULES), "mixed_precision": ("precision", PRECISIONS),
    "save_precision": ("save_precision", PRECISIONS), "algo": ("adapter", ADAPTERS),
    "lycoris_algo": ("adapter", ADAPTERS),
    "LoRA_type": ("adapter", ADAPTERS), "sample_sampler": ("sample_sampler", SAMPLERS)}
ONETRAINER_CHOICES: dict[str, tuple[str, dict[str, str]]] = {
    "optimizer.optimizer": ("optimizer", OPTIMIZERS), "train_dtype": ("precision", PRECISIONS),
    "learning_rate_scheduler": ("lr_scheduler", SCHEDULES), "peft_type": ("adapter", ADAPTERS),
    "output_dtype": ("save_precision", PRECISIONS)}
# Their key -> our key and its value where theirs is on.
KOHYA_SWITCHES = {"fp8_base": ("base_precision", "fp8"), "fp8_scaled": ("base_precision", "fp8"),
                  "v_parameterization": ("prediction_type", "v_prediction")}
ONETRAINER_SWITCHES = {"lora_decompose": ("adapter", "dora"),
                       "force_v_prediction": ("prediction_type", "v_prediction")}

# Where a key is left out, the other trainer takes this: (our key, its value).
KOHYA_DEFAULTS: dict[str, tuple[str, Any]] = {
    "network_dim": ("lora_rank", 4), "network_alpha": ("lora_alpha", 1),
    "save_last_n_steps": ("keep_checkpoints", 0),
    "max_train_epochs": ("max_train_steps", 1600), "learning_rate": ("learning_rate", 2e-6)}
ONETRAINER_DEFAULTS: dict[str, tuple[str, Any]] = {
    "lora_rank": ("lora_rank", 16), "lora_alpha": ("lora_alpha", 1.0), "epochs": ("epochs", 100)}

# (their switch, its values, keys that act with these values alone). kohya_ss writes every field of
# its window, also those that the chosen kind of LoRA or model doesn't read.
KOHYA_ACT_WITH: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("LoRA_type", "locon|dylora|lycoris", ("conv_dim", "conv_alpha")),
    ("LoRA_type", "lycoris", (
        "LyCORIS_preset", "dora_wd", "use_cp", "use_tucker", "use_scalar", "rank_dropout_scale",
        "bypass_mode", "train_norm")),
    ("LoRA_type", "lokr", ("factor", "decompose_both", "full_matrix")),
    ("LoRA_type", "oft", ("constrain", "rescaled")),
    ("LoRA_type", "dylora|glora|ia3", ("unit", "train_on_input")),
    ("LoRA_type", "^(?!lycoris)", (
        "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold",
        "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")),
    ("network_module", "lycoris", (
        "algo", "preset", "factor", "dora_wd", "lycoris_algo", "lokr_factor", "dropout",
        "train_norm")),
    # of lora-scripts' page
    ("enable_preview", "true", (
        "positive_prompts", "negative_prompts", "prompt_file", "randomly_choice_prompt",
        "sample_width", "sample_height", "sample_cfg", "sample_steps", "sample_seed",
        "sample_sampler", "sample_prompts", "sample_every_n_epochs", "sample_every_n_steps")),
    ("enable_base_weight", "true", ("base_weights", "base_weights_multiplier")),
    ("enable_block_weights", "true", (
        "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold")),
    ("noise_offset_type", "original", (
        "noise_offset", "adaptive_noise_scale", "noise_offset_random_strength")),
    ("noise_offset_type", "multires", ("multires_noise_iterations", "multires_noise_discount")),
    ("loss_type", "huber|smooth", ("huber_c", "huber_schedule", "huber_scale")),
    ("flux1_checkbox", "true", (
        "ae", "flux1_clip_l", "flux1_t5xxl", "guidance_scale", "timestep_sampling",
        "discrete_flow_shift", "sigmoid_scale", "model_prediction_type", "split_mode",
        "split_qkv", "train_blocks", "t5xxl_max_token_length", "apply_t5_attn_mask",
        "flux_fused_backward_pass", "train_double_block_indices", "train_single_block_indices",
        "train_t5xxl", "mem_eff_save")),
    ("sd3_checkbox", "true", (
        "sd3_clip_l", "sd3_clip_g", "sd3_t5xxl", "logit_mean", "logit_std", "mode_scale",
        "weighting_scheme", "sd3_text_encoder_batch_size", "clip_l_dropout_rate",
        "clip_g_dropout_rate", "t5_dropout_rate", "save_clip", "save_t5xxl")),
)

ONETRAINER_ACT_WITH: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("peft_type", "^lora$", ("lora_decompose", "lora_decompose_output_axis",
                             "lora_decompose_norm_epsilon")),
    ("masked_training", "true", ("unmasked_weight", "unmasked_probability",
                                 "normalize_masked_area_loss")),
    ("huber_strength", "[1-9]", ("huber_delta",)))

# Our key for those of theirs that have a rule of their own in core/importers: hints in our YAML.
BY_RULE = {
    "unet_lr": "learning_rate", "lr": "learning_rate",
    "max_train_epochs": "epochs", "epoch": "epochs",
    "num_epochs": "epochs", "steps": "max_train_steps",
    "learning_rate_warmup_steps": "lr_warmup_steps", "base_weights": "base_loras",
    "clip_l": "text_encoders", "clip_g": "text_encoders", "t5xxl": "text_encoders",
    "gemma2": "text_encoders", "qwen3": "text_encoders", "text_encoder": "text_encoders",
    "optimizer_type": "optimizer", "use_8bit_adam": "optimizer",
    "network_module": "adapter", "dora_wd": "adapter", "training_method": "adapter",
    "model_train_type": "family", "model_type": "family", "v2": "family",
    "text_encoder_layer_skip": "clip_skip", "concepts": "train_data_dir",
    "samples": "sample_prompts", "positive_prompts": "sample_prompts",
    "prompt_file": "sample_prompts", "sample_width": "sample_size", "sample_height": "sample_size",
    "network_args_custom": "adapter", "optimizer_args_custom": "optimizer_args",
    "is_reg": "reg_data_dir", "preset": "target_modules", "LyCORIS_preset": "target_modules",
    "layer_filter": "target_modules", "layer_filter_preset": "target_modules",
    "max_token_length": "max_tokens", "timestep_distribution": "timestep_sampling",
    "weighting_scheme": "timestep_sampling",
    "discrete_flow_shift": "flow_shift", "timestep_shift": "flow_shift", "shift": "flow_shift",
    "sigmoid_scale": "logit_std", "noising_bias": "logit_mean", "noising_weight": "logit_std",
    "dataset_config": "train_data_dir", "image_dir": "train_data_dir",
    "image_directory": "train_data_dir", "metadata_file": "metadata_path",
    "image_jsonl_file": "metadata_path", "caption_prefix": "trigger_word",
    "class_tokens": "trigger_word", "blocks_to_swap": "offload", "rank": "lora_rank",
    "alpha": "lora_alpha", "lr_decay_steps": "lr_decay_share", "ema": "ema_decay",
    "save_last_n_steps": "keep_checkpoints", "save_every_n_epochs": "save_steps",
    "save_every": "save_steps", "name": "output_name",
    "sample_every_n_epochs": "sample_every", "sample_after": "sample_every",
    "weight_dtype": "base_precision", "loss_weight_fn": "min_snr_gamma",
    "stop_text_encoder_training": "text_encoder_stop", "huber_strength": "loss_type",
    "output_model_destination": "output_dir", "concept_file_name": "train_data_dir",
    "validate_after": "validation_steps", "sample_definition_file_name": "sample_prompts",
}


def ours(key: str) -> str:
    """Our key for another trainer's; empty where none is known to mean the same."""
    if key in BY_RULE:
        return BY_RULE[key]
    for table in (KOHYA_DATASET, KOHYA_CHOICES, KOHYA_SWITCHES, ONETRAINER, ONETRAINER_CHOICES,
                  ONETRAINER_SWITCHES):
        if found := table.get(key):
            return found if isinstance(found, str) else found[0]
    return ""


# Things that this program settles by itself: nothing is lost with them.
BY_ITSELF = frozenset((
    "xformers", "mem_eff_attn", "sdpa", "attention_mechanism", "lowram", "highvram",
    "cache_latents", "enable_bucket", "bucket_reso_steps", "caption_extension",
    "caption_extention", "max_data_loader_n_workers", "persistent_data_loader_workers",
    "save_model_as", "logging_dir", "log_with", "log_prefix", "log_tracker_name", "wandb_api_key",
    "wandb_run_name", "num_cpu_threads_per_process", "output_config",
    "save_state", "huggingface_repo_id", "network_train_unet_only", "cache_text_encoder_outputs",
    "cache_text_encoder_outputs_to_disk", "num_processes", "num_machines", "gpu_ids",
    "main_process_port", "dataloader_threads", "tensorboard", "tensorboard_port",
    "tensorboard_expose", "workspace_dir", "cache_dir", "train_device", "temp_device",
    "latent_caching", "clear_cache_before_training", "debug_mode", "debug_dir", "only_cache",
    "sample_definition_file_name", "output_model_format", "include_train_config",
    "aspect_ratio_bucketing", "__version", "name", "backup_before_save", "secrets", "compile",
    "save_skip_first", "frames", "gradient_checkpointing_offload", "cache_directory",
    "tokenizer_cache_dir", "flash_attn", "split_attn", "weight_dtype", "fallback_train_dtype",
    "optimizer_defaults", "sample_image_format", "rolling_backup", "rolling_backup_count",
    "backup_after", "backup_after_unit", "sample_video_format", "sample_audio_format",
    "samples_to_tensorboard", "fused_gradient_reduce", "async_gradient_reduce",
    "enable_async_offloading", "enable_activation_offloading", "enable_autocast_cache",
    "lora_weight_dtype", "no_half_vae", "sdxl_no_half_vae", "dynamo_backend", "dynamo_mode",
    "t5xxl_dtype", "cloud"))
ZERO_IS_OFF = frozenset((
    "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "vae_batch_size", "save_every_n_epochs",
    "sample_every_n_epochs", "save_n_epoch_ratio", "save_last_n_epochs"))
# Values that change nothing.
NEUTRAL = {"max_timestep": 1000, "max_noising_strength": 1.0, "vb_loss_strength": 1.0,
           "caption_separator": ", ", "train_blocks": "all", "model_list": "custom",
           "lora_decompose_norm_epsilon": True, "bundle_additional_embeddings": True,
           "image.enable_crop_jitter": True}
EPOCHS = frozenset(("save_every_n_epochs", "sample_every_n_epochs", "save_n_epoch_ratio",
                    "save_last_n_epochs"))
