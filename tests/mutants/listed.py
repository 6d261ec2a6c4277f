"""What a planted defect is, and all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

AREAS = ("model", "router", "exchange", "layout", "engine", "optim", "data", "run", "fabric", "checkpoint",
         "control", "agent", "dashboard", "sizing", "planning")  # fmt: skip
"""Modules of `tests.mutants.areas`, each with a list `MUTANTS`."""


@dataclass(frozen=True)
class Mutant:
    """A small patch that makes the code wrong."""

    name: str
    """What is wrong, in words; unique."""
    file: str
    """That the patch is in, from the project's root."""
    old: str
    """Text that is in the file exactly once."""
    new: str
    test: str
    """Id of the test that has to fail."""


def mutants() -> list[Mutant]:
    """All areas' mutants, in their order.

    Raises:
        ValueError: two have one name.
    """
    found: list[Mutant] = []
    for area in AREAS:
        found += import_module(f"tests.mutants.areas.{area}").MUTANTS
    names = [mutant.name for mutant in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two mutants are called {twice[0]!r}")
    return found


def misplaced(found: Sequence[Mutant], texts: dict[str, str]) -> list[str]:
    """Mutants that don't fit the code, a line each: `old` isn't there exactly once, or nothing changes.

    Args:
        texts: of the files, by name.
    """
    lines = []
    for mutant in found:
        count = texts[mutant.file].count(mutant.old)
        if count != 1:
            lines.append(f"{mutant.name}: its text is in {mutant.file} {count} times")
        elif mutant.old == mutant.new:
            lines.append(f"{mutant.name}: it changes nothing")
    return lines
