"""This machine: GPUs, memory, processes, logs, and what stands between it and a training."""
