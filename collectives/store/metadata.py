"""What every file says of itself: system, software, settings, method."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import asdict
from typing import Any

import torch

from collectives.ops.groups import Partition
from collectives.store.results import Metadata
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
    first: Partition,
    layout: dict[str, int],
    arguments: list[str],
) -> Metadata:
    """Metadata of a measurement. `first` gives the groups that nccl-tests' device list shows."""
    settings = config.collectives.model_dump(mode="json")
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
            "collectives": settings | {"timer": settings["timer"] if settings["timer"] != "auto" else "by device"},
            "network": {"name": config.network.name} | asdict(team.network),
            "ranks": team.rank.world,
            "layout": layout,
            "arguments": arguments,
        },
        method={
            "clock": clock.name,
            "time": "mean of the timed iterations; an iteration lasts as long as for its slowest rank",
            "interval": f"half-width at {config.collectives.confidence:.0%} by batch means",
            "algbw": "size / mean time, 10^9 bytes a second",
            "busbw": "algbw times nccl-tests' factor of the operation",
            "check": "every element against its exact value, in a call that isn't timed",
            "out_of_place": "of all_reduce, broadcast and reduce: a copy and the in-place call, both timed",
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
