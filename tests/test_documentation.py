"""What the documents say can be typed, and where their links lead, is so."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import collectives.cli
import trainer.cli
from configs.compose import compose
from configs.errors import UserError
from orchestrator.cli import parse
from orchestrator.states import table
from tests.source_tree import ROOT
from tests.write_docs import ARCHITECTURE, state_table, with_state_table

pytestmark = pytest.mark.unit

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
_COMMAND = re.compile(r"python -m (orchestrator|collectives|trainer) +([a-z][^\n`#&|;]*)")


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Program, and what follows its name, wherever a page types it."""
    return ((found.group(1), found.group(2).strip()) for found in _COMMAND.finditer(text))


def try_command(program: str, words: str) -> None:
    """Parse a command, and compose its configuration where it has one.

    Raises:
        UserError: where it would be refused.
    """
    if program == "collectives":
        measuring = collectives.cli.parse(shlex.split(words))
        if measuring.name == "run":
            compose(collectives.cli.overrides(measuring))
        elif measuring.name == "device":
            compose(measuring.overrides)
        return
    if program == "trainer":
        sizing = trainer.cli.parse(shlex.split(words))
        if sizing.command in ("run", "size"):
            compose(sizing.overrides)
        return
    options = parse(shlex.split(words))
    if hasattr(options, "overrides"):
        compose(options.overrides, options.config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_accepted(page: Path) -> None:
    for program, words in commands(page.read_text()):
        try_command(program, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_target_that_a_page_names_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(), re.MULTILINE)) <= targets, page.name


def test_the_state_table_is_the_one_in_the_code() -> None:
    assert state_table(ARCHITECTURE.read_text()) == table(), "`make docs` writes it anew"


def test_the_state_table_is_written_between_its_markers() -> None:
    page = "a\n<!-- states:begin -->\nold\n<!-- states:end -->\nb\n"
    assert with_state_table(page, "new\n") == page.replace("old", "new")
    with pytest.raises(ValueError, match="substring"):
        with_state_table("no markers", "new\n")


@pytest.mark.parametrize(
    "wrong",
    ["orchestrator submitt", "orchestrator submit train.stepz=3", "orchestrator list --jsn",
     "orchestrator submit model=unheard_of", "collectives run --rank 2", "collectives run collectives=unheard_of",
     "trainer size --hardwares h100", "trainer size model=unheard_of"],
)  # fmt: skip
def test_a_wrong_command_would_be_found(wrong: str) -> None:
    (found,) = commands(f"type `python -m {wrong}` and see")
    with pytest.raises(UserError):
        try_command(*found)
