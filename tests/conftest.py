"""What all tests share: the network stays off for tests that need none of it, nothing that one sets or writes reaches the
next, and of several files long ones come first."""

from __future__ import annotations

import gc
import os
import select
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import configs

_LOCAL = ("127.", "localhost", "::1", "0.0.0.0")


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit and simulated tests reach no other machine."""
    if not any(request.node.get_closest_marker(name) for name in ("unit", "sim")):
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(_LOCAL):
            raise AssertionError(f"a test without a network marker connects to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """What a test, or what it calls, sets in the environment ends with it: ranks of the next one would take it over."""
    before = dict(os.environ)
    yield
    for name in {name for name, _ in before.items() ^ os.environ.items()} - {"PYTEST_CURRENT_TEST"}:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture(autouse=True, scope="session")
def _shipped_files_stay() -> Iterator[None]:
    """No test writes into the presets and profiles that others read."""
    folder = Path(configs.__file__).parent
    before = contents(folder)
    yield
    changed = sorted({path for path, _ in before.items() ^ contents(folder).items()})
    assert not changed, f"the tests wrote {', '.join(changed)}"


def contents(folder: Path) -> dict[str, bytes]:
    """Of each YAML and JSON file under a folder."""
    return {
        str(path): path.read_bytes() for ending in ("yaml", "json") for path in folder.rglob(f"*.{ending}")
    }


def descriptors() -> set[str]:
    """Numbers of this process's open files.

    What earlier tests have left may be closed at any time, so a test asks whether it has left more than there was (`<=`).
    """
    return set(os.listdir("/proc/self/fd"))


@contextmanager
def must_not_raise(error: type[Exception], rule: str) -> Iterator[None]:
    """Have an error of the code under test fail an assertion that says which rule it breaks. `tests.mutants` counts no
    other error, as a patch may only have broken the code."""
    try:
        yield
    except error as raised:
        raise AssertionError(f"{rule}; it raised {type(raised).__name__}: {raised}") from raised


def readable(file: int | socket.socket, seconds: float) -> bool:
    """Wait until there is something to read. `select` doesn't take descriptors above 1,023, which a worker may have."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(1e3 * seconds))


def longest_first(items: list[pytest.Item], usual: float) -> None:
    """Sort files by the longest time limit among their tests, so that no long file begins when all others are done.

    Args:
        usual: seconds of a test without a limit of its own.
    """
    limits: dict[Path, float] = {}
    for item in items:
        marker = item.get_closest_marker("timeout")
        own: Sequence[Any] = marker.args if marker is not None else ()
        limits[item.path] = max(limits.get(item.path, 0.0), float(own[0]) if own else usual)
    items.sort(key=lambda item: -limits[item.path])


def pytest_configure() -> None:
    """Thousands of tests and all that they import are made to stay: looking for garbage among them is for nothing."""
    gc.disable()


def pytest_collection_finish() -> None:
    """From here on there is garbage, and what was collected isn't searched for it each time."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is long is left to `make long`. `--dist loadfile --no-loadscope-reorder` hands files to the workers in this
    order; by itself in that of names."""
    if not os.environ.get("MEGARAY_LONG"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="`make long` runs it"))
    if hasattr(config, "workerinput"):
        longest_first(items, float(config.getini("timeout")))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes in a test's name would be unreadable, and where they are random another name in each process of xdist."""
    return "bytes" if isinstance(val, bytes) else None
