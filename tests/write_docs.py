"""`python -m tests.write_docs`: write the parts of the documents that are made from code."""

from __future__ import annotations

from orchestrator.states import table
from tests.source_tree import ROOT

ARCHITECTURE = ROOT / "docs" / "architecture.md"
_BEGIN, _END = "<!-- states:begin -->\n", "<!-- states:end -->"


def state_table(text: str) -> str:
    """What stands between the markers of the state table.

    Raises:
        ValueError: where a marker is missing.
    """
    return text[text.index(_BEGIN) + len(_BEGIN) : text.index(_END)]


def with_state_table(text: str, made: str) -> str:
    """The page with `made` between the markers."""
    begin, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    return f"{text[:begin]}{made}{text[end:]}"


def main() -> None:
    """Write every generated part in its place."""
    ARCHITECTURE.write_text(with_state_table(ARCHITECTURE.read_text(), table()))


if __name__ == "__main__":
    main()
