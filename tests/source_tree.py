"""The project's own source as syntax trees, for the tests that hold its shape."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "collectives", "faulttol", "trainer", "orchestrator")
"""The packages; each may import those before it."""


@dataclass(frozen=True)
class Import:
    """One imported module or name."""

    line: int
    target: str
    """Dotted; for `from a import b` it is `a.b`, which may be a module or a name in `a`."""
    late: bool
    """Inside a function, so that importing the module doesn't run it."""

    @property
    def top(self) -> str:
        """The outermost package."""
        return self.target.partition(".")[0]


@dataclass(frozen=True)
class Module:
    """One file of Python."""

    root: Path
    path: Path
    """Relative to `root`."""

    @property
    def name(self) -> str:
        """Dotted name; a package's is that of its folder."""
        parts = self.path.with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def room(self) -> str:
        """The package or test folder at the top."""
        return self.path.parts[0]

    @cached_property
    def text(self) -> str:
        """The source."""
        return (self.root / self.path).read_text()

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text, str(self.path))

    def at(self, node: ast.stmt | ast.expr) -> str:
        """`path:line`, to begin a complaint with."""
        return f"{self.path}:{node.lineno}"

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        """What it imports when it runs; imports for the type checker alone are left out."""
        return tuple(self._imports(self.tree.body, late=False))

    def _imports(self, body: Sequence[ast.AST], *, late: bool) -> Iterator[Import]:
        for node in body:
            if isinstance(node, ast.Import):
                yield from (Import(node.lineno, alias.name, late) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                yield from (Import(node.lineno, f"{base}.{alias.name}", late) for alias in node.names)
            elif isinstance(node, ast.If) and _for_types(node.test):
                yield from self._imports(node.orelse, late=late)
            else:
                inner = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from self._imports(list(ast.iter_child_nodes(node)), late=inner)

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        folder = self.path.parent.parts[: len(self.path.parent.parts) - node.level + 1]
        return ".".join([*folder, *([node.module] if node.module else [])])


def _for_types(test: ast.expr) -> bool:
    return ast.unparse(test).endswith("TYPE_CHECKING")


@cache
def modules(root: Path = ROOT, folders: tuple[str, ...] = ROOMS) -> tuple[Module, ...]:
    """All files of Python under `folders`, sorted; each is read and parsed once for all rules."""
    found = (path for folder in folders for path in (root / folder).rglob("*.py"))
    return tuple(_module(root, path.relative_to(root)) for path in sorted(found))


_module = cache(Module)


def write_tree(root: Path, files: dict[str, str], folders: tuple[str, ...] = ROOMS) -> tuple[Module, ...]:
    """Write a small tree to try a rule on; its modules."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return modules(root, folders)
