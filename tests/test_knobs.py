"""No dead knob: every field of the configuration is read by code outside the schema.

A bare search for `.name` or `.path` would find something for almost any field. So the reads are followed by
type: a parameter or attribute annotated with a section, a function that returns one, and what is assigned
from those. A reading that this can't follow makes the test fail, never pass; an annotation mends it.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from configs.schema import RouterConfig, RunConfig
from configs.section import Section
from configs.timeouts import Timeouts
from tests.source_tree import Module, modules, write_tree

pytestmark = pytest.mark.unit

SCHEMA = (
    "configs/schema.py", "configs/model.py", "configs/training.py", "configs/section.py", "configs/fabric.py",
    "configs/timeouts.py", "configs/hardware.py",
)  # fmt: skip
"""Where fields are declared and checked, which isn't reading them."""
Model = type[BaseModel]
Knob = tuple[Model, str]


def section(annotation: Any) -> Model | None:
    """The section that a field's annotation names."""
    if get_origin(annotation) is Annotated:
        return section(get_args(annotation)[0])
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def knobs(model: Model) -> Iterator[Knob]:
    """Every field of `model` and of the sections in it that holds a value."""
    for name, field in model.model_fields.items():
        if inner := section(field.annotation):
            yield from knobs(inner)
        else:
            yield model, name


def sections(model: Model) -> Iterator[Model]:
    """`model` and the sections in it."""
    yield model
    for field in model.model_fields.values():
        if inner := section(field.annotation):
            yield from sections(inner)


class Reads(ast.NodeVisitor):
    """Collects the knobs that modules read."""

    def __init__(self, tree: Sequence[Module], root: Model) -> None:
        self.found: set[Knob] = set()
        self._models = {model.__name__: model for model in sections(root)}
        self._returns: dict[str, Model] = {}
        self._attributes: dict[str, set[Model]] = defaultdict(set)
        self._scopes: list[dict[str, Model]] = [{}]
        read = [module.tree for module in tree if str(module.path) not in SCHEMA]
        for node in (node for top in read for node in ast.walk(top)):
            self._declare(node)
        # Twice: the first pass learns what is assigned to attributes that a file before it may read.
        for top in [*read, *read]:
            self.visit(top)

    def _declare(self, node: ast.AST) -> None:
        """What is known before any code is followed: return types, and annotated attributes of classes."""
        if isinstance(node, ast.FunctionDef) and (model := self._named(node.returns)):
            self._returns[node.name] = model
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and (model := self._named(part.annotation)):
                    self._attributes[ast.unparse(part.target)].add(model)
                elif isinstance(part, ast.FunctionDef) and (model := self._named(part.returns)):
                    self._attributes[part.name].add(model)

    def _named(self, annotation: ast.expr | None) -> Model | None:
        words = ast.unparse(annotation).strip("'\"").split(" | ") if annotation else []
        return next((self._models[word] for word in words if word in self._models), None)

    def _types(self, node: ast.expr) -> set[Model]:
        """The sections that an expression may be."""
        if isinstance(node, ast.Name):
            return {scope[node.id] for scope in self._scopes[::-1] if node.id in scope}
        if isinstance(node, ast.Attribute):
            owners = self._types(node.value)
            inner = {
                section(m.model_fields[node.attr].annotation) for m in owners if node.attr in m.model_fields
            }
            return {model for model in inner if model} if owners else self._attributes.get(node.attr, set())
        if isinstance(node, ast.Call):
            return self._result(node)
        if isinstance(node, ast.NamedExpr | ast.Await):
            return self._types(node.value)
        if isinstance(node, ast.IfExp):
            return self._types(node.body) | self._types(node.orelse)
        return set()

    def _result(self, call: ast.Call) -> set[Model]:
        if isinstance(call.func, ast.Name):
            model = self._models.get(call.func.id) or self._returns.get(call.func.id)
            return {model} if model else set()
        if isinstance(call.func, ast.Attribute):
            if call.func.attr in ("model_copy", "model_validate"):
                named = self._named(call.func.value)
                return {named} if named else self._types(call.func.value)
            return {self._returns[call.func.attr]} if call.func.attr in self._returns else set()
        return set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:  # noqa: N802  (named by `NodeVisitor`)
        """Follow a function with its annotated arguments known."""
        spec = node.args
        named = {a.arg: self._named(a.annotation) for a in [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]}
        self._scopes.append({name: model for name, model in named.items() if model})
        self.generic_visit(node)
        self._scopes.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:  # noqa: N802
        """Learn the type of a variable that is annotated."""
        self.generic_visit(node)
        if model := self._named(node.annotation):
            self._learn(node.target, {model})

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:  # noqa: N802
        """Learn the type of a variable from what is assigned in an expression."""
        self.generic_visit(node)
        self._learn(node.target, self._types(node.value))

    def visit_Assign(self, node: ast.Assign) -> None:  # noqa: N802
        """Learn the type of a variable from what is assigned to it."""
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for one, value in pairs:
                self._learn(one, self._types(value))

    def _learn(self, target: ast.expr, models: set[Model]) -> None:
        if isinstance(target, ast.Name):
            self._scopes[-1].pop(target.id, None)
            self._scopes[-1].update(dict.fromkeys([target.id] if models else [], next(iter(models), Section)))
        elif isinstance(target, ast.Attribute):
            self._attributes[target.attr] |= models

    def visit_Attribute(self, node: ast.Attribute) -> None:  # noqa: N802
        """Record a read."""
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load):
            self._record(node.value, node.attr)

    def visit_Call(self, node: ast.Call) -> None:  # noqa: N802
        """Record `timeouts.seconds("hang")`, which reads a timeout by its name."""
        self.generic_visit(node)
        match node:
            case ast.Call(
                func=ast.Attribute(value=owner, attr="seconds"), args=[ast.Constant(value=str(name))]
            ):
                self._record(owner, name)

    def _record(self, owner: ast.expr, name: str) -> None:
        self.found |= {(model, name) for model in self._types(owner) if name in model.model_fields}


#: Read in a way that types can't follow, each with the place.
KNOWN: dict[Knob, str] = {(Timeouts, "patience"): "configs/timeouts.py derives every other timeout from it"}


def dead(tree: Sequence[Module], root: Model, known: dict[Knob, str]) -> list[str]:
    """Fields that no code reads."""
    found = Reads(tree, root).found
    return [
        f"{model.__name__}.{name}" for model, name in knobs(root) if (model, name) not in {*found, *known}
    ]


def test_every_field_is_read() -> None:
    assert not dead(modules(), RunConfig, KNOWN), "read the field where it should matter, or remove it"


def test_every_exception_is_still_needed() -> None:
    found = Reads(modules(), RunConfig).found
    assert not [f"{model.__name__}.{name}" for model, name in KNOWN if (model, name) in found]


class Depth(Section):
    """A section in a section."""

    size: int = 1


class Shape(Section):
    """A section."""

    width: int = 1
    name: str = ""
    depth: Depth = Depth()


class Whole(Section):
    """A configuration."""

    shape: Shape = Shape()
    name: str = ""
    timeouts: Timeouts = Timeouts()


TIMEOUTS: dict[Knob, str] = {(Timeouts, name): "not tried here" for name in Timeouts.model_fields}


def _dead(tmp_path: Path, text: str) -> list[str]:
    return dead(write_tree(tmp_path, {"trainer/a.py": text}), Whole, TIMEOUTS)


@pytest.mark.parametrize(
    "text",
    [
        "def f(c: Whole) -> int:\n    return c.shape.width, c.shape.name, c.name, c.shape.depth.size\n",
        "def f(c: 'Whole | None'):\n    s, n = c.shape, c.name\n    d = s.depth\n    d.size, s.name, s.width\n",
        "class A:\n    def __init__(self, c: Whole):\n        self.c, self.d = c, c.shape.depth\n"
        "    def f(self):\n        s = self.c.shape\n        return s.width + self.d.size, s.name, self.c.name\n",
        "class P:\n    config: Whole\ndef f(p):\n    c = p.config\n    g(c.name).name, c.shape.depth.size\n"
        "def g(x) -> Shape: ...\ndef h():\n    g(1).width\n",
        "def f(x):\n    if (c := Whole.model_validate(x)).name:\n        s = c.shape.model_copy(update={})\n"
        "        return s.width, s.name, s.depth.size\n",
    ],
)
def test_ways_to_read_are_followed(text: str, tmp_path: Path) -> None:
    assert not _dead(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "unread"),
    [
        ("def f(c: Whole):\n    return c.shape.width, c.name, c.shape.depth.size\n", ["Shape.name"]),
        ("def f(c: Whole, path):\n    return c.shape.name, path.name, c.shape.width, path.size\n",
         ["Depth.size", "Whole.name"]),
        ("def f(c: Whole, other):\n    c.shape.name, c.shape.depth.size, c.name\n    c = other\n    c.shape.width\n",
         ["Shape.width"]),
        ("def f(c: Whole):\n    c.shape.name, c.shape.depth.size, c.name\ndef g(c):\n    c.width = 1\n",
         ["Shape.width"]),
    ],
)  # fmt: skip
def test_a_dead_knob_is_found(text: str, unread: list[str], tmp_path: Path) -> None:
    assert _dead(tmp_path, text) == unread


def test_a_timeout_is_read_by_its_name(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, {"trainer/a.py": "def f(t: Timeouts):\n    t.seconds('hang')\n"})
    assert Reads(tree, Whole).found == {(Timeouts, "hang")}


def test_sections_are_seen_at_every_depth() -> None:
    assert (RouterConfig, "scale") in set(knobs(RunConfig)) and (Timeouts, "hang") in set(knobs(RunConfig))
