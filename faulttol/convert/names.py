"""A map of names: a JSON file that says where the tensors of another checkpoint lie in ours.

    {"rules": [
      {"from": "module\\\\.layers\\\\.(\\\\d+)\\\\.experts\\\\.(\\\\d+)\\\\.up\\\\.weight",
       "to": "blocks.{1}.feed.experts.gate_up", "at": ["{2}", 1]},
      {"from": ".*\\\\.inv_freq", "to": null},
      {"from": "(.*)", "to": "{1}"}
    ]}

The first rule whose `from`, a regular expression, matches the whole of a name counts. `to` is the name here, with groups of
the match in braces; null leaves the tensor out. `at` gives leading places of the tensor here, so that those of many experts
make up one. An optimizer's slots (`NAME/exp_avg`) go with their parameter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError, from_json
from faulttol.checkpoint.boxes import Box
from faulttol.convert.placed import Foreign, PlacedTensor

_GROUP = re.compile(r"\{(\d+)\}")


@dataclass(frozen=True)
class NameRule:
    """One line of the map."""

    pattern: re.Pattern[str]
    to: str | None
    at: tuple[str, ...] = ()


KEEP = (NameRule(re.compile(r"(.*)"), "{1}"),)
"""The map that keeps names."""


def load(path: Path) -> tuple[NameRule, ...]:
    """The rules of a file.

    Raises:
        UserError: where it isn't one, naming the rule.
    """
    try:
        tree = from_json(path.read_text())
        rules = tree["rules"]
        if not isinstance(rules, list):
            raise TypeError("rules is not a list")
    except OSError as error:
        raise UserError(f"names={path} can't be read: {error.strerror}; name the file of a map") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'names={path} is not a map of names ({error}); it begins with {{"rules": [{{"from": …, "to": …}}]}}'
        ) from None
    return tuple(_rule(f"names={path}: rule {number}", rule) for number, rule in enumerate(rules, start=1))


def _rule(where: str, tree: Any) -> NameRule:
    if not isinstance(tree, dict) or not {"from", "to"} <= tree.keys() <= {"from", "to", "at"}:
        raise UserError(f"{where} is {json.dumps(tree)}; it takes from, to and perhaps at")
    at = tree.get("at", [])
    if (
        not isinstance(tree["from"], str)
        or not isinstance(tree["to"], str | None)
        or not isinstance(at, list)
    ):
        raise UserError(f"{where}: from and to are texts and at is a list; correct {json.dumps(tree)}")
    try:
        pattern = re.compile(tree["from"])
    except re.error as error:
        raise UserError(
            f"{where}: from='{tree['from']}' is not a regular expression: {error}; correct it"
        ) from None
    rule = NameRule(pattern, tree["to"], tuple(map(str, at)))
    for text in (rule.to or "", *rule.at):
        for group in _GROUP.findall(text):
            if int(group) > pattern.groups:
                raise UserError(
                    f"{where}: {{{group}}} in '{text}', and from has {pattern.groups} groups; correct it"
                )
    return rule


def place(
    foreign: Foreign, rules: Sequence[NameRule], names: Iterable[str] | None = None
) -> tuple[list[PlacedTensor], list[str]]:
    """Where tensors lie in ours, and which are left out.

    Args:
        names: of the tensors; None: all of them.

    Raises:
        UserError: where no rule matches a name, or the parts of one of ours have different shapes.
    """
    by_name: dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = {}
    left: list[str] = []
    for name in foreign.names() if names is None else names:
        parameter, _, slot = name.partition("/")
        rule, match = _matching(rules, parameter)
        if rule.to is None:
            left.append(name)
            continue
        ours = _filled(rule.to, match) + (f"/{slot}" if slot else "")
        try:
            at = tuple(int(_filled(text, match)) for text in rule.at)
        except ValueError as error:
            raise UserError(
                f"the place of {name} in {ours} is not a whole number ({error}); correct the map's at"
            ) from None
        by_name.setdefault(ours, []).append((name, foreign.shape(name), at))
    placed: list[PlacedTensor] = []
    for ours, parts in by_name.items():
        placed += _stacked(ours, parts)
    return placed, left


def _matching(rules: Sequence[NameRule], name: str) -> tuple[NameRule, re.Match[str]]:
    for rule in rules:
        match = rule.pattern.fullmatch(name)
        if match:
            return rule, match
    raise UserError(
        f'no rule of the map of names matches {name}; add one, or {{"from": "(.*)", "to": "{{1}}"}} at its end'
    )


def _filled(text: str, match: re.Match[str]) -> str:
    return _GROUP.sub(lambda group: match[int(group[1])] or "", text)


def _stacked(name: str, parts: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> list[PlacedTensor]:
    """Parts of one of ours, whose leading dims are as large as their places tell."""
    first, shape, at = parts[0]
    for other, its, places in parts:
        if (its, len(places)) != (shape, len(at)):
            raise UserError(
                f"{first} of {list(shape)} and {other} of {list(its)} can't make up {name} together; correct the map"
            )
    sizes = tuple(1 + max(places[dim] for _, _, places in parts) for dim in range(len(at)))
    whole = (*sizes, *shape)
    zeros, ones = (0,) * len(shape), (1,) * len(at)
    return [
        PlacedTensor(foreign, shape, name, Box(whole, (*places, *zeros), (*ones, *shape)))
        for foreign, _, places in parts
    ]
