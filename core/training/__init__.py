"""The training run: the trainer's step, the run around it, recovery, checkpoints, the proof."""
