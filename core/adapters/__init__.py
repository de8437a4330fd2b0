"""What is trained on a frozen model: LoRA and its kin on denoiser and text encoder,
fresh or begun from a file.
"""
