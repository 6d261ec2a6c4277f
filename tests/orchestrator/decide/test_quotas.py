"""The file of quotas, and what is wrong with it in one line."""

from __future__ import annotations

import pytest

from configs.errors import UserError
from orchestrator.decide.quotas import parse

pytestmark = [pytest.mark.unit, pytest.mark.timeout(20)]


def test_owners_and_their_slots_are_read() -> None:
    assert parse("ann: 16\n'*': 8  # all others\n1000: 0\n", "quotas.yaml") == {"ann": 16, "*": 8, "1000": 0}
    assert parse("", "quotas.yaml") == parse("# none yet\n", "quotas.yaml") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ann: 1: 2", "/h/quotas.yaml is not a YAML (mapping values are not allowed here"),
        (
            "- ann",
            "/h/quotas.yaml is not a mapping of owners to slots; write one line for each owner, such as `ann: 16`",
        ),
        ("ann: many", "/h/quotas.yaml: the quota of ann is 'many', and must be a number of slots, 0 or more"),
        ("ann: -1", "/h/quotas.yaml: the quota of ann is -1, and"),
        ("ann: true", "/h/quotas.yaml: the quota of ann is True, and"),
        ("ann: 1.5", "/h/quotas.yaml: the quota of ann is 1.5, and"),
        ("ann:", "/h/quotas.yaml: the quota of ann is None, and"),
    ],
)
def test_anything_else_is_named(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse(text, "/h/quotas.yaml")
    assert str(error.value).startswith(words) and "\n" not in str(error.value)
