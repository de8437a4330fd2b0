"""Model families: one folder each, which the registry lists by id. Importing takes no torch.
"""

from core.families.detection import detect
from core.families.factory import get
from core.families.registry import CHUNK, IDS, SPECS, chunks_of, outgrows_fp16, token_limit

__all__ = ["CHUNK", "IDS", "SPECS", "chunks_of", "detect", "get", "outgrows_fp16",
           "token_limit"]
