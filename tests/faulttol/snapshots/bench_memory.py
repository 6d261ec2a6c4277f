"""`python -m tests.faulttol.snapshots.bench_memory`: what a restart reads from other nodes' memory, against the store.

Ranks on four nodes save one state to memory, with a copy on another node, and to the store. Then all are killed, one node
is gone with its memory, and a fresh one takes its place. The new ranks restore from what is left in memory and from the
store, in turn. Where it may, each node is a network namespace; its memory is a folder in /dev/shm that no other reads.

The store is a folder on this machine's disk, whose files are dropped from the page cache before each read. A second part
counts what 12,288 ranks tell each other to find their files.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from faulttol.snapshots import memory
from tests.faulttol.snapshots.memory_nodes import Nodes
from tests.namespaces import Network, unavailable

MIB = 1 << 20
_NODES = 4
_LOST = "1"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="tests.faulttol.snapshots.bench_memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--mib", type=int, default=256, help="state of one rank, in MiB")
    parser.add_argument("--times", type=int, default=5, help="restores of each kind")
    parser.add_argument("--store", default=tempfile.gettempdir(), help="folder for the store")
    parser.add_argument(
        "--nic-mbit", type=float, help="what every node's network card passes; none: as much as it can"
    )
    parser.add_argument("--quick", action="store_true", help="8 MiB, twice")
    args = parser.parse_args()
    mib, times = (8, 2) if args.quick else (args.mib, args.times)
    with contextlib.ExitStack() as ends:
        hosts = []
        if why := unavailable():
            print(f"nodes share one network: {why}")
        else:
            network = ends.enter_context(Network(_NODES + 1, args.nic_mbit))
            hosts = network.hosts
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        store = Path(ends.enter_context(tempfile.TemporaryDirectory(dir=args.store)))
        nodes = ends.enter_context(Nodes(folder, hosts))
        job: dict[str, Any] = {"store": str(store), "elements": mib * MIB // 4}
        saved = nodes.run([str(n) for n in range(_NODES)], **job, to_memory=[20], to_store=[20])
        for tier, how in (("memory", "to memory, with a copy elsewhere"), ("store", "to the store, fsynced")):
            print(_line(f"saved {how}", max(one[tier] for one in saved), mib * _NODES))
        nodes.kill()
        nodes.lose(_LOST)
        if hosts:
            network.cut(int(_LOST))
        print(f"node {_LOST} of {_NODES} is gone with its memory; node {_NODES} takes its place")
        now = [str(_NODES) if str(n) == _LOST else str(n) for n in range(_NODES)]
        answers = nodes.run(now, **job, attempt=2, evict=True, tiers=["memory", "store"] * (times + 1))
    assert all(one["right"] for told in answers for one in told), "every byte is as it was saved"
    assert all(one["tier"] == ("memory", "store")[at % 2] for told in answers for at, one in enumerate(told))
    # The first warms up.
    slowest = [max(told[at]["seconds"] for told in answers) for at in range(2, 2 * times + 2)]
    found = {tier: statistics.median(slowest[at::2]) for at, tier in enumerate(("memory", "store"))}
    for tier, seconds in found.items():
        print(_line(f"restored from {tier}", seconds, mib * _NODES))
    print(f"memory is {found['store'] / found['memory']:.2f} times as fast as the store (median of {times})")
    _at_scale()


def _line(what: str, seconds: float, mib: int) -> str:
    return f"{what}: {mib / 1024:.2f} GiB in {seconds:.3f} s, {mib / 1024 / seconds:.2f} GiB/s"


def _at_scale(nodes: int = 1536, per_node: int = 8) -> None:
    """Bytes and seconds of the list that rank 0 makes and every rank gets, at 12,288 ranks with two copies of a step."""
    world, files = nodes * per_node, dict[str, list[int]]()
    keepers = memory.partners([str(rank // per_node) for rank in range(world)])
    for rank, keeper in enumerate(keepers):
        name = f"step-0000000200/run-of-a-usual-name-x7k2.a0002.r{rank:05d}.1f3a9c07.safetensors"
        files[name] = [rank // per_node, (keeper or 0) // per_node]
    tree: dict[str, object] = {
        "folders": [f"/dev/shm/megaray-1000/node-{n}/run-of-a-usual-name-x7k2" for n in range(nodes)],
        "addresses": [f"10.{n // 250}.{n % 250}.17:{40000 + n * 7 % 9999}" for n in range(nodes)],
        "files": files,
    }
    began = time.monotonic()
    packed = memory._packed(tree)
    made = time.monotonic()
    memory._union(packed, b"", Path("/dev/shm/none"), 5)
    print(
        f"{world} ranks on {nodes} nodes: {len(packed) / 1000:.0f} kB tell each rank where all files are; "
        f"packed in {made - began:.2f} s, read in {time.monotonic() - made:.2f} s"
    )


if __name__ == "__main__":
    main()
