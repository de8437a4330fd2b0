"""The list of breaks stays true: each text stands once, each test is there. The breaks themselves
are tried by `python -m tests.mutants`."""

from __future__ import annotations

import ast
from collections import Counter

from tests.mutants import ROOT, Mutant, every

MUTANTS = every()


def test_every_text_stands_once_and_every_test_is_there() -> None:
    assert [found for mutant in MUTANTS if (found := mutant.problem())] == []


def test_names_are_different_and_so_are_breaks() -> None:
    assert [name for name, n in Counter(m.name for m in MUTANTS).items() if n > 1] == []
    assert [b for b, n in Counter((m.file, m.old, m.new) for m in MUTANTS).items() if n > 1] == []


def test_breaks_are_python() -> None:
    """One that doesn't parse would be caught by anything."""
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text("utf-8").replace(mutant.old, mutant.new)
        ast.parse(text, mutant.name)


def test_a_list_that_is_no_longer_true_is_told() -> None:
    good = MUTANTS[0]
    for changes in ({"old": "no such text"}, {"file": "core/no_such.py"}, {"new": good.old},
                    {"tests": ("test_no_such.py",)},
                    {"tests": ("training/test_trainer.py::test_no_such",)},
                    {"tests": ()}):
        values = {"name": "x", "file": good.file, "old": good.old, "new": good.new,
                  "tests": good.tests} | changes
        assert Mutant(**values).problem()
