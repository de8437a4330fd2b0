"""Other trainers' config keys in our words: kohya's (lora-scripts' too), its GUI's, OneTrainer's.

Facts of the formats. A key or a value that TrainConfig doesn't have is told, not carried over.
"""

from __future__ import annotations

from typing import Any

# Their key -> ours, the value as it is.
KOHYA = {key: key for key in (
    "train_data_dir", "max_resolution", "output_dir", "output_name", "conv_alpha", "rank_dropout",
    "module_dropout", "gradient_accumulation_steps", "gradient_checkpointing", "seed",
    "max_grad_norm", "keep_tokens", "min_snr_gamma", "noise_offset", "multires_noise_iterations",
    "multires_noise_discount", "ip_noise_gamma", "zero_terminal_snr", "loss_type", "huber_c",
    "huber_schedule", "masked_loss", "reg_data_dir", "prior_loss_weight", "bucket_no_upscale",
    "vae", "validation_split", "weight_decay")} | {
    "pretrained_model_name_or_path": "base_model", "resolution": "max_resolution",
    "network_dim": "lora_rank", "network_alpha": "lora_alpha", "network_dropout": "lora_dropout",
    "conv_dim": "conv_rank", "factor": "lokr_factor", "loraplus_lr_ratio": "lora_plus_ratio",
    "loraplus_unet_lr_ratio": "lora_plus_ratio",
    "network_weights": "init_lora_weights", "lora_network_weights": "init_lora_weights",
    "train_batch_size": "batch_size", "lr_scheduler_num_cycles": "lr_cycles",
    "lr_scheduler_power": "lr_power", "save_every_n_steps": "save_steps",
    "sample_every_n_steps": "sample_every", "shuffle_caption": "shuffle_tags",
    "caption_dropout_rate": "caption_dropout", "flip_aug": "flip",
    "debiased_estimation_loss": "debiased_estimation", "alpha_mask": "masked_loss",
    "min_bucket_reso": "min_bucket_side", "max_bucket_reso": "max_bucket_side", "ae": "vae",
    "cache_latents_to_disk": "cache_to_disk", "vae_batch_size": "cache_batch_size",
    "validate_every_n_steps": "validation_steps",
}
KOHYA_DATASET = KOHYA | {"image_dir": "train_data_dir", "batch_size": "batch_size"}
ONETRAINER = {
    "base_model_name": "base_model", "lora_rank": "lora_rank", "lora_alpha": "lora_alpha",
    "dropout_probability": "lora_dropout", "lora_model_name": "init_lora_weights",
    "epochs": "epochs", "batch_size": "batch_size", "seed": "seed",
    "gradient_accumulation_steps": "gradient_accumulation_steps", "learning_rate": "learning_rate",
    "learning_rate_cycles": "lr_cycles", "layer_offload_fraction": "offload",
    "clip_grad_norm": "max_grad_norm", "offset_noise_weight": "noise_offset",
    "masked_training": "masked_loss", "unmasked_weight": "unmasked_weight",
    "rescale_noise_scheduler_to_zero_terminal_snr": "zero_terminal_snr",
    "optimizer.weight_decay": "weight_decay", "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2", "unet.learning_rate": "learning_rate",
    "text_encoder.learning_rate": "text_encoder_lr", "vae.model_name": "vae",
    "concepts.0.path": "train_data_dir", "concepts.0.image.enable_random_flip": "flip",
    "concepts.0.text.enable_tag_shuffling": "shuffle_tags",
    "concepts.0.text.keep_tags_count": "keep_tokens",
}

# Their value -> ours, compared without case and signs.
OPTIMIZERS = {"adamw": "adamw", "adamw8bit": "adamw8bit", "adafactor": "adafactor",
              "prodigy": "prodigy", "lion": "lion", "came": "came",
              "adamwschedulefree": "schedulefree", "schedulefreeadamw": "schedulefree"}
SCHEDULES = {"constant": "constant", "constantwithwarmup": "constant", "linear": "linear",
             "cosine": "cosine", "cosinewithrestarts": "cosine_with_restarts",
             "polynomial": "polynomial", "warmupstabledecay": "warmup_stable_decay"}
ADAPTERS = {                               # network_module, algo, LoRA_type, peft_type
    "networkslora": "lora", "networkslorafa": "", "networkslorasdxl": "lora",
    "networksloraflux": "lora", "networksoft": "oft", "networksloha": "loha",
    "networkslokr": "lokr", "lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr",
    "diagoft": "oft", "standard": "lora", "kohyalocon": "lora", "lycorislocon": "lora",
    "lycorisloha": "loha", "lycorislokr": "lokr", "lycorisdiagoft": "oft", "flux1": "lora"}
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
    "LoRA_type": ("adapter", ADAPTERS), "sample_sampler": ("sample_sampler", SAMPLERS)}
ONETRAINER_CHOICES: dict[str, tuple[str, dict[str, str]]] = {
    "optimizer.optimizer": ("optimizer", OPTIMIZERS), "train_dtype": ("precision", PRECISIONS),
    "learning_rate_scheduler": ("lr_scheduler", SCHEDULES), "peft_type": ("adapter", ADAPTERS),
    "output_dtype": ("save_precision", PRECISIONS)}
# Their key -> our key and its value where theirs is on.
KOHYA_SWITCHES = {"fp8_base": ("base_precision", "fp8"),
                  "v_parameterization": ("prediction_type", "v_prediction")}
ONETRAINER_SWITCHES = {"lora_decompose": ("adapter", "dora"),
                       "force_v_prediction": ("prediction_type", "v_prediction")}

# Where a key is left out, the other trainer takes this: (our key, its value).
KOHYA_DEFAULTS: dict[str, tuple[str, Any]] = {
    "network_dim": ("lora_rank", 4), "network_alpha": ("lora_alpha", 1),
    "max_train_epochs": ("max_train_steps", 1600), "learning_rate": ("learning_rate", 2e-6)}
ONETRAINER_DEFAULTS: dict[str, tuple[str, Any]] = {
    "lora_rank": ("lora_rank", 16), "lora_alpha": ("lora_alpha", 1.0), "epochs": ("epochs", 100)}

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
    "save_skip_first", "frames", "gradient_checkpointing_offload"))
EPOCHS = frozenset(("save_every_n_epochs", "sample_every_n_epochs", "save_n_epoch_ratio",
                    "save_last_n_epochs"))
