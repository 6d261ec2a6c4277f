"""When each call began and ended, on every rank.

On GPUs: events on the stream, whose times are each device's own. On CPUs, and where each call is waited for: the
host's clock, put on a common base by measured offsets, so that a call lasts from when the last rank entered it to
when the last rank left it. What nccl-tests times, many calls between two readings, is in `burst`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

Stamps = NDArray[np.int64]
"""[iterations, 2]: begin and end in ns."""
Call = Callable[[], object]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_EXCHANGES = 50


def machine_id() -> str:
    """The same for all processes that share a kernel, and so a monotonic clock; namespaces share it."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


class HostClock:
    """The monotonic clock of this host, shifted to that of rank 0.

    Args:
        offset_ns: from this host's clock to rank 0's.
        device: where it is a GPU, each call ends when the device has finished it.
    """

    comparable = True
    """Stamps of different ranks can be set against each other."""
    name = "host clock, corrected by measured offsets; from the last rank in to the last rank out"

    def __init__(self, offset_ns: int = 0, device: torch.device | None = None) -> None:
        self._offset = offset_ns
        self._device = device if device is not None and device.type == "cuda" else None

    def run(self, call: Call, count: int, before: Call | None) -> Stamps:
        """Run `call` `count` times, each after an untimed `before` where there is one."""
        now = time.perf_counter_ns
        if self._device is not None:
            call = _waited(call, self._device)
        enabled = gc.isenabled()
        gc.disable()
        try:
            if before is None:
                edges = [0] * (count + 1)
                edges[0] = now()
                for i in range(1, count + 1):
                    call()
                    edges[i] = now()
                stamps = np.array([edges[:-1], edges[1:]], dtype=np.int64).T
            else:
                pairs = np.zeros((count, 2), dtype=np.int64)
                for i in range(count):
                    before()
                    begun = now()
                    call()
                    pairs[i] = begun, now()
                stamps = pairs
        finally:
            if enabled:
                gc.enable()
        return stamps + self._offset


class EventClock:
    """Events on the current stream (HIP events under ROCm); times are of each device alone."""

    comparable = False
    name = "device events around each call; the slowest rank's duration"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def run(self, call: Call, count: int, before: Call | None) -> Stamps:
        """As `HostClock.run`; begins are 0."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * count)]
        for i in range(count):
            if before is not None:
                before()
            marks[2 * i].record()
            call()
            marks[2 * i + 1].record()
        torch.cuda.synchronize(self._device)
        spans = [marks[2 * i].elapsed_time(marks[2 * i + 1]) * 1e6 for i in range(count)]
        return _durations(spans)


Clock = HostClock | EventClock


def _waited(call: Call, device: torch.device) -> Call:
    """The call, and then a wait until the device has finished it."""

    def call_and_wait() -> None:
        call()
        torch.cuda.synchronize(device)

    return call_and_wait


def _durations(nanoseconds: list[float]) -> Stamps:
    ends = np.array(nanoseconds, dtype=np.int64)
    return np.stack([np.zeros_like(ends), ends], axis=1)


def make_clock(
    timer: Literal["auto", "host", "events", "graph"],
    device: torch.device,
    control: Callable[[], dist.ProcessGroup],
) -> Clock:
    """The configured clock of single calls; every rank must call this at the same point."""
    if timer == "host" or device.type == "cpu":
        return HostClock(host_offset(control()), device)
    return EventClock(device)


def host_offset(control: dist.ProcessGroup) -> int:
    """Nanoseconds to add to this host's clock to get rank 0's.

    Ranks on rank 0's machine share its clock. One rank of each other machine exchanges messages with rank 0, and the
    exchange that took least tells the offset best (Cristian's algorithm): half of its time bounds the error.
    """
    rank, world = dist.get_rank(control), dist.get_world_size(control)
    machines: list[str] = [""] * world
    dist.all_gather_object(machines, machine_id() or f"rank {rank}", group=control)
    offsets = torch.zeros(world, dtype=torch.int64)
    for leader in sorted({machines.index(machine) for machine in machines} - {0}):
        if rank == 0:
            _answer_samples(leader, control)
        elif rank == leader:
            offsets[leader] = _sample_offset(control)
    dist.all_reduce(offsets, group=control)
    return int(offsets[machines.index(machines[rank])])


def _sample_offset(control: dist.ProcessGroup) -> int:
    stamp, best, offset = torch.zeros(1, dtype=torch.int64), None, 0
    for _ in range(_EXCHANGES):
        begun = time.perf_counter_ns()
        dist.send(stamp, dst=0, group=control)
        dist.recv(stamp, src=0, group=control)
        took = time.perf_counter_ns() - begun
        if best is None or took < best:
            best, offset = took, int(stamp[0]) - (begun + took // 2)
    return offset


def _answer_samples(peer: int, control: dist.ProcessGroup) -> None:
    stamp = torch.zeros(1, dtype=torch.int64)
    for _ in range(_EXCHANGES):
        dist.recv(stamp, src=peer, group=control)
        stamp[0] = time.perf_counter_ns()
        dist.send(stamp, dst=peer, group=control)


def iteration_times(stamps: Stamps, comparable: bool) -> NDArray[np.float64]:
    """Microseconds of each iteration, the slowest rank counting, from stamps [ranks, iterations, 2].

    With comparable clocks: from when the last rank began to when the last one ended. Without: the longest of the
    ranks' own durations.
    """
    if comparable:
        spans = stamps[:, :, 1].max(axis=0) - stamps[:, :, 0].max(axis=0)
        return np.maximum(spans, 1) / 1e3
    return (stamps[:, :, 1] - stamps[:, :, 0]).max(axis=0) / 1e3
