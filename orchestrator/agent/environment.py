"""The environment of a rank: who it is, what it imports from, and which cores and devices are its own."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil

from configs.paths import RunPaths, own_folder
from configs.rank import GATE, PARENT, RankContext
from faulttol import steady_clock
from orchestrator.agent.orders import AttemptOrder, LaunchSpec
from orchestrator.local import machine

PER_RANK = (
    "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "MEGARAY_ATTEMPT", "MEGARAY_MARK", "MEGARAY_RINGS", "MEGARAY_RUN",
    "MEGARAY_STARTED", "WORLD_SIZE", GATE,
)  # fmt: skip
"""Variables that differ between ranks and attempts, and that no library reads while it is being imported."""
DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")

SETTABLE_AFTER_LIBRARIES = (*PER_RANK, *DEVICES)
"""Variables that an interpreter may be given after it has imported libraries. One that has imported its program has opened
the devices' driver too, which reads `DEVICES` once."""
LIBRARIES_IGNORE = ("GLOO_SOCKET_IFNAME", "LOCAL_WORLD_SIZE", "MEGARAY_NODE", "PYTHONPATH")
"""What it may be given besides after it has imported libraries alone."""


def gang_environment(launch: LaunchSpec, base: Mapping[str, str]) -> dict[str, str]:
    """What all ranks of a gang on one node share.

    Raises:
        RuntimeError: where no network interface has the node's address.
    """
    env = {name: value for name, value in base.items() if name not in PER_RANK}
    if launch.uses_devices:  # Ray hides all devices from an actor that has none of its own
        env = {name: value for name, value in env.items() if name not in DEVICES}
    path = [launch.code] if launch.code else []
    # What this process imports from (a laptop's working directory too), its ranks import from.
    env["PYTHONPATH"] = os.pathsep.join([*path, *(p for p in sys.path if p and p not in path)])
    env |= _bytecode(env)
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONSAFEPATH"] = "1"  # `-m` would put the working directory first
    env[PARENT] = str(os.getpid())
    env["MEGARAY_NODE"] = launch.ip  # host names of containers change from start to start
    env["LOCAL_WORLD_SIZE"] = str(len(launch.ranks))
    # Ray's own value is for the actor.
    env["OMP_NUM_THREADS"] = str(max(1, machine.processors() // len(launch.ranks)))
    env |= launch.devices | launch.environment
    if len(set(launch.addresses)) > 1 and "GLOO_SOCKET_IFNAME" not in env:
        # Gloo asks the host name for its address, which on many hosts answers with loopback.
        env["GLOO_SOCKET_IFNAME"] = interface_of(launch.ip)
    return env


def generic_environment(ranks: int) -> dict[str, str]:
    """As `gang_environment`, of a gang that nobody knows yet and that takes all devices of this node."""
    gang = LaunchSpec(ranks, tuple(range(ranks)), "", (), (), "", uses_devices=True)
    return gang_environment(gang, os.environ)


def rank_environment(
    order: AttemptOrder, launch: LaunchSpec, local_rank: int, rings: Path, mark: str
) -> dict[str, str]:
    """What a rank has beside `gang_environment`."""
    address, _, port = launch.master.rpartition(":")
    context = RankContext(
        rank=launch.ranks[local_rank],
        world=launch.world,
        local_rank=local_rank,
        local_world=len(launch.ranks),
        master_addr=address,
        master_port=int(port),
        run=RunPaths(Path(order.run_root)),
        attempt=order.attempt,
    )
    return context.environment() | {
        "MEGARAY_MARK": mark,
        "MEGARAY_RINGS": str(rings),
        "MEGARAY_STARTED": repr(steady_clock.now()),
    }


def interface_of(ip: str) -> str:
    """Name of the network interface that has address `ip`.

    Raises:
        RuntimeError: where none has.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and _is(ip, a.address) for a in addresses):
            return name
    raise RuntimeError(f"no network interface of this node has address {ip}")


def _bytecode(env: Mapping[str, str]) -> dict[str, str]:
    """Where ranks keep compiled modules, if torch came without any and Python may not write them beside its sources.

    A rank imports some two thousand modules. Images made with `PYTHONDONTWRITEBYTECODE` have each rank of each attempt
    compile them all, which takes longer than everything else in a start.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or "PYTHONPYCACHEPREFIX" in env:
        return {}
    beside = not env.get("PYTHONDONTWRITEBYTECODE") and os.access(Path(spec.origin).parent, os.W_OK)
    if beside or Path(importlib.util.cache_from_source(spec.origin)).exists():
        return {}
    folder = Path(tempfile.gettempdir()) / f"megaray-bytecode-{os.getuid()}"
    try:
        # In another user's there could be modules of his own.
        mine = own_folder(folder) and not folder.lstat().st_mode & 0o022
    except OSError:
        return {}
    if not mine:
        return {}
    return {"PYTHONPYCACHEPREFIX": str(folder), "PYTHONDONTWRITEBYTECODE": ""}


def _is(ip: str, address: str) -> bool:
    # All of it is one interface's.
    return ip == address or (ip.startswith("127.") and address.startswith("127."))
