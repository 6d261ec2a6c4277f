"""The ranks of a gang as they meet: device, process groups, and the few things that they tell each other."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from collectives.ops.groups import Partition
from collectives.ops.transfers import Seat
from collectives.timing.clock import Stamps, machine_id
from configs.errors import UserError
from configs.library_environment import Applied, environment
from configs.rank import RankContext, threads
from configs.schema import RunConfig


class FabricLost(RuntimeError):
    """Ranks stayed away, one died or the network failed in the middle; what is done is kept."""


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
        found = "ROCm" if is_rocm else "CUDA"
        raise UserError(
            f"hardware={config.hardware.name} is a {config.hardware.kind} device, but this torch is built for "
            f"{found}; choose another hardware preset"
        )
    if rank.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {rank.rank} is number {rank.local_rank} of this node, which has {torch.cuda.device_count()} devices; "
            f"start at most {torch.cuda.device_count()} ranks on it"
        )
    device = torch.device("cuda", rank.local_rank)
    torch.cuda.set_device(device)
    return device


def meet(config: RunConfig, rank: RankContext, backend: str) -> Applied:
    """Set the network preset's variables and join the process group over which everything goes.

    Returns:
        What became of the preset's variables.

    Raises:
        FabricLost: where the ranks didn't all come in time.
    """
    timeouts = config.resilience.timeouts
    kind = config.hardware.kind
    version = tuple(torch.cuda.nccl.version()) if kind != "cpu" and dist.is_nccl_available() else None
    applied = environment(config.network, kind, version, os.environ)
    os.environ.update(rank.environment() | applied.set)
    meeting = timedelta(seconds=timeouts.seconds("rendezvous"))
    try:
        store, _, _ = next(dist.rendezvous("env://", rank.rank, rank.world, timeout=meeting))
    except dist.DistError as error:
        raise FabricLost(
            f"rank {rank.rank} of {rank.world} waited {meeting.total_seconds():.0f} s for the others at "
            f"{rank.master_addr}:{rank.master_port} ({str(error).splitlines()[0]}); start all ranks with the same address, "
            "or raise resilience.timeouts.rendezvous"
        ) from error
    collective = timedelta(seconds=timeouts.seconds("collective"))
    dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.world, timeout=collective)
    return applied


def choose_backend(config: RunConfig, device: torch.device) -> str:
    """The library under `torch.distributed`: as asked, or by device.

    Raises:
        UserError: where torch isn't built with it, or it can't reach the device.
    """
    asked = config.collectives.backend
    name = ("gloo" if device.type == "cpu" else "nccl") if asked == "auto" else asked
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
    control: dist.ProcessGroup
    """All ranks over gloo: for decisions, times and texts."""
    members: list[dict[str, Any]]
    """What each rank says of itself: host, pid, machine, device."""
    network: Applied
    """What became of the network preset's variables on this rank."""
    _groups: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = field(default_factory=dict)

    @classmethod
    def meet(cls, config: RunConfig, rank: RankContext) -> Team:
        """Meet the other ranks.

        Raises:
            UserError: for a single rank, or a backend that isn't there.
            FabricLost: where ranks stay away.
        """
        if rank.world < 2:
            raise UserError(
                "one rank has nobody to talk to; start at least two: `python -m collectives run --ranks 2`, "
                "torchrun --nproc-per-node 2, or parallel.dp=2 with `submit`"
            )
        device = choose_device(config, rank)
        torch.set_num_threads(threads(os.environ))
        backend = choose_backend(config, device)
        applied = meet(config, rank, backend)
        limit = timedelta(seconds=config.resilience.timeouts.seconds("collective"))
        control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=limit)
        assert control is not None
        members: list[dict[str, Any]] = [{}] * rank.world
        dist.all_gather_object(members, _self(rank, device), group=control)
        return cls(rank, device, backend, control, members, applied)

    @property
    def nodes(self) -> list[int]:
        """The node of each rank, numbered in the order of ranks. Hosts differ by name or address."""
        names = [(member["hostname"], member["address"]) for member in self.members]
        return [sorted(set(names), key=names.index).index(name) for name in names]

    @property
    def one_machine(self) -> bool:
        """All ranks share a kernel, and so a clock."""
        return len({member["machine"] for member in self.members}) == 1

    def seat(self, partition: Partition) -> Seat | None:
        """This rank's place in its group; None where it is idle. Makes the groups the first time."""
        if partition.groups not in self._groups:
            mine = None
            for ranks in partition.groups:
                whole = len(ranks) == self.rank.world
                group = dist.group.WORLD if whole else dist.new_group(list(ranks), backend=self.backend)
                if self.rank.rank in ranks:
                    mine = group
            self._groups[partition.groups] = mine
        group = self._groups[partition.groups]
        if group is None:
            return None
        ranks = next(ranks for ranks in partition.groups if self.rank.rank in ranks)
        return Seat(group, ranks, ranks.index(self.rank.rank), self.device)

    def gather(self, stamps: Stamps) -> Stamps | None:
        """All ranks' stamps [ranks, iterations, 2] on rank 0."""
        mine = torch.from_numpy(stamps).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.rank.world)] if self.rank.rank == 0 else None
        dist.gather(mine, parts, 0, group=self.control)
        return torch.stack(parts).numpy() if parts is not None else None

    def decide(self, number: int) -> int:
        """Rank 0's number, on all ranks."""
        box = torch.tensor([number], dtype=torch.int64)
        dist.broadcast(box, 0, group=self.control)
        return int(box)

    def total(self, number: int) -> int:
        """The sum of all ranks' numbers, on all ranks."""
        box = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(box, group=self.control)
        return int(box)

    def tell(self, item: Any) -> Any:
        """Rank 0's item, on all ranks."""
        box = [item]
        dist.broadcast_object_list(box, 0, group=self.control)
        return box[0]

    def share(self, item: Any) -> list[Any]:
        """Every rank's item, in rank order, on all ranks."""
        items: list[Any] = [None] * self.rank.world
        dist.all_gather_object(items, item, group=self.control)
        return items

    def wait(self) -> None:
        """Until all ranks are here."""
        dist.barrier(group=self.control)


def _self(rank: RankContext, device: torch.device) -> dict[str, Any]:
    memory = psutil.virtual_memory().total
    about = {
        "rank": rank.rank, "pid": os.getpid(), "hostname": platform.node(), "address": _address(),
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


def _address() -> str:
    """The address of this host's network: namespaces and containers may share a name."""
    found = [
        address.address
        for name, addresses in sorted(psutil.net_if_addrs().items())
        for address in addresses
        if address.family.name == "AF_INET" and name != "lo"
    ]
    return found[0] if found else "127.0.0.1"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            return next((row.split(":", 1)[1].strip() for row in file if row.startswith("model name")), "cpu")
    except OSError:
        return platform.processor() or "cpu"


def devices(members: Sequence[dict[str, Any]], groups: Partition) -> list[dict[str, Any]]:
    """nccl-tests' `devices`: each rank with its group, process, host and device."""
    where = {rank: number for number, ranks in enumerate(groups.groups) for rank in ranks}
    names = ("rank", "pid", "hostname", "device", "device_hex", "device_info")
    return [
        {name: member[name] for name in names} | {"group": where.get(member["rank"], -1)}
        for member in members
    ]
