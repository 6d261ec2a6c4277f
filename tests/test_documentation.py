"""What the documents say can be typed, and where their links lead, is so."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import collectives.cli
import trainer.cli
from configs.compose import compose
from configs.errors import UserError
from configs.schema import RunConfig
from orchestrator.cli import parse
from orchestrator.record.states import table
from tests.source_tree import ROOT
from tests.source_tree import modules as source_modules
from tests.write_docs import ARCHITECTURE, state_table, with_state_table

pytestmark = pytest.mark.unit

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
_COMMAND = re.compile(
    r"(?:python|torchrun\b[^\n`]*) -m (orchestrator|collectives|trainer) +([a-z](?:'[^'\n]*'|[^\n`#&|;'])*)"
)


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Program, and what follows its name, wherever a page types it."""
    return (
        (found.group(1), found.group(2).strip()) for found in _COMMAND.finditer(text.replace("\\\n", " "))
    )


def try_command(program: str, words: str) -> None:
    """Parse a command, and compose its configuration where it has one.

    Raises:
        UserError: where it would be refused.
    """
    if program == "collectives":
        measuring = collectives.cli.parse(shlex.split(words))
        if measuring.verb == "run":
            compose(collectives.cli.overrides(measuring))
        elif measuring.verb == "device":
            compose([word for word in measuring.overrides if "<" not in word])  # a name to fill in
        return
    if program == "trainer":
        sizing = trainer.cli.parse(shlex.split(words))
        if sizing.command in ("run", "size"):
            compose(sizing.overrides)
        return
    options = parse(shlex.split(words))
    if hasattr(options, "config"):  # `resume` has overrides of a run's own configuration
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


def modules(text: str) -> set[str]:
    """Modules of the tests that a page has run by hand."""
    return set(re.findall(r"python -m (tests(?:\.\w+)+)", text))


def missing_modules(text: str) -> list[str]:
    """Those that aren't there."""
    names = [name.replace(".", "/") for name in sorted(modules(text))]
    return [n for n in names if not ((ROOT / f"{n}.py").is_file() or (ROOT / n / "__main__.py").is_file())]


_FIELD = re.compile(
    r"`(model|hardware|cluster|parallel|data|optim|train|checkpoint|resilience|tracking)\.([a-z_.]+)"
)


def unknown_fields(text: str) -> list[str]:
    """Fields that a page names in code, and the schema lacks."""
    return [f"{group}.{name}" for group, name in _FIELD.findall(text) if not _has(group, name.rstrip("."))]


def _has(group: str, name: str) -> bool:
    section: Any = RunConfig.model_fields[group].annotation
    for part in name.split("."):
        if part not in getattr(section, "model_fields", {}):
            return False
        section = section.model_fields[part].annotation
    return True


_FILE = re.compile(r"`((?:configs|collectives|faulttol|trainer|orchestrator|tests|docs)/[\w/]+\.py)`")


def missing_files(text: str) -> list[str]:
    """Files of the tree that a page names in code, and that aren't there."""
    return [name for name in _FILE.findall(text) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_fields_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    assert missing_modules(text) == [] and unknown_fields(text) == [] and missing_files(text) == []


def test_a_wrong_module_field_or_file_would_be_found() -> None:
    text = "`python -m tests.trainer.grids`, `python -m tests.mutants`, `train.engine=native`, `train.motor=native`, "
    text += "`model.router.kind`, `model.router.sort`, `trainer/loop.py`, `trainer/engine.py`"
    assert missing_modules(text) == ["tests/trainer/grids"]
    assert unknown_fields(text) == ["train.motor", "model.router.sort"]
    assert missing_files(text) == ["trainer/engine.py"]


def test_fields_of_the_table_of_models_exist() -> None:
    """They stand in a column of their own, without `model.` before them."""
    page = (ROOT / "docs" / "training.md").read_text()
    rows = re.findall(r"^\|[^|]*\|[^|]*\| *((?:`[a-z_.]+`(?:, )?)+) *\|$", page, re.MULTILINE)
    fields = [field for row in rows for field in re.findall(r"`([a-z_.]+)`", row)]
    assert len(fields) > 10 and [field for field in fields if not _has("model", field)] == []


TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"


@cache
def templates() -> tuple[str, ...]:
    """All texts of the packages, with `…` for each value that is filled in."""
    texts = []
    for module in source_modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return tuple(texts)


def messages(page: str) -> list[str]:
    """The first column of each table, where it is code."""
    return re.findall(r"^\| `((?:[^`\\]|\\.)+)` \|", page, re.MULTILINE)


def unsaid(text: str) -> list[str]:
    """Messages that no text of the packages can make; `…` is any value, which may be empty."""
    return [m for m in messages(text) if not any(_makes(one, m.split("…")) for one in templates())]


def _makes(template: str, parts: list[str]) -> bool:
    """Whether the parts of a message stand in a text, one after the other."""
    at = 0
    for part in parts:
        at = template.find(part.strip(), at)
        if at < 0:
            return False
        at += len(part.strip())
    return True


def test_each_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    assert len(messages(TROUBLESHOOTING.read_text())) >= 30
    assert unsaid(TROUBLESHOOTING.read_text()) == []


def test_a_message_that_nobody_says_would_be_found() -> None:
    page = "| message | x |\n|---|---|\n| `Ray did not start…; see …` | a |\n| `Ray did not begin` | b |\n"
    page += "| `… holds a finished measurement; remove it` | c |\n"
    assert unsaid(page) == ["Ray did not begin", "… holds a finished measurement; remove it"]


CONTRIBUTING = ROOT / "CONTRIBUTING.md"
_ANSWER = re.compile(r"`([\w./]+\.(?:py|yaml|js))`(?: \(`([\w.]+)`\))?")


def unanswered(text: str) -> list[str]:
    """Places of the table of questions that aren't there: a file, or the name in brackets inside it."""
    section = text.partition("## Where do I")[2].partition("\n## ")[0]
    rows = [
        line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| I want")
    ]
    wrong = [line for line in rows if not _ANSWER.search(line)]
    for path, name in _ANSWER.findall("\n".join(rows)):
        file = ROOT / path
        if not file.exists() or (name and not re.search(rf"\b{re.escape(name)}\b", file.read_text())):
            wrong.append(f"{path} ({name})" if name else path)
    return wrong


def test_the_questions_of_a_newcomer_lead_to_what_is_there() -> None:
    text = CONTRIBUTING.read_text()
    section = text.partition("## Where do I")[2].partition("\n## ")[0]
    assert section.count("\n| ") - 1 >= 10, "a heading and ten questions"
    assert unanswered(text) == []


def test_a_wrong_answer_would_be_found() -> None:
    text = "## Where do I\n| I want | a |\n|---|---|\n| an axis | `configs/schema.py` (`ParallelConfig`) |\n"
    text += "| b | `configs/schema.py` (`ParallelKonfig`) |\n| c | `configs/nowhere.py` |\n| d | ask |\n"
    text += "## Next\n| e | f |\n"
    assert unanswered(text) == ["| d | ask |", "configs/schema.py (ParallelKonfig)", "configs/nowhere.py"]


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
