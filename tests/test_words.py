"""Docstrings, comments, messages and pages avoid the words that CONTRIBUTING.md lists, and variables the empty names."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.source_tree import ROOMS, ROOT, modules

pytestmark = pytest.mark.unit

LIST = ROOT / "CONTRIBUTING.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md")])
_HEADING = "## Words to avoid"
_CODE = re.compile(r"\{[^{}]*\}|`[^`\n]*`")
"""Names in a text: fields of an f-string, and what a document or docstring marks as code."""


EMPTY_NAMES = frozenset({"found", "told", "asked"})
"""Names that say nothing about what a variable holds."""
KEPT_NAMES = {("orchestrator/record/events.py", "found")}
"""Fields of a file's format: of `controller_started`, in logs that there are."""


@cache
def avoided() -> dict[str, tuple[str, str]]:
    """Pattern -> an example of it, and what to write instead."""
    section = LIST.read_text().partition(_HEADING)[2].partition("\n## ")[0]
    rows = (re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| `"))
    return {
        pattern.strip().strip("`").replace("\\|", "|"): (example.strip(), advice.strip())
        for pattern, example, advice in rows
    }


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each comment and of each line of a string that has more than one word."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        wordy = token.type == tokenize.STRING and " " in token.string
        if wordy or token.type == tokenize.COMMENT or tokenize.tok_name[token.type] == "FSTRING_MIDDLE":
            yield from enumerate(token.string.splitlines(), token.start[0])


def complaints(where: str, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    """`path:line: text; write …` for each pattern that a line has outside of code."""
    for number, line in lines:
        text = _CODE.sub("", line)
        for pattern, (_, advice) in avoided().items():
            # An argument that is called `told` is described in the docstring under its name.
            if (match := re.search(pattern, text)) and not re.match(r"\s*\w+: ", text[match.start() :]):
                yield f"{where}:{number}: {line.strip()}; instead of '{match.group()}' write {advice}"


def test_the_packages_avoid_the_words() -> None:
    assert [c for m in modules(folders=ROOMS) for c in complaints(str(m.path), prose(m.text))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_avoid_the_words(page: Path) -> None:
    lines = page.read_text().splitlines()
    first = lines.index(_HEADING) if page == LIST else len(lines)
    end = next((i for i in range(first + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
    kept = [(n, line) for n, line in enumerate(lines, 1) if not first < n <= end]
    assert list(complaints(page.name, iter(kept))) == []


def test_the_list_has_an_example_and_advice_for_each_word() -> None:
    assert len(avoided()) >= 10
    for pattern, (example, advice) in avoided().items():
        planted = re.findall(r'"([^"]*)"', example)
        assert planted and advice, pattern
        assert all(list(complaints("a.md", iter([(1, text)]))) for text in planted), (pattern, planted)
        assert not [
            c for text in re.findall(r'"([^"]*)"', advice)[:1] for c in complaints("a.md", iter([(1, text)]))
        ]


def test_planted_words_are_found_where_people_read() -> None:
    source = (
        '"""It goes on."""\n'
        "x = 1  # as told before\n"
        "raise UserError(f'--tolerance={told} is no share; type one')\n"
        "told = asked['told']\n"
        "y = f'{told} and `goes on` are names'\n"
        "z = 'there is no GPU'\n"
    )
    assert [c.split(":")[1] for c in complaints("a.py", prose(source))] == ["1", "2", "3"]


def empty_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each variable, argument, field or alias that is called by an empty name."""
    line = 0
    for node in ast.walk(tree):
        line = getattr(node, "lineno", line)
        match node:
            case (
                ast.Name(id=name, ctx=ast.Store())
                | ast.Attribute(attr=name, ctx=ast.Store())
                | ast.arg(arg=name)
            ):
                pass
            case (
                ast.ExceptHandler(name=name)
                | ast.MatchAs(name=name)
                | ast.MatchStar(name=name)
                | ast.alias(asname=name)
            ):
                pass
            case ast.MatchMapping(rest=name):
                pass
            case _:
                continue
        if name in EMPTY_NAMES:
            yield line, name


def test_variables_are_named_by_their_contents() -> None:
    seen = [(str(m.path), *one) for m in modules(folders=ROOMS) for one in empty_names(m.tree)]
    assert [f"{path}:{line}: {name}" for path, line, name in seen if (path, name) not in KEPT_NAMES] == []
    assert {(path, name) for path, _, name in seen} == KEPT_NAMES, "what is kept is there"


def test_planted_names_are_seen_wherever_one_is_stored(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(
        "found = 1\n"
        "first, (told, *asked) = rows\n"
        "class Answer:\n"
        "    found: int = 0\n"
        "def give(told, *asked, found=None, **others): ...\n"
        "for told in rows: ...\n"
        "kept = [found for found in rows]\n"
        "if asked := rows: ...\n"
        "answer.found += 1\n"
        "with rows as told: ...\n"
        "lambda asked: 1\n"
        "try: ...\n"
        "except ValueError as found: ...\n"
        "import rows as told\n"
        "match rows:\n"
        "    case [asked, *found] | {**told}: ...\n"
        "# told, found and asked in prose are fine, and so is what another library calls so:\n"
        "rows = answer.found + told(asked=1) + found['told']\n"
        "def told() -> None: ...\n"
        "founded = asks = untold = 1\n"
    )
    seen = sorted(empty_names(ast.parse(planted.read_text())))
    assert [line for line, _ in seen] == [1, 2, 2, 4, 5, 5, 5, 6, 7, 8, 9, 10, 11, 13, 14, 16, 16, 16]
    assert {name for _, name in seen} == EMPTY_NAMES
