from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Spinning threads make two busy cores several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DARKROOM_LANG", "en")

import pytest


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory,
             monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Runs, settings and caches of a test never touch the user's."""
    home = tmp_path_factory.mktemp("home")
    (home / "cache").mkdir()
    if os.name != "nt":         # a plan traced once serves the whole session: seconds a test
        plans = tmp_path_factory.getbasetemp() / "plans"
        plans.mkdir(exist_ok=True)
        (home / "cache" / "plans").symlink_to(plans)
    monkeypatch.setenv("DARKROOM_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import tiny_base
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch
    reasons = {"network": "no model hub can be reached in this suite"}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no NVIDIA GPU here"
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
