"""Payloads of a run's events: what is written comes back, and what is not an event is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any, get_args

import pytest

from orchestrator.record import events as ev
from orchestrator.record.events import AttemptPlaced, Event, Payload, Submitted, decode
from orchestrator.record.states import Reason, State
from tests.orchestrator.record.life import AMENDED, LIFE, SHARES, SMALLER, STOPPING, SUBMITTED

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def told(payload: Payload) -> dict[str, Any]:
    """As a log has it."""
    tree: dict[str, Any] = json.loads(json.dumps({"kind": payload.kind} | asdict(payload)))
    return tree


def test_the_life_has_every_kind() -> None:
    kinds = get_args(Payload)
    assert {type(p) for p in LIFE} == set(kinds) == set(ev._KINDS.values())
    assert len({c.kind for c in kinds}) == len(kinds), "two of one name"


@pytest.mark.parametrize("payload", LIFE, ids=lambda p: p.kind)
def test_a_payload_comes_back_as_it_was(payload: Payload) -> None:
    back = decode(told(payload))
    assert back == payload and type(back) is type(payload)
    for field in fields(payload):  # equality takes a list for no tuple, and a text for a state
        assert type(getattr(back, field.name)) is type(getattr(payload, field.name)), field.name


def test_an_event_tells_itself_with_its_place() -> None:
    event = Event(7, 123.25, STOPPING, 4.5)
    tree = json.loads(json.dumps(event.to_json()))
    assert (tree.pop("seq"), tree.pop("time"), tree.pop("clock")) == (7, 123.25, 4.5)
    assert decode(tree) == STOPPING


def test_states_and_reasons_come_back_as_such() -> None:
    stop = decode(told(STOPPING))
    assert isinstance(stop, ev.StopBegan)
    assert stop.to is State.RECOVERING and stop.reason is Reason.RANK_DIED and stop.to.holds_slots is False


def test_what_an_attempt_owns_comes_back() -> None:
    smaller, whole = decode(told(SMALLER)), decode(told(AttemptPlaced(1, SHARES, "g")))
    assert isinstance(smaller, AttemptPlaced) and isinstance(whole, AttemptPlaced)
    assert smaller.gang is not None and smaller.gang.ranks == 2 and smaller.shares[0].ranks == (0, 1)
    assert whole.gang is None and whole.layout is None and whole.config == "" == whole.code


def test_fields_that_an_earlier_version_did_not_have_are_empty() -> None:
    tree = told(SUBMITTED)
    for name in ("owner", "code", "wall_seconds", "runtime_env"):
        del tree[name]
    back = decode(tree)
    assert isinstance(back, Submitted)
    assert (back.owner, back.code, back.wall_seconds, back.runtime_env) == ("", "", None, {})
    amended = told(AMENDED)
    del amended["code"], amended["wall_seconds"]
    assert isinstance(again := decode(amended), ev.Amended)
    assert again.code is None and again.wall_seconds is None


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"kind": "unheard_of"},
        {"kind": ["resumed"]},
        {"kind": None},
        {"attempt": 1, "step": 1, "path": None},
        {"kind": "resumed", "attempt": 1},
        {"kind": "resumed", "attempt": 1, "step": 1, "path": None, "more": 1},
        {"kind": "moved", "to": "flying", "reason": "placed"},
        {"kind": "moved", "to": "queued", "reason": "whim"},
        {"kind": "moved", "to": "queued"},
        {"kind": "stop_began", "attempt": 1, "to": "failed", "reason": "whim"},
        {"kind": "placed", "attempt": 1, "shares": [3], "group": "g"},
        {"kind": "placed", "attempt": 1, "shares": 3, "group": "g"},
        {"kind": "placed", "attempt": 1, "shares": [], "group": "g", "gang": 3},
        {"kind": "submitted", "gang": 3},
        {"kind": "submitted", "gang": {"ranks": 1, "block": 1, "colour": "red"}},
        {"kind": "amended", "overrides": None},
        {"kind": "amended", "overrides": [], "changes": [["a", "b"]]},
    ],
    ids=str,
)
def test_a_tree_that_is_no_event_is_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not an event"):
        decode(tree)


@pytest.mark.parametrize("tree", [5, "text", None, ["kind"]], ids=str)
def test_what_is_no_tree_is_refused(tree: Any) -> None:
    with pytest.raises(ValueError, match="not an event"):
        decode(tree)
