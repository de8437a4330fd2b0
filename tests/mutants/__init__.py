"""One-line breaks of the product, each with the tests that must see it: python -m tests.mutants.

A mutant that survives is a line of training, data, files, memory or jobs that nobody measures: an
error there would give a wrong LoRA in silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str                               # from the repository's root
    old: str                                # stands there exactly once
    new: str
    tests: tuple[str, ...]                  # files below tests/, or file::test[parameter]

    def problem(self) -> str | None:
        """Why it can't be tried: the list is no longer true."""
        path = ROOT / self.file
        count = path.read_text("utf-8").count(self.old) if path.is_file() else 0
        if count != 1:
            return f"{self.name}: its text stands {count} times in {self.file}: {self.old!r}"
        if self.old == self.new:
            return f"{self.name}: it changes nothing"
        for test in self.tests:
            name, _, node = test.partition("::")
            source = ROOT / "tests" / name
            if not source.is_file():
                return f"{self.name}: there is no tests/{name}"
            function = node.partition("[")[0].rpartition("::")[2]
            if function and not re.search(rf"def {re.escape(function)}\(",
                                          source.read_text("utf-8")):
                return f"{self.name}: tests/{name} has no {function}"
        return None if self.tests else f"{self.name}: no test is named"


def key(*names: str) -> tuple[str, ...]:
    """The rows of these config keys."""
    return tuple(f"config/test_config_keys.py::test_key[{name}]" for name in names)


def every() -> list[Mutant]:
    from tests.mutants import data, files, jobs, memory, training
    return [mutant for module in (training, data, files, memory, jobs)
            for mutant in module.MUTANTS]
