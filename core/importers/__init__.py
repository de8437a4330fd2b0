"""Other trainers' configs as ours: lora-scripts, kohya, kohya_ss, OneTrainer."""

from core.importers.load import is_ours, read, to_yaml, told
from core.importers.reader import Imported

__all__ = ["Imported", "is_ours", "read", "to_yaml", "told"]
