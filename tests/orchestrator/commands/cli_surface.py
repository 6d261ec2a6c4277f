"""`python -m tests.orchestrator.commands.cli_surface`: write the command line's surface as text, to hold it still."""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestrator.cli import build_parser

SURFACE = Path(__file__).with_name("cli_surface.txt")


def surface(parser: argparse.ArgumentParser) -> str:
    """One line per command, positional and option: flags, what it takes, type, choices and default.

    Help texts are left out: rewording one breaks nobody's script.
    """
    lines = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in sorted(action.choices):
                lines += [name, *(f"    {line}" for line in surface(action.choices[name]).splitlines())]
        elif not isinstance(action, argparse._HelpAction):
            lines.append(_one(action))
    return "".join(f"{line}\n" for line in lines)


def _one(action: argparse.Action) -> str:
    words = [", ".join(action.option_strings) or str(action.metavar or action.dest)]
    if action.nargs == 0:
        words.append("(switch)")
    elif action.nargs is not None:
        words.append(f"(nargs {action.nargs})")
    if action.type is not None:
        words.append(f"type {getattr(action.type, '__name__', action.type)}")
    if action.choices is not None:
        words.append(f"one of {', '.join(map(str, action.choices))}")
    if action.default not in (None, False, []):
        words.append(f"default {action.default}")
    if action.required and action.option_strings:
        words.append("required")
    return " ".join(words)


if __name__ == "__main__":
    SURFACE.write_text(surface(build_parser()))
