"""Finds pictures unlike the rest of their folder by CLIP: another style or subject."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core.dataset import curation, image_folder, images
from core.dataset.checks.findings import Finding
from core.dataset.checks.images import Purpose, style_finding
from core.jobs.events import Event, Phase

if TYPE_CHECKING:
    from captioner.config import CaptionConfig


def find_outliers(config: CaptionConfig, purpose: Purpose,
                  emit: Callable[[Event], None]) -> tuple[int, Finding | None]:
    """Returns how many pictures were compared, and those that stand out (None: none do).

    Pictures that the user left out are not compared. Raises UserError where the folder or the
    model can't be used.
    """
    # Here, as it imports torch.
    from captioner.models.clip import ClipTagger
    folder = Path(config.folder)
    data = image_folder.scan(folder, left_out=curation.load(folder).left_out)
    emit(Phase(name="load"))
    tagger = ClipTagger(config)
    tagger.load()
    # In batches, as the prepared pictures of a large folder would fill the memory.
    names, vectors = [], []
    for start in range(0, len(data.pictures), config.batch_size):
        part = data.pictures[start:start + config.batch_size]
        prepared = [tagger.prepare(images.open_picture(picture.path)) for picture in part]
        vectors.append(tagger.embed_images(prepared).cpu().numpy())
        names += [image_folder.relative_name(picture.path, data.folder) for picture in part]
        emit(Phase(name="check", done=len(names), total=len(data.pictures)))
    return len(names), style_finding(names, np.concatenate(vectors), purpose)
