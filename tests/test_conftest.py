"""The guard that keeps unit tests off the network."""

from __future__ import annotations

import socket

import pytest

pytestmark = pytest.mark.unit


def test_a_unit_test_reaches_no_other_machine() -> None:
    with socket.socket() as client, pytest.raises(AssertionError, match="connects to"):
        client.connect(("198.51.100.1", 9))


def test_a_unit_test_reaches_this_machine() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
