"""What every file says of itself: system, software, settings, method."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import asdict
from typing import Any

import torch

from collectives.ops import nccl
from collectives.ops.groups import GroupPartition
from collectives.ops.transfers import BY_LIBRARY
from collectives.store.results import Metadata
from collectives.store.resume import settings_of
from collectives.timing.clock import Clock
from collectives.timing.team import Team, devices
from configs.schema import RunConfig

_LIBRARIES = re.compile(r"(TORCH_)?(NCCL|RCCL|GLOO|FI|UCX|HSA|OMP)_|(CUDA|HIP|ROCR)_VISIBLE_DEVICES")
"""Variables that matter to a measurement. No others are kept: an environment holds secrets."""


def utc(seconds: float | None = None) -> str:
    """A time as nccl-tests writes it, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def collect(
    config: RunConfig,
    team: Team,
    clock: Clock,
    first: GroupPartition,
    layout: dict[str, int],
    arguments: list[str],
) -> Metadata:
    """Metadata of a measurement. `first` gives the groups that nccl-tests' device list shows."""
    version = _nccl_version() if team.backend == "nccl" else ()
    hosts: dict[int, dict[str, Any]] = {}
    for node, member in zip(team.nodes, team.members, strict=True):
        names = ("hostname", "address", "machine", "kernel", "cores", "host_memory_bytes", "device_info")
        hosts.setdefault(node, {name: member[name] for name in names} | {"ranks": []})["ranks"].append(
            member["rank"]
        )
    return Metadata(
        system={"hosts": list(hosts.values()), "devices": devices(team.members, first), "hardware": config.hardware.name},
        software={
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "backend": team.backend,
            "nccl_version": ".".join(map(str, version)),
            "nccl_version_code": _code(version),
            "environment": {k: v for k, v in sorted(os.environ.items()) if _LIBRARIES.match(k)},
        },
        settings={
            "collectives": settings_of(config.collectives),
            "network": {"name": config.network.name} | asdict(team.network),
            "ranks": team.rank.world,
            "layout": layout,
            "arguments": arguments,
        },
        method={
            "clock": clock.name,
            "time": f"calls in a row over their number, by each rank's own clock; of ranks: {config.collectives.average}. "
            "On GPUs by the device's clock, in bursts of `burst` (0: each waited for), replayed as a graph (nccl-tests -G) "
            "or launched from Python",
            "single_calls": "call_us, p50_us to stdev_us: each call alone, as long as its slowest rank takes",
            "interval": f"half-width at {config.collectives.confidence:.0%} by batch means, of a number of calls that was "
            "decided before they were timed",
            "algbw": "size / mean time, 10^9 bytes a second",
            "busbw": "algbw times nccl-tests' factor of the operation",
            "check": "every element against its exact value, in a call that isn't timed",
            "calls": f"torch.distributed's, but for {', '.join(BY_LIBRARY)} the library's own"
            if team.backend == "nccl" and nccl.loaded()
            else "torch.distributed's",
            "out_of_place": "by torch.distributed's all_reduce, broadcast and reduce: the in-place call on an earlier copy",
        },
        started=utc(),
    )  # fmt: skip


def _nccl_version() -> tuple[int, ...]:
    return tuple(torch.cuda.nccl.version())


def _code(version: tuple[int, ...]) -> int:
    """NCCL_VERSION_CODE."""
    if len(version) < 3:
        return 0
    major, minor, patch = version[:3]
    return major * 10000 + minor * 100 + patch
