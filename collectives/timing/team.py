"""The ranks of a gang: their devices, their rendezvous, process groups, and a description of each rank."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
import torch.distributed as dist

from collectives.ops.groups import GroupPartition
from collectives.ops.nccl import communicator
from collectives.ops.transfers import GroupMember
from collectives.timing.clock import machine_id
from collectives.timing.rendezvous import fresh_store
from collectives.timing.tree import ControlTree, GlooCarrier, levels
from configs.errors import UserError
from configs.library_environment import Applied, environment
from configs.rank import RankContext, threads
from configs.schema import RunConfig

N = TypeVar("N", bound=np.generic)
_VIRTUAL = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "podman")
"""How interfaces begin that only containers of this host use."""


class FabricLost(RuntimeError):
    """Ranks didn't arrive, one died, or the network failed; finished cases are kept."""


def choose_device(config: RunConfig, rank: RankContext) -> torch.device:
    """The rank's device.

    Raises:
        UserError: where the hardware preset needs a GPU that torch doesn't have.
    """
    if config.hardware.kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = f"torch {torch.__version__}"
        raise UserError(
            f"hardware={config.hardware.name} needs a GPU, and {build} sees none; choose hardware=cpu "
            f"or install the {'ROCm' if config.hardware.kind == 'rocm' else 'CUDA'} build of torch"
        )
    is_rocm = torch.version.hip is not None
    if is_rocm != (config.hardware.kind == "rocm"):
        build = "ROCm" if is_rocm else "CUDA"
        raise UserError(
            f"hardware={config.hardware.name} is a {config.hardware.kind} device, but this torch is built for "
            f"{build}; choose another hardware preset"
        )
    if rank.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {rank.rank} is number {rank.local_rank} of this node, which has {torch.cuda.device_count()} devices; "
            f"start at most {torch.cuda.device_count()} ranks on it"
        )
    device = torch.device("cuda", rank.local_rank)
    torch.cuda.set_device(device)
    return device


def init_process_group(config: RunConfig, rank: RankContext, backend: str) -> tuple[Applied, dist.Store]:
    """Set the network preset's variables, and join the default process group.

    Returns:
        What became of the preset's variables, and the rendezvous store.

    Raises:
        FabricLost: where ranks are missing at the rendezvous' timeout.
    """
    timeouts = config.resilience.timeouts
    kind = config.hardware.kind
    version = tuple(torch.cuda.nccl.version()) if kind != "cpu" and dist.is_nccl_available() else None
    applied = environment(config.network, kind, version, os.environ)
    os.environ.update(rank.environment() | applied.set)
    meeting = timedelta(seconds=timeouts.seconds("rendezvous"))
    try:
        store, _, _ = next(dist.rendezvous("env://", rank.rank, rank.world, timeout=meeting))
        store = fresh_store(store, rank.rank, rank.world, meeting)
    except dist.DistError as error:
        raise FabricLost(
            f"rank {rank.rank} of {rank.world} waited {meeting.total_seconds():.0f} s for the others at "
            f"{rank.master_addr}:{rank.master_port} ({str(error).splitlines()[0]}); start all ranks with the same address, "
            "or raise resilience.timeouts.rendezvous"
        ) from error
    collective = timedelta(seconds=timeouts.seconds("collective"))
    dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.world, timeout=collective)
    return applied, store


def choose_backend(config: RunConfig, device: torch.device) -> str:
    """The library under `torch.distributed`: as asked, or by device.

    Raises:
        UserError: where torch isn't built with it, or it can't reach the device.
    """
    wanted = config.collectives.backend
    name = ("gloo" if device.type == "cpu" else "nccl") if wanted == "auto" else wanted
    built = {"nccl": dist.is_nccl_available, "gloo": dist.is_gloo_available, "mpi": dist.is_mpi_available}
    if not built[name]():
        have = ", ".join(other for other, available in built.items() if available())
        raise UserError(
            f"collectives.backend={name} isn't built into torch {torch.__version__}; it has {have}: use one"
        )
    if name == "nccl" and device.type == "cpu":
        raise UserError(
            "collectives.backend=nccl moves device memory only, and hardware=cpu has none; use gloo"
        )
    return name


@dataclass
class Team:
    """All ranks, as one of them sees them. Methods are called by every rank at the same point."""

    rank: RankContext
    device: torch.device
    backend: str
    tree: ControlTree
    """All ranks: for decisions, times and texts."""
    members: list[dict[str, Any]]
    """Each rank's description: host, pid, machine, device."""
    network: Applied
    """What became of the network preset's variables on this rank."""
    limit: timedelta
    """Of one collective."""
    _groups: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = field(default_factory=dict)

    @classmethod
    def join(cls, config: RunConfig, rank: RankContext) -> Team:
        """Join the other ranks.

        Raises:
            UserError: for a single rank, or a backend that isn't there.
            FabricLost: where ranks stay away.
        """
        if rank.world < 2:
            raise UserError(
                "a collective needs at least two ranks; start at least two: `python -m collectives run --ranks 2`, "
                "torchrun --nproc-per-node 2, or parallel.dp=2 with `submit`"
            )
        device = choose_device(config, rank)
        torch.set_num_threads(threads(os.environ))
        backend = choose_backend(config, device)
        applied, store = init_process_group(config, rank, backend)
        limit = timedelta(seconds=config.resilience.timeouts.seconds("collective"))
        groups = levels(rank.rank, rank.world)
        everyone = dist.group.WORLD if backend == "gloo" else None
        tree = ControlTree(rank.rank, groups, GlooCarrier(rank.rank, groups, store, limit, everyone))
        return cls(rank, device, backend, tree, tree.all_gather(_describe_rank(rank, device)), applied, limit)

    @cached_property
    def control(self) -> dist.ProcessGroup:
        """A gloo group of all ranks; made when it is first needed, since it connects each of them with each other one."""
        group = (
            dist.group.WORLD if self.backend == "gloo" else dist.new_group(backend="gloo", timeout=self.limit)
        )
        assert isinstance(group, dist.ProcessGroup)
        return group

    @cached_property
    def nodes(self) -> list[int]:
        """The node of each rank, numbered in the order of ranks. Hosts differ by name or address."""
        numbers: dict[tuple[str, str], int] = {}
        return [
            numbers.setdefault((member["hostname"], member["address"]), len(numbers))
            for member in self.members
        ]

    @property
    def one_machine(self) -> bool:
        """All ranks share a kernel, and so a clock."""
        return len({member["machine"] for member in self.members}) == 1

    def membership(self, partition: GroupPartition) -> GroupMember | None:
        """This rank's place in its group; None where it is idle. Makes the groups the first time, so all ranks call it."""
        if partition.groups not in self._groups:
            mine = None
            for ranks in partition.groups:
                whole = len(ranks) == self.rank.world
                group = (
                    dist.group.WORLD
                    if whole
                    else dist.new_group(list(ranks), backend=self.backend, timeout=self.limit)
                )
                if self.rank.rank in ranks:
                    mine = group
            self._groups[partition.groups] = mine
        group = self._groups[partition.groups]
        if group is None:
            return None
        ranks = next(ranks for ranks in partition.groups if self.rank.rank in ranks)
        return GroupMember(
            group, ranks, ranks.index(self.rank.rank), self.device, communicator(group, self.device)
        )


def _describe_rank(rank: RankContext, device: torch.device) -> dict[str, Any]:
    memory = psutil.virtual_memory().total
    about = {
        "rank": rank.rank, "pid": os.getpid(), "hostname": platform.node(), "address": address_of(rank.master_addr),
        "machine": machine_id() or f"rank {rank.rank}", "local_rank": rank.local_rank, "kernel": platform.release(),
        "cores": os.cpu_count(), "host_memory_bytes": memory, "device": device.index or 0, "device_hex": "",
        "device_info": _processor(),
    }  # fmt: skip
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        bus = (getattr(facts, name, 0) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id"))
        about |= {
            "device_info": facts.name,
            "device_hex": "{:04x}:{:02x}:{:02x}".format(*bus),
            "device_memory_bytes": facts.total_memory,
        }
    return about


def address_of(master: str) -> str:
    """The address of this host in the network of the ranks: the one from which it reaches `master`.

    Namespaces and containers may share a host's name, and the first interface by name may be that of a bridge
    which only containers see. Nothing is sent.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))
        address = str(probe.getsockname()[0])
        if not address.startswith("127."):
            return address
    others = [
        address.address
        for name, addresses in sorted(psutil.net_if_addrs().items())
        for address in addresses
        if address.family.name == "AF_INET" and name != "lo" and not name.startswith(_VIRTUAL)
    ]
    return others[0] if others else "127.0.0.1"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            return next((row.split(":", 1)[1].strip() for row in file if row.startswith("model name")), "cpu")
    except OSError:
        return platform.processor() or "cpu"


def devices(members: Sequence[dict[str, Any]], groups: GroupPartition) -> list[dict[str, Any]]:
    """nccl-tests' `devices`: each rank with its group, process, host and device."""
    where = {rank: number for number, ranks in enumerate(groups.groups) for rank in ranks}
    names = ("rank", "pid", "hostname", "device", "device_hex", "device_info")
    return [
        {name: member[name] for name in names} | {"group": where.get(member["rank"], -1)}
        for member in members
    ]
