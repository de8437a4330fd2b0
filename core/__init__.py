"""The engine: everything between a folder of pictures and a LoRA file. No window in here."""

__version__ = "0.1.0"
