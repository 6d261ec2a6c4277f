"""Files and functions stay small, annotated and described; nothing is left lying about."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.source_tree import ROOMS, Module, modules, write_tree

pytestmark = pytest.mark.unit

FILE_MOST, FILE_P90 = 500, 350
FUNCTION_LINES, FUNCTION_ARGUMENTS = 80, 8
IGNORES = 5
FOLDER_MODULES = 16
Function = ast.FunctionDef | ast.AsyncFunctionDef


def lines(module: Module) -> int:
    """Lines of the file."""
    return module.text.count("\n")


def functions(module: Module) -> Iterator[Function]:
    """All functions and methods, nested ones too."""
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def long_files(tree: Sequence[Module]) -> Iterator[str]:
    """Files over the limit, and the packages' ninetieth percentile."""
    yield from (f"{m.path}: {lines(m)} lines; at most {FILE_MOST}" for m in tree if lines(m) > FILE_MOST)
    sizes = sorted((lines(m), str(m.path)) for m in tree if m.room in ROOMS and lines(m))
    if sizes:
        size, path = sizes[(len(sizes) * 9 - 1) // 10]
        if size > FILE_P90:
            yield f"{path}: nine files in ten have up to {size} lines; at most {FILE_P90}"


def long_functions(tree: Sequence[Module]) -> Iterator[str]:
    """Functions with too many lines."""
    for module in tree:
        for node in functions(module):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{module.at(node)}: {node.name} has {length} lines; at most {FUNCTION_LINES}"


def wide_functions(tree: Sequence[Module]) -> Iterator[str]:
    """Functions with too many arguments, `self` and `cls` not counted. A kernel takes a pointer for each of its tensors."""
    for module in tree:
        for node in functions(module):
            if any(ast.unparse(one) == "triton.jit" for one in node.decorator_list):
                continue
            spec = node.args
            named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
            count = len([a for a in named if a is not None and a.arg not in ("self", "cls")])
            if count > FUNCTION_ARGUMENTS:
                yield f"{module.at(node)}: {node.name} takes {count} arguments; at most {FUNCTION_ARGUMENTS}"


def unannotated(tree: Sequence[Module]) -> Iterator[str]:
    """Functions of the packages without a return annotation."""
    for module in tree:
        if module.room in ROOMS:
            yield from (
                f"{module.at(node)}: {node.name} doesn't say what it returns"
                for node in functions(module)
                if node.returns is None
            )


def undescribed(tree: Sequence[Module]) -> Iterator[str]:
    """Public modules, classes, functions and methods of the packages without a docstring."""
    for module in tree:
        if module.room in ROOMS and module.tree.body:
            if ast.get_docstring(module.tree) is None:
                yield f"{module.path}:1: the module has no docstring"
            yield from _undescribed(module, module.tree)


def _undescribed(module: Module, parent: ast.Module | ast.ClassDef) -> Iterator[str]:
    for node in parent.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield f"{module.at(node)}: {node.name} has no docstring"
            if isinstance(node, ast.ClassDef):
                yield from _undescribed(module, node)


def globals_(tree: Sequence[Module]) -> Iterator[str]:
    """`global` statements."""
    for module in tree:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                yield f"{module.at(node)}: global {', '.join(node.names)}"


def comments(module: Module) -> Iterator[tuple[int, str]]:
    """Line and text of every comment."""
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def ignores(tree: Sequence[Module]) -> Iterator[str]:
    """In the packages, `type: ignore` without its error code and reason, and too many of them."""
    count = 0
    for module in (m for m in tree if m.room in ROOMS):
        for line, text in comments(module):
            if re.search(r"#\s*type:\s*ignore", text):
                count += 1
                if not re.search(r"#\s*type:\s*ignore\[[\w, -]+\]\s*#\s*\S", text):
                    yield f"{module.path}:{line}: write `# type: ignore[code]  # the reason`"
    if count > IGNORES:
        yield f"{count} times `type: ignore` in the packages; at most {IGNORES}"


def leftovers(tree: Sequence[Module]) -> Iterator[str]:
    """Notes to do something later."""
    for module in tree:
        for line, text in comments(module):
            if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text):
                yield f"{module.path}:{line}: {text.strip()}; do it or open an issue"


def behind_brackets(tree: Sequence[Module]) -> Iterator[str]:
    """Comments behind a bracket on a line of its own: the formatter moves them there, away from what they are about."""
    for module in tree:
        rows = module.text.splitlines()
        for line, text in comments(module):
            alone = re.match(r"\s*[)\]}][^#\"']*#", rows[line - 1])
            if alone and not re.match(r"#\s*(fmt|type|noqa)\b", text):
                yield f"{module.path}:{line}: put the comment above what it is about"


def twice_named(tree: Sequence[Module]) -> Iterator[str]:
    """Public classes whose name another module has too, so that a search for it would find both."""
    places: dict[str, list[str]] = {}
    for module in tree:
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module.at(node))
    for name, found in places.items():
        if len(found) > 1:
            yield f"{found[-1]}: class {name} is in {found[0]} too; choose a more precise name for one of them"


def crowded(tree: Sequence[Module]) -> Iterator[str]:
    """Folders of the packages and of the tests with too many modules to take in at a glance."""
    sizes = Counter(m.path.parent for m in tree)
    for folder, size in sizes.items():
        if size > FOLDER_MODULES:
            yield f"{folder}: {size} modules; at most {FOLDER_MODULES}: divide it"


Rule = Callable[[Sequence[Module]], Iterator[str]]
RULES: list[Rule] = [
    long_files, long_functions, wide_functions, unannotated, undescribed, globals_, ignores, leftovers,
    behind_brackets, twice_named, crowded,
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_budget(rule: Rule) -> None:
    assert not list(rule(modules(folders=(*ROOMS, "tests"))))


_LONG_BODY = "    x = 1\n" * FUNCTION_LINES
BAD = {
    "long_files": {"trainer/a.py": "x = 1\n" * (FILE_MOST + 1)},
    "long_functions": {"trainer/a.py": f"class A:\n  def f(self):\n{_LONG_BODY}"},
    "wide_functions": {"trainer/a.py": "def f(a, b, c, d, e, g, /, h, *i, j, **k) -> None: ...\n"},
    "unannotated": {"trainer/a.py": "def f(x: int): ...\nclass A:\n    async def g(self): ...\n"},
    "undescribed": {"trainer/a.py": "class A:\n    def g(self): ...\ndef h(): ...\ndef _private(): ...\n"},
    "globals_": {"trainer/a.py": "def f():\n    global x\n"},
    "ignores": {"trainer/a.py": "x = 1  # type: ignore\n" + "y = 1  # type: ignore[misc]  # why\n" * IGNORES},
    "leftovers": {"trainer/a.py": 'x = "TODO in a text is not a note"  # TODO: later\n'},
    "behind_brackets": {"trainer/a.py": "x = f(\n    1\n)  # why\ny = f(\n    1\n)  # fmt: skip\n"},
    "twice_named": {
        "trainer/a.py": "class Row: ...\nclass _Own: ...\n",
        "trainer/b.py": "class _Own: ...\ndef f():\n    class Row: ...\n",
        "tests/test_a.py": "class Row: ...\n",
    },
    "crowded": {f"trainer/data/{i}.py": "" for i in range(FOLDER_MODULES + 1)} | {"trainer/a.py": ""},
}
FAULTS = {
    "long_files": 2, "long_functions": 1, "wide_functions": 1, "unannotated": 2, "undescribed": 4,
    "globals_": 1, "ignores": 2, "leftovers": 1, "behind_brackets": 1, "twice_named": 1, "crowded": 1,
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_finds_each_fault_of_a_bad_tree(rule: Rule, tmp_path: Path) -> None:
    found = list(rule(write_tree(tmp_path, BAD[rule.__name__], (*ROOMS, "tests"))))
    assert len(found) == FAULTS[rule.__name__], found


def test_the_rules_let_what_is_just_inside_pass(tmp_path: Path) -> None:
    body = "    x = 1\n" * (FUNCTION_LINES - 2)
    good = write_tree(
        tmp_path,
        {
            "trainer/__init__.py": "",
            "trainer/a.py": '"""A module."""\nx = 1  # type: ignore[misc]  # the stub is wrong\n',
            "trainer/b.py": f'"""A module."""\ndef f(a, b, c, d, e, g, h, i) -> None:\n    """Do."""\n{body}',
        },
    )
    assert not [complaint for rule in RULES for complaint in rule(good)]
