"""The guards that keep tests off the network and out of each other's way, and the order of files."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cluster.conftest import end_since
from tests.conftest import contents, longest_first, must_not_raise, pytest_collection_modifyitems
from tests.source_tree import ROOT

pytestmark = pytest.mark.unit


def test_a_unit_test_reaches_no_other_machine() -> None:
    with socket.socket() as client, pytest.raises(AssertionError, match="connects to"):
        client.connect(("198.51.100.1", 9))


def test_a_unit_test_reaches_this_machine() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())


def test_only_an_error_that_must_not_be_raised_fails_an_assertion() -> None:
    with must_not_raise(KeyError, "a rule"):
        pass
    with (
        pytest.raises(AssertionError, match="^a rule; it raised KeyError: 'a'$"),
        must_not_raise(KeyError, "a rule"),
    ):
        raise KeyError("a")
    with pytest.raises(ValueError, match="^another$"), must_not_raise(KeyError, "a rule"):
        raise ValueError("another")


def test_files_that_may_take_longest_come_first_and_stay_whole() -> None:
    def made(file: str, name: str, *limit: float) -> Any:
        marker = SimpleNamespace(args=limit) if limit else None
        return SimpleNamespace(path=Path(file), name=name, get_closest_marker=lambda _: marker)

    items = [
        made("a.py", "1", 60), made("b.py", "2"), made("c.py", "3", 30), made("c.py", "4", 900), made("b.py", "5", 60),
        made("d.py", "6", 300),
    ]  # fmt: skip
    longest_first(items, 120.0)
    assert [item.name for item in items] == ["3", "4", "6", "2", "5", "1"]


@pytest.mark.parametrize(("variable", "skipped"), [("", ["long"]), ("1", [])])
def test_what_is_long_is_left_to_make_long(
    variable: str, skipped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(name: str) -> Any:
        marks: list[Any] = []
        item = SimpleNamespace(name=name, get_closest_marker=lambda kind: kind == name or None, marks=marks)
        item.add_marker = marks.append
        return item

    monkeypatch.setenv("MEGARAY_LONG", variable)
    items = [made("long"), made("unit")]
    pytest_collection_modifyitems(SimpleNamespace(), items)  # type: ignore[arg-type]
    assert [item.name for item in items if item.marks] == skipped


def test_a_run_that_a_failed_test_has_left_is_ended_and_no_other() -> None:
    said: list[tuple[str, ...]] = []
    shell: Any = SimpleNamespace(
        home=SimpleNamespace(run_ids=lambda: ["shared", "ended", "refused", "left"]),
        view=lambda run: SimpleNamespace(submitted=None if run == "refused" else 1.0),
        ended=lambda run: run == "ended",
        run=lambda *words: said.append(words),
    )
    end_since(shell, {"shared"})
    assert said == [("cancel", "left", "--now")]


@pytest.mark.parametrize("number", [1, 2])
def test_what_a_test_sets_in_the_environment_ends_with_it(number: int) -> None:
    assert "MASTER_ADDR" not in os.environ and "PATH" in os.environ
    os.environ["MASTER_ADDR"] = f"of test {number}"
    del os.environ["PATH"]


def test_files_that_a_test_writes_are_seen(tmp_path: Path) -> None:
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "h100.yaml").write_text("a: 1")
    (tmp_path / "module.py").write_text("")
    before = contents(tmp_path)
    assert [Path(path).name for path in before] == ["h100.yaml"]
    (tmp_path / "device" / "h100.fit.json").write_text("{}")
    assert {Path(path).name for path, _ in before.items() ^ contents(tmp_path).items()} == {"h100.fit.json"}


def test_make_test_finds_every_test_with_a_real_ray() -> None:
    """It collects the folders that it names, and not all tests a second time."""
    named = re.findall(r"^RAY_TESTS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    marked = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"pytest\.mark\.cluster\b", path.read_text()) and path.name != "test_conftest.py"
    ]
    assert len(marked) > 5
    assert not [path for path in marked if not path.startswith(tuple(named))]
