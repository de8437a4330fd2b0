"""CaptionConfig: one captioning job, as the command line, the window and config.yaml have it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

WriteTo = Literal["auto", "txt", "caption", "csv", "jsonl"]
Existing = Literal["keep", "add", "replace"]


class CaptionConfig(BaseModel):
    """Frozen; an unknown key is an error. Paths are absolute once a job has been made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str
    captioner: str = "clip+blip"            # ids joined by "+": sentence first, then tags
    models: dict[str, str] = {}             # captioner id -> model; absent: its default
    metadata_path: str = ""                 # captions live in this .csv / .jsonl instead
    write_to: WriteTo = "auto"
    existing: Existing = "keep"
    only: list[str] = []                    # relative picture paths; empty: all
    trigger_word: str = ""
    batch_size: int = Field(default=8, ge=1, le=256)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    dry_run: bool = False
    seed: int = Field(default=42, ge=0, lt=2**63)

    # sentences
    prompt: str = ""                        # prefix of the sentence, or the question
    max_tokens: int | None = Field(default=None, ge=1, le=4096)         # None: the captioner's
    min_tokens: int = Field(default=5, ge=0, le=1024)
    beams: int = Field(default=3, ge=1, le=32)
    sample: bool = False                    # sampling instead of beam search
    temperature: float = Field(default=1.0, gt=0, le=5)
    top_p: float = Field(default=0.9, gt=0, le=1)

    # tags
    most_tags: int | None = Field(default=None, ge=1, le=500)           # None: the captioner's
    tag_threshold: float | None = Field(default=None, ge=0, le=1)       # None: the captioner's
    character_threshold: float | None = Field(default=None, ge=0, le=1)
    vocabulary: str = ""                    # a .txt / .yaml of the user's own; empty: built in
    underscores: bool = False               # long_hair instead of long hair
    escape_brackets: bool = False           # \\( \\) for A1111's prompt syntax
    exclude: list[str] = []                 # tags never written

    # endpoint
    endpoint: str = "http://127.0.0.1:11434/v1"
    timeout_s: float = Field(default=120.0, gt=0, le=3600)

    # caption rules applied before writing; see captioner/captions/rules.py
    rules: list[dict[str, Any]] = []
