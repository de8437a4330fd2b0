from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.keys.lab import Lab

# Spinning threads make two busy cores several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DARKROOM_LANG", "en")

import pytest
from hypothesis import settings

# The same examples each time; DARKROOM_FUZZ=20000 draws so many new ones for every property.
FUZZ = int(os.environ.get("DARKROOM_FUZZ", "0"))
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("fuzz", max_examples=FUZZ or 2000, deadline=None, print_blob=True)
settings.load_profile("fuzz" if FUZZ else "same")


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


@contextlib.contextmanager
def handling(number: signal.Signals, handler: object) -> Iterator[None]:
    before = signal.signal(number, handler)                 # type: ignore[arg-type]
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.fixture
def default_sigint() -> Iterator[None]:
    """Children that are started in a test heed Ctrl+C, also where the tests' own parent ignores it:
    under nohup, behind a shell's `&`. Ignored is inherited."""
    with handling(signal.SIGINT, signal.default_int_handler):
        yield


@pytest.fixture
def ignored_sigint() -> Iterator[None]:
    """Children are started as under nohup."""
    with handling(signal.SIGINT, signal.SIG_IGN):
        yield


@pytest.fixture(autouse=True)
def collected_fast() -> None:
    """A run collects garbage often; without this each time walks all that the libraries hold:
    half of a small run's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import tiny_base
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Trainers of a tiny base; see tests/keys/lab.py."""
    from tests.keys.lab import Lab
    return Lab(tmp_path_factory.mktemp("keys"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true",
                     help="also the thorough tests, which the everyday run leaves out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch
    if _is_everyday(config):
        left_out = [item for item in items if "thorough" in item.keywords]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if "thorough" not in item.keywords]
    reasons = {"network": "no model hub can be reached in this suite"}
    if "slow" not in config.option.markexpr:
        reasons["slow"] = "takes minutes: pytest -m slow"
    if "frozen" not in config.option.markexpr:
        reasons["frozen"] = "builds the standalone app: pytest -n 0 -m frozen"
    if not torch.cuda.is_available():
        reasons["gpu"] = "no NVIDIA GPU here"
    for item in items:
        if FUZZ and getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.timeout(0))
            _draw_more(item.obj)                            # type: ignore[attr-defined]
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def _is_everyday(config: pytest.Config) -> bool:
    """Whether the thorough tests are left out: in a run that names no file, test or marker."""
    if hasattr(config, "workerinput"):          # a worker is given paths, whoever gave them
        return bool(config.workerinput["everyday"])
    named = config.args_source is config.ArgsSource.ARGS or config.option.markexpr
    return not (config.option.all or named)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["everyday"] = _is_everyday(node.config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was skipped, by reason, with the files in which it stands."""
    if _is_everyday(terminalreporter.config):
        terminalreporter.write_line("the thorough tests were left out: launcher.py test --all")
    files: dict[str, Counter[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        path, _, reason = report.longrepr
        files.setdefault(reason.removeprefix("Skipped: "), Counter())[Path(path).name] += 1
    if files:
        terminalreporter.section(f"{sum(found.total() for found in files.values())} skipped")
    for reason, found in sorted(files.items(), key=lambda item: -item[1].total()):
        where = ", ".join(f"{name} {count}" for name, count in found.most_common())
        terminalreporter.write_line(f"{found.total():4} {reason} ({where})")


def _draw_more(test: Callable[..., None]) -> None:
    """The profile's number wins over the one that a test names for the daily suite."""
    test = getattr(test, "__func__", test)
    name = "_hypothesis_internal_use_settings"
    setattr(test, name, settings(getattr(test, name), max_examples=FUZZ))
