"""The command line changes only on purpose: people's scripts type it."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from orchestrator.cli import build_parser
from tests.orchestrator.commands.cli_surface import SURFACE, surface

pytestmark = pytest.mark.unit


def test_the_surface_is_the_recorded_one() -> None:
    assert surface(build_parser()) == SURFACE.read_text(), (
        "the command line has changed; where that is meant, `python -m tests.orchestrator.commands.cli_surface` records "
        "it, and the change belongs in the commit's message"
    )


def _parser(**option: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    commands.add_parser("go").add_argument("--priority", **option)
    return parser


@pytest.mark.parametrize(
    "changed", [{"type": int}, {"default": "1"}, {"choices": ["a"]}, {"nargs": "+"}, {"action": "store_true"}]
)
def test_a_change_of_an_option_shows(changed: dict[str, Any]) -> None:
    assert surface(_parser(**changed)) != surface(_parser())


def test_a_new_command_shows_and_a_new_help_text_does_not() -> None:
    parser = _parser(help="words")
    assert surface(parser) == surface(_parser()) == "go\n    --priority\n"
