"""What all tests share: the network stays off for tests that need none of it."""

from __future__ import annotations

import socket
from typing import Any

import pytest

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


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes in a test's name would be unreadable, and where they are random another name in each process of xdist."""
    return "bytes" if isinstance(val, bytes) else None
