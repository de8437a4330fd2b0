"""Every key of TrainConfig does what it says: one row for each, in tests/keys/.

A row changes its key and measures what changes: the gradient, the step, the order of samples, a
file, a drawn picture, a note, the plan; in the direction that the key names.
"""

from __future__ import annotations

import pytest

from core.config import TrainConfig
from tests.keys import adapter, companions, data, run, step  # noqa: F401 - they fill ROWS
from tests.keys.lab import ROWS, Lab


def test_every_key_has_a_row_and_every_row_a_key() -> None:
    assert set(TrainConfig.model_fields) - set(ROWS) == set()
    assert set(ROWS) - set(TrainConfig.model_fields) == set()


@pytest.mark.parametrize("key", TrainConfig.model_fields)
def test_key(key: str, lab: Lab) -> None:
    assert key in ROWS, f"{key}: no row in tests/keys/ shows that it does anything"
    ROWS[key](lab)
