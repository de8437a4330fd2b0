"""Model families: one folder each, which the registry lists by id. Importing takes no torch.
"""

from core.families.registry import (
    CHUNK,
    MODULES,
    Listed,
    chunks_of,
    detect,
    get,
    outgrows_fp16,
    token_limit,
)

__all__ = ["CHUNK", "MODULES", "Listed", "chunks_of", "detect", "get", "outgrows_fp16",
           "token_limit"]
