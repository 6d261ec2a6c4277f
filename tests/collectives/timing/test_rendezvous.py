"""Restarted ranks share a store with those before them, as under torchrun, and read none of their keys."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from collectives.timing.rendezvous import SHARED, fresh_store

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]
WORLD = 4
LONG = timedelta(seconds=30)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a store that outlives the ranks."""
    monkeypatch.setenv(SHARED, "True")
    server = dist.TCPStore("127.0.0.1", 0, None, True, timeout=LONG, wait_for_workers=False)
    # Kept until the test ends.
    monkeypatch.setattr(threading.current_thread(), "store", server, raising=False)
    return server.port


def client(port: int) -> dist.Store:
    """As a rank has it."""
    return dist.TCPStore("127.0.0.1", port, None, False, timeout=LONG, wait_for_workers=False)


def start(port: int, late: int | None = None) -> list[dist.Store]:
    """All ranks meet; `late` comes after the others."""

    def one(rank: int) -> dist.Store:
        time.sleep(0.2 if rank == late else 0.0)
        return fresh_store(client(port), rank, WORLD, LONG)

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(one, range(WORLD)))


@pytest.mark.parametrize("late", range(WORLD))
def test_restarted_ranks_share_keys_with_each_other_alone(port: int, late: int) -> None:
    first = start(port)
    first[0].set("address", "of the first")
    assert all(store.get("address") == b"of the first" for store in first)
    second = start(port, late)
    assert not any(store.check(["address"]) for store in second)
    second[1].set("address", "of the second")
    assert all(store.get("address") == b"of the second" for store in second)


def test_a_start_that_never_came_together_is_passed_over(port: int) -> None:
    with pytest.raises(dist.DistStoreError):
        fresh_store(client(port), 0, WORLD, timedelta(seconds=0.3))  # its peers died before they signed
    stores = start(port, late=0)
    stores[0].set("address", "now")
    assert all(store.get("address") == b"now" for store in stores)


def test_a_rank_that_is_alone_gives_up(port: int) -> None:
    client(port).set("megaray-start/offer", "of the dead")
    with pytest.raises(dist.DistStoreError, match="no offer of rank 0"):
        fresh_store(client(port), 1, WORLD, timedelta(seconds=0.3))


def test_a_store_of_one_start_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARED, raising=False)
    store = dist.HashStore()
    assert fresh_store(store, 0, WORLD, LONG) is store
