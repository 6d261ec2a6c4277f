"""Ports that are given away a moment before somebody listens there."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from configs import rank

pytestmark = pytest.mark.unit
GIVEN_BY_THE_KERNEL = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


def test_none_is_told_twice_and_none_that_the_kernel_gives_away() -> None:
    found = [rank.free_port() for _ in range(200)]
    assert len(set(found)) == 200
    assert all(20_000 <= port < GIVEN_BY_THE_KERNEL for port in found)


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_one_that_somebody_listens_at_is_passed_over(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = rank.free_port()
    with socket.socket() as other:
        other.bind((host, taken))
        other.listen()
        assert not rank.are_free([taken])
        monkeypatch.setattr(rank, "_ports", lambda: (4, iter([taken - 20_000, taken - 20_000, 3, 4])))
        assert rank.free_port() != taken
    assert rank.are_free([taken])


def test_without_a_free_one_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "are_free", lambda _: False)
    with pytest.raises(OSError, match="no port from 20000 to "):
        rank.free_port()


@pytest.mark.parametrize(
    ("text", "below"),
    [("32768\t60999\n", 12_768), ("1024 65535\n", 12_768), ("", 12_768), ("49152 65535", 29_152)],
)
def test_how_many_there_are_follows_from_the_kernels_range(
    text: str, below: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "range").write_text(text)
    monkeypatch.setattr(rank, "_RANGE", tmp_path / "range")
    assert rank._ports.__wrapped__()[0] == below
