"""`python -m tests.write_docs [FILE]`: write the parts of the documents that are made from code or by a run.

FILE is what `make demo` printed; its part from the plan to the summary goes into the README.
"""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator.record.states import table
from tests.source_tree import ROOT

ARCHITECTURE = ROOT / "docs" / "architecture.md"
README = ROOT / "README.md"
_BEGIN, _END = "<!-- states:begin -->\n", "<!-- states:end -->"
_OUTPUT_BEGIN, _OUTPUT_END = "<!-- output:begin -->\n", "<!-- output:end -->"


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


def with_output(text: str, printed: str) -> str:
    """The README with what a demo printed, from its plan to its summary.

    Raises:
        ValueError: where a marker is missing or `printed` is not a whole demo.
    """
    body = printed[printed.index("model     ") : printed.index("Ray is still up")].rstrip()
    begin, end = text.index(_OUTPUT_BEGIN) + len(_OUTPUT_BEGIN), text.index(_OUTPUT_END)
    return f"{text[:begin]}```\n{body}\n```\n{text[end:]}"


def main(arguments: list[str]) -> None:
    """Write every generated part in its place."""
    ARCHITECTURE.write_text(with_state_table(ARCHITECTURE.read_text(), table()))
    for name in arguments:
        README.write_text(with_output(README.read_text(), Path(name).read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
