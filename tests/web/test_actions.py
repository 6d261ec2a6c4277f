"""What may be done: asked once more, done once, by a bounded child, and written down with who."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from orchestrator.web import actions
from tests.web.made import MadeRun, a_home, queue_file
from tests.web.serving import TOKEN, Client, serving

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

_CHILD = """
import json, sys, os, time
order = json.loads(sys.stdin.readline())
with open({seen!r}, "a") as file: file.write(json.dumps(order | {{"home": os.environ["MEGARAY_HOME"]}}) + "\\n")
print("noise of a library")
{then}
"""
_DONE = "print(json.dumps({'ok': True, 'said': 'it is done'}))"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    home = a_home(tmp_path / "home")
    MadeRun(home, "one", now=time.time() - 60).submit().start().train(5)
    MadeRun(home, "old", now=time.time() - 600).submit().start().train(5).save().finish()
    MadeRun(home, "waits", now=time.time() - 6).submit()
    queue_file(home, time.time())
    with serving(home) as client:
        child(client, tmp_path)
        yield client


def child(client: Client, folder: Path, then: str = _DONE) -> None:
    code = _CHILD.format(seen=str(folder / "orders"), then=then)
    client.shared.actions._command = (sys.executable, "-c", code)


def orders(folder: Path) -> list[dict[str, Any]]:
    path = folder / "orders"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_action_is_asked_once_more_and_done_once(client: Client, tmp_path: Path) -> None:
    asked = client.post({"action": "cancel", "target": "on"}, 409)
    assert asked["question"].startswith("Cancel one (running, step 5 of 100)?")
    assert not orders(tmp_path), "nothing is done by asking"
    done = client.post({"action": "cancel", "target": "on", "confirm": asked["confirm"]}, 200)
    assert done == {"ok": True, "said": "it is done"}
    home = str(client.shared.live.home.home)
    assert orders(tmp_path) == [
        {"action": "cancel", "target": "one", "reason": "", "by": "ann", "home": home}
    ]
    again = client.post({"action": "cancel", "target": "on", "confirm": asked["confirm"]}, 400)
    assert "ask for it again" in again["error"] and len(orders(tmp_path)) == 1
    told = client.get("/api/actions")["actions"][0]
    assert (told["who"], told["action"], told["target"], told["ok"], told["from"]) == (
        "ann",
        "cancel",
        "one",
        True,
        "127.0.0.1",
    )
    assert (client.shared.live.home.dashboard_actions).stat().st_mode & 0o077 == 0


def test_a_confirmation_holds_for_what_was_asked_alone(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = client.post({"action": "cancel", "target": "one"}, 409)["confirm"]
    client.post({"action": "dump_stacks", "target": "one", "confirm": asked}, 400)
    asked = client.post({"action": "cancel", "target": "one"}, 409)["confirm"]
    client.post({"action": "cancel", "target": "waits", "confirm": asked}, 400)
    asked = client.post({"action": "cordon", "target": "10.0.0.1", "reason": "disk"}, 409)["confirm"]
    client.post({"action": "cordon", "target": "10.0.0.1", "reason": "other", "confirm": asked}, 400)
    client.post({"action": "cancel", "target": "one", "confirm": "guessed"}, 400)
    monkeypatch.setattr(actions, "_CONFIRM", -1.0)
    asked = client.post({"action": "cancel", "target": "one"}, 409)["confirm"]
    client.post({"action": "cancel", "target": "one", "confirm": asked}, 400)
    assert not orders(tmp_path)


def test_a_confirmation_is_of_who_asked(client: Client, tmp_path: Path) -> None:
    tokens = client.shared.guard.tokens
    assert tokens is not None
    tokens.names["b" * 20] = "bob"
    asked = client.post({"action": "cancel", "target": "one"}, 409)["confirm"]
    bob = Client(client.port, client.shared, token="b" * 20)
    bob.post({"action": "cancel", "target": "one", "confirm": asked}, 400)
    tokens.names.pop("b" * 20)
    assert not orders(tmp_path) and TOKEN in tokens.names


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"action": "destroy", "target": "one"}, "action='destroy' is none; use one of cancel"),
        ({"action": "cancel", "target": "nothing"}, "names no run of this home"),
        ({"action": "cancel", "target": "old"}, "run 'old' is succeeded already"),
        ({"action": "dump_stacks", "target": "waits"}, "has no ranks whose stacks"),
        ({"action": "cordon", "target": "10.0.0.77", "reason": "x"}, "'10.0.0.77' is not a node"),
        ({"action": "cordon", "target": "one", "reason": "  "}, "say why the node is kept free"),
        ({"action": "cordon", "target": "--help", "reason": "x"}, "is not a node"),
        ({}, "action='' is none"),
    ],
)
def test_what_cannot_be_asked(client: Client, tree: dict[str, str], says: str) -> None:
    assert says in client.post(tree, 400)["error"]


def test_nodes_go_by_address_or_name(client: Client, tmp_path: Path) -> None:
    tree = {"action": "cordon", "target": "two", "reason": " slow disk "}
    asked = client.post(tree, 409)
    assert "10.0.0.2 (two)" in asked["question"]
    client.post(tree | {"confirm": asked["confirm"]}, 200)
    assert orders(tmp_path)[0]["target"] == "10.0.0.2" and orders(tmp_path)[0]["reason"] == "slow disk"


def confirmed(client: Client, status: int) -> dict[str, Any]:
    tree = {"action": "cancel", "target": "one"}
    return client.post(tree | {"confirm": client.post(tree, 409)["confirm"]}, status)


def test_a_cluster_that_refuses_or_hangs_or_dies(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(client, tmp_path, "print(json.dumps({'ok': False, 'said': 'no Ray cluster is up'}))")
    assert confirmed(client, 502)["error"] == "no Ray cluster is up"
    assert client.get("/api/actions")["actions"][0]["ok"] is False
    child(client, tmp_path, "sys.stderr.write('Traceback\\nValueError: broken\\n'); sys.exit(3)")
    assert "ValueError: broken" in confirmed(client, 502)["error"]
    monkeypatch.setattr(actions, "_SECONDS", 1.0)
    child(client, tmp_path, "time.sleep(60)")
    began = time.monotonic()
    assert "didn't answer in 1 s" in confirmed(client, 502)["error"]
    assert time.monotonic() - began < 30
    assert client.get("/api/runs")["runs"], "the page continues"


def test_the_real_child_says_what_is_missing(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child as it is used, on a home that has no cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    client.shared.actions._command = (sys.executable, "-m", "orchestrator.web.act")
    monkeypatch.setattr(actions, "_SECONDS", 60.0)
    error = confirmed_slowly(client)
    assert "no Ray cluster is up" in error, error


def confirmed_slowly(client: Client) -> str:
    tree = {"action": "cancel", "target": "one"}
    asked = client.post(tree, 409)["confirm"]
    body = json.dumps(tree | {"confirm": asked}).encode()
    status, _, answer = client.raw("/api/actions", "POST", body, timeout=90, Content_Type="application/json")
    assert status == 502
    return str(json.loads(answer)["error"])


class _Controller:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def cancel(self, run_id: str, at_once: bool = False) -> str:
        self.calls.append(("cancel", run_id, at_once))
        return "one is ending"

    def mark_node(self, node: str, mark: str, reason: str, by: str) -> None:
        self.calls.append((mark, node, reason, by))


class _Newer(_Controller):
    def cancel(self, run_id: str, at_once: bool = False, by: str = "") -> str:
        self.calls.append(("cancel", run_id, at_once, by))
        return "one is ending"

    def dump_stacks(self, run_id: str, by: str) -> str:
        return f"/x/{run_id}/{by}"


def test_orders_become_calls_of_the_controller() -> None:
    from orchestrator.web.act import act

    old, new = _Controller(), _Newer()
    order = {"action": "cancel", "target": "one", "reason": "", "by": "ann"}
    assert act(old, order) == act(new, order) == "one is ending"
    assert old.calls == [("cancel", "one", False)] and new.calls == [("cancel", "one", False, "ann")]
    assert "kept free" in act(old, {"action": "cordon", "target": "n", "reason": "disk", "by": "ann"})
    assert old.calls[-1] == ("cordon", "n", "disk", "ann")
    assert "/x/one/ann" in act(new, order | {"action": "dump_stacks"})
    with pytest.raises(UserError, match="earlier version"):
        act(old, order | {"action": "dump_stacks"})


def test_what_is_typed_is_written_and_shown_without_secrets(client: Client) -> None:
    secret = "Zx81kdmWq0abc123"
    order = {"action": "cordon", "target": "10.0.0.1", "reason": f"tried --api-key={secret}"}
    reply = client.post(order, 409)
    client.post(order | {"confirm": reply["confirm"]}, 200)
    path = client.shared.live.home.dashboard_actions
    assert secret not in path.read_text() and "tried --api-key=[redacted]" in path.read_text()
    assert secret not in client.post({"action": f"token={secret}", "target": "one"}, 400)["error"]
    with path.open("a") as file:
        file.write('7\n{"time": 17\n')
    assert len(client.get("/api/actions")["actions"]) == 1, "damaged lines are stepped over"
