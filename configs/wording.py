"""What the schema says about a dotted field, and pydantic's complaints in words that a user can act on.

Every sentence names the field, the value, why it is refused and what to type instead.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from configs.errors import nearest, shortened
from configs.schema import RunConfig

_LONGEST = 100
"""Characters of a value in a message; of a longer one the rest is left out."""


def known(path: str) -> bool:
    """Whether `path` names a field, a section, or a key of a field that is a mapping."""
    return path in _schema() or _mapping(path) is not None


def is_section(path: str) -> bool:
    """Whether `path` names a section and so takes no value itself."""
    return path in _schema() and _model(_schema()[path]) is not None


def is_structured(path: str) -> bool:
    """Whether the field's values are spelled in YAML: mappings and choices among numbers."""
    kinds = set(_kinds(_schema()[path])) if path in _schema() else set()
    return dict in kinds or any(get_origin(kind) is Literal and not _words(kind) for kind in kinds)


def takes_bool(path: str) -> bool:
    """Whether true and false are values of the field, or it isn't a number in the first place."""
    kinds = set(_kinds(_schema()[path])) if path in _schema() else set()
    return not kinds & {int, float} or bool in kinds


def fields(path: str) -> str:
    """The fields right under a section, for a message."""
    depth = path.count(".") + 1
    return ", ".join(name for name in _schema() if name.startswith(f"{path}.") and name.count(".") == depth)


def example(path: str) -> str:
    """`field=value` as it could be typed."""
    value = _default(path)
    if value is None or isinstance(value, (dict, BaseModel)):
        kinds = list(_kinds(_schema()[path])) if path in _schema() else []
        if literal := next((kind for kind in kinds if get_origin(kind) is Literal), None):
            value = get_args(literal)[0]
        else:
            value = "1.0" if float in kinds or _mapping(path) else "1" if int in kinds else "..."
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return f"{path}={str(value).lower() if isinstance(value, bool) else value}"


def unknown(path: str, groups: Sequence[str] = ()) -> str:
    """That no such field exists, with the nearest one that does; `groups` of presets are typed as sections are."""
    names = list(_schema())
    section, _, field = path.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == section]
    siblings += [] if section else groups
    # The section's own name says nothing about the field: 'model.moe_every' isn't near 'model.router'.
    close = nearest(field, siblings).replace("'", f"'{section}." if section else "'", 1)
    if not close and not section:
        close = nearest(path, names)
    if not close:  # the right name in the wrong section, or without its section
        close = next((f" (did you mean '{name}'?)" for name in names if name.rpartition(".")[2] == field), "")
    if not close and not is_section(section) and (last_close := _near_leaf(path, names)):
        close = f" (did you mean '{last_close}'?)"
    if close:
        advice = "use a field that exists"
    elif is_section(path.split(".")[0]):
        advice = f"{path.split('.')[0]} has {fields(path.split('.')[0])}"
    else:
        advice = (
            f"the sections are {', '.join(name for name in names if is_section(name) and '.' not in name)}"
        )
    return f"unknown field '{path}'{close}; {advice}"


def wrong_type(path: str, value: object) -> str:
    """That the value isn't what the field takes."""
    kinds = list(_kinds(_schema()[path])) if path in _schema() else [float]
    return f"{path}={_shown(value)} is not {_noun(kinds)}; type e.g. {example(path)}"


def explain(error: ValidationError) -> str:
    """All complaints of one validation in one line."""
    details = error.errors(include_url=False)
    paths = {_path(detail) for detail in details}
    if "resilience.timeouts.patience" in paths:  # the other timeouts only follow from the dial
        details = [
            d for d in details if d["loc"][:2] != ("resilience", "timeouts") or d["loc"][2:] == ("patience",)
        ]
    sentences = dict.fromkeys(_sentence(detail) for detail in details)
    return "; also: ".join(sentences)


def _path(detail: ErrorDetails) -> str:
    """The field, without the place in its list."""
    return ".".join(part for part in detail["loc"] if isinstance(part, str))


def _sentence(detail: ErrorDetails) -> str:
    path = _path(detail)
    value, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        return unknown(path)
    if kind == "missing":
        return f"{path} is missing; add {example(path)}"
    if kind == "literal_error":
        names = [str(name) for name in _literals(path)]
        return f"{path}={_shown(value)} is not one of {', '.join(names)}{nearest(str(value), names)}"
    if kind == "finite_number":
        return f"{path}={_shown(value)} is not a finite number; type e.g. {example(path)}"
    bounds = {
        "greater_than": ("gt", "must be above"),
        "greater_than_equal": ("ge", "must be at least"),
        "less_than": ("lt", "must be below"),
        "less_than_equal": ("le", "must be at most"),
    }
    if kind == "too_short":
        return f"{path} is empty; type e.g. {example(path)}"
    if kind == "string_too_long":
        return f"{path}={_shown(value)} has {len(value)} characters; type at most {context['max_length']}"
    if kind in bounds:
        key, words = bounds[kind]
        bound = context[key] if isinstance(context[key], int) else f"{context[key]:g}"
        return f"{path}={_shown(value)} {words} {bound}; type e.g. {example(path)}"
    if is_section(path):
        return f"{path}={_shown(value)} is not a section; it has {fields(path)}"
    return wrong_type(path, value)


def _shown(value: object) -> str:
    if value is None:
        return "null"
    short = shortened(value, _LONGEST)
    return f"'{short}'" if isinstance(value, str) and not _is_number(value) else short


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _noun(kinds: list[Any]) -> str:
    nouns = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    named = [noun for kind, noun in nouns.items() if kind in kinds]
    return named[0] if named else "a mapping of names to values"


def _near_leaf(path: str, names: list[str]) -> str:
    """The field whose own name, without its section, is closest to that of `path`."""
    leaves = {name.rpartition(".")[2]: name for name in reversed(names)}
    close = nearest(path.rpartition(".")[2], leaves)
    return leaves[close.split("'")[1]] if close else ""


@cache
def _schema() -> dict[str, Any]:
    """Dotted path of every section and field -> its annotation."""
    return dict(_walk(RunConfig, ""))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field.annotation
        if section := _model(field.annotation):
            yield from _walk(section, f"{path}.")


def _model(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types and `Literal`s that an annotation admits."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _kinds(part)
    elif origin is tuple:
        yield from _kinds(get_args(annotation)[0])
    elif origin is dict:
        yield dict
    else:
        yield annotation


def _words(literal: Any) -> bool:
    return all(isinstance(value, str) for value in get_args(literal))


def _literals(path: str) -> list[object]:
    return [
        value for kind in _kinds(_schema()[path]) if get_origin(kind) is Literal for value in get_args(kind)
    ]


def _mapping(path: str) -> str | None:
    """The field that is a mapping and has `path` as one of its keys."""
    parent = path.rpartition(".")[0]
    return parent if parent in _schema() and dict in _kinds(_schema()[parent]) else None


def _default(path: str) -> Any:
    """The field's default, or None where it has none."""
    model: type[BaseModel] | None = RunConfig
    value: Any = None
    for name in path.split("."):
        if model is None or name not in model.model_fields:
            return None
        field = model.model_fields[name]
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        model = _model(field.annotation)
    return value
