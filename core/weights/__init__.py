"""Frozen weights: number formats, quantization, offload, tensors read one by one from files."""
