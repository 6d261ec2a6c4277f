"""A rendezvous store without keys of earlier restarts, inside the store of a launcher that keeps one for all.

torchrun keeps one TCPStore for all restarts of its workers and, since torch 2.5, no longer puts a prefix for each
restart before their keys (pytorch issue 135712; 2.13 makes the store once and keeps it). Restarted ranks then read the
addresses of those that are gone: they fail to connect, or wait forever. The count of restarts doesn't help, since
each node counts its own.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from configs.errors import from_json

SHARED = "TORCHELASTIC_USE_AGENT_STORE"
"""Set to `True` by torchrun where its own store is the ranks' too."""
POLL = 0.02
"""Seconds between two polls of the store."""


def fresh_store(store: dist.Store, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """A store without keys of an earlier start, the same one on all ranks.

    Rank 0 offers a name, each rank signs the offer with a name of its own, and rank 0 closes it with the list of
    signatures. Who isn't on the list has read an earlier start's offer, and waits for the next one.

    Raises:
        torch.distributed.DistStoreError: where ranks stay away for `timeout`.
    """
    if os.environ.get(SHARED) != str(True):
        return store
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    common = dist.PrefixStore("megaray-start", store)
    if rank == 0:
        common.set("offer", mine)
        keys = [f"{mine}/{other}" for other in range(1, world)]
        if keys:
            common.wait(keys, timeout)
        common.set(f"{mine}/closed", json.dumps([common.get(key).decode() for key in keys]))
        return dist.PrefixStore(mine, common)
    while time.monotonic() < deadline:
        common.wait(["offer"], timeout)
        offer = common.get("offer").decode()
        if not common.check([f"{offer}/closed"]):
            common.set(f"{offer}/{rank}", mine)
        elif mine in from_json(common.get(f"{offer}/closed")):
            return dist.PrefixStore(offer, common)
        time.sleep(POLL)
    raise dist.DistStoreError(f"no offer of rank 0 within {timeout.total_seconds():.0f} s")
