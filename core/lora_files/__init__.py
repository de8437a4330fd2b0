"""LoRA files of every format: read, told apart, written, merged, resized, extracted."""
