"""Measure one device: matmul rates over shapes and copy bandwidth over sizes, as `configs.profile.DeviceProfile`.

The whole list is gone through several times, in another order each time: clocks and temperature drift, and so spread
over all shapes instead of favouring some. Operands are random normal numbers, since a device draws less power on
zeros and clocks higher, and rotate through more memory than the caches hold.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from collectives.device.kernels import Case, CopyKernel, copies, label, matmuls
from collectives.device.smi import describe, read_sensors
from collectives.ops.exact import TYPES
from collectives.store import metadata
from collectives.timing.clock import Call, EventClock, HostClock
from collectives.timing.statistics import Array, steady
from configs.errors import UserError
from configs.profile import CopyRate, DeviceProfile, MatmulRate
from configs.schema import RunConfig

ROUNDS = 15
_WINDOW = 5
"""Times between two looks at whether they are steady."""
_SAMPLE_US = 500.0
"""A time is the mean of as many calls as fill this, …"""
_SAMPLE_CALLS = 16
"""… and at most so many, whose launches fit under one load of `DeviceBench.enqueue_load`."""
_SPREAD = {"cuda": 512 << 20, "cpu": 64 << 20}
"""Bytes that operands rotate through; on GPUs twice the largest last-level cache there is (MI300X: 256 MiB)."""
_NOISE = (1 << 22) + 1
_MEMORY_SHARE = 0.8
_HEATING = (0.05, 5.0)
"""Share of the time, and seconds at most, under load before anything is timed."""


class DeviceBench:
    """Prepares and times one case after the other on a device."""

    def __init__(self, device: torch.device, seed: int, host_bytes: int) -> None:
        self.device = device
        self.grouped_name, self._grouped = grouped_kernel(device)
        self._gpu = device.type == "cuda"
        self._random = random.Random(seed)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._noise: dict[torch.dtype, Tensor] = {}
        self._host_bytes = host_bytes
        self._host: dict[bool, Tensor] = {}
        self._load = (self.random_normal(4096, 8192), self.random_normal(8192, 8192)) if self._gpu else None

    def enqueue_load(self) -> None:
        """About a millisecond of work for a GPU, queued.

        Before a timed batch it gives the host time to queue the batch, so that no launch is waited for, clears the
        caches, and holds the clocks at what they are in steady work.
        """
        if self._load:
            torch.mm(*self._load)

    def wait(self) -> None:
        """Until the device is done."""
        if self._gpu:
            torch.cuda.synchronize(self.device)

    def free_host_buffers(self) -> None:
        """Let go of the host's buffers: where the next ones lie is luck that the rounds share."""
        self._host.clear()
        gc.collect()

    def measure_case(self, case: Case, seconds: float) -> Array:
        """Times of one call, in microseconds, from about `seconds` of preparation, warm-up and measurement.

        Raises:
            RuntimeError, MemoryError: where the memory isn't to be had, or the device can't do it.
        """
        begun = time.monotonic()
        calls = itertools.cycle(self.calls(case))
        paged = isinstance(case, CopyKernel) and case.kind in ("host_to_device", "device_to_host")
        first = self._times(calls, 1, 2, paged)[-1]
        inner = int(min(max(_SAMPLE_US / first, 1), _SAMPLE_CALLS))
        warm = np.zeros(0)
        while (spent := time.monotonic() - begun) < seconds / 2:
            if spent > seconds / 4 and steady(warm, _WINDOW):
                break
            warm = np.concatenate([warm, self._times(calls, inner, _WINDOW, paged)])
        times = self._times(calls, inner, _WINDOW, paged)
        while time.monotonic() - begun < seconds:
            times = np.concatenate([times, self._times(calls, inner, _WINDOW, paged)])
        return times

    def _times(self, calls: itertools.cycle[Call], inner: int, count: int, paged: bool) -> Array:
        """`count` times in microseconds, each the mean of `inner` calls."""

        def batch() -> None:
            for _ in range(inner):
                next(calls)()

        def whole() -> None:
            batch()
            self.wait()

        if self._gpu and not paged:
            stamps = EventClock(self.device).run(batch, count, self.enqueue_load)
        else:  # the host takes part in a copy of pageable memory, so its clock times it
            stamps = HostClock().run(whole, count, self.wait)
        return (stamps[:, 1] - stamps[:, 0]) / 1e3 / inner

    def random_normal(
        self, *shape: int, dtype: torch.dtype = torch.bfloat16, pinned: bool | None = None
    ) -> Tensor:
        """Normal numbers on the device, or, where `pinned` is set, in host memory.

        Larger tensors repeat 4 Mi of them, from another point on each time.
        """
        if dtype not in self._noise:
            fresh = torch.randn(_NOISE, generator=self._generator, device=self.device)
            self._noise[dtype] = fresh.to(dtype)
        place = self.device if pinned is None else torch.device("cpu")
        out = torch.empty(shape, dtype=dtype, device=place, pin_memory=bool(pinned))
        source = self._noise[dtype][self._random.randrange(_NOISE // 2) :]
        for part in out.view(-1).split(len(source)):
            part.copy_(source[: len(part)])
        return out

    def calls(self, case: Case) -> list[Call]:
        """The case on as many sets of operands as outgrow the caches."""
        if isinstance(case, CopyKernel):
            return self._copies(case)
        dtype = TYPES[case.dtype]
        size = case.elements * dtype.itemsize
        self._refuse(size + case.m * case.n * dtype.itemsize)
        sets = math.ceil(_SPREAD[self.device.type] / size)
        left, right = case.operands
        x, w = self.random_normal(sets, *left, dtype=dtype), self.random_normal(sets, *right, dtype=dtype)
        if case.layout == "weights":
            x = x.mT
        elif case.layout == "forward":
            w = w.mT
        pairs = list(zip(x, w, strict=True))
        if case.experts == 1:
            return [partial(torch.mm, x, w) for x, w in pairs]
        if self._grouped is None:
            return [partial(_each_expert, list(zip(x.split(case.rows), w, strict=True))) for x, w in pairs]
        ends = torch.tensor(case.rows, device=self.device).cumsum(0).to(torch.int32)
        return [partial(self._grouped, x, w, offs=ends) for x, w in pairs]

    def _copies(self, case: CopyKernel) -> list[Call]:
        count = case.size // 4
        if case.kind == "device":
            self._refuse(2 * max(case.size, _SPREAD[self.device.type]))
            room = max(count, _SPREAD[self.device.type] // 4)
            source, target = (self.random_normal(room, dtype=torch.float) for _ in range(2))
        else:
            pinned = "pinned" in case.kind
            if pinned not in self._host:
                self._host[pinned] = self.random_normal(
                    self._host_bytes // 4, dtype=torch.float, pinned=pinned
                )
            host, here = self._host[pinned], self.random_normal(self._host_bytes // 4, dtype=torch.float)
            source, target = (host, here) if case.kind.endswith("to_device") else (here, host)
        return [
            partial(new.copy_, old, non_blocking=True)
            for new, old in zip(target.split(count), source.split(count), strict=True)
            if len(new) == count
        ]

    def _refuse(self, needed: int) -> None:
        """A CPU's allocation never fails: it kills a process later."""
        free = psutil.virtual_memory().available
        if not self._gpu and needed > free * _MEMORY_SHARE:
            raise MemoryError(f"out of memory: {needed / 2**30:.3g} GiB needed, {free / 2**30:.3g} GiB free")


def grouped_kernel(device: torch.device) -> tuple[str, Callable[..., Tensor] | None]:
    """torch's grouped matmul, where this build and the device have it: its name, and the function."""
    x, w = torch.zeros(16, 64, dtype=torch.bfloat16), torch.zeros(2, 64, 64, dtype=torch.bfloat16)
    for name, home in (("torch.nn.functional.grouped_mm", F), ("torch._grouped_mm", torch)):
        kernel = getattr(home, name.rpartition(".")[2], None)
        if kernel is not None:
            try:
                ends = torch.tensor([4, 16], dtype=torch.int32, device=device)
                kernel(x.to(device), w.to(device).mT, offs=ends)
                return name, kernel
            except RuntimeError:
                continue  # built in, but not for this device
    return "one torch.mm for each expert: this torch has no grouped matmul for the device", None


def _each_expert(parts: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [torch.mm(x, w) for x, w in parts]


@dataclass
class _Record:
    """What is measured so far."""

    times: dict[Case, list[Array]]
    """By case, an array for each round."""
    left_out: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    stopped: str = ""
    """Why before the end, where it was."""

    def rates(self) -> list[MatmulRate | CopyRate]:
        """Results: the median over the rounds of each one's median."""
        rates = []
        for case, rounds in self.times.items():
            if rounds:
                times, middle = np.concatenate(rounds), np.median([np.median(one) for one in rounds])
                rates.append(case.rate(float(middle), float(times.std() / times.mean())))
        return rates


def measure(
    config: RunConfig, device: torch.device, seconds: float, progress: Callable[[str], None]
) -> DeviceProfile:
    """Measure `device` for about `seconds`, reported to `progress` in a line for each case.

    A case that doesn't fit the memory, or that the device can't do, is left out, and why is in the conditions. An
    interrupt ends the measurement; what is measured by then is returned.

    Returns:
        The profile, named as the configuration is, or as its hardware.

    Raises:
        UserError: where there is no time.
        KeyboardInterrupt, RuntimeError: where nothing was measured before it.
    """
    if not 0 < seconds < math.inf:
        raise UserError(f"--seconds={seconds:g} must be above 0; type e.g. --seconds 150")
    begun, started, gpu = time.monotonic(), metadata.utc(), device.type == "cuda"
    host_free = psutil.virtual_memory().available
    moved = copies(gpu, torch.cuda.mem_get_info(device)[0] if gpu else host_free, host_free)
    cases: list[Case] = [*matmuls(gpu), *moved]
    largest = max((one.size for one in moved if one.kind != "device"), default=0)
    bench = DeviceBench(device, config.collectives.seed, largest)
    record, smi = _Record({case: [] for case in cases}), {}
    progress("warming up")
    try:
        smi["before"] = _warm_up_device(bench, seconds)
        _rounds(bench, record, begun + seconds, config.collectives.seed, progress)
        if not any(record.times.values()):
            raise RuntimeError(f"nothing could be measured: {next(iter(record.left_out.values()))}")
        smi["after"] = read_sensors(device, bench.enqueue_load, bench.wait)
    except (KeyboardInterrupt, RuntimeError) as error:
        if not any(record.times.values()):
            raise
        record.stopped = str(error).partition("\n")[0] or "interrupted"
        progress(f"stopped: {record.stopped}; what is measured so far is kept")
    rates = record.rates()
    return DeviceProfile(
        name=config.name or config.hardware.name,
        hardware=config.hardware.name,
        conditions=describe(device)
        | {"started": started, "seconds": round(time.monotonic() - begun, 1), "under_load": smi}
        | _method(bench, record),
        matmuls=tuple(rate for rate in rates if isinstance(rate, MatmulRate)),
        copies=tuple(rate for rate in rates if isinstance(rate, CopyRate)),
    )


def _method(bench: DeviceBench, record: _Record) -> dict[str, Any]:
    samples = [len(one) for rounds in record.times.values() for one in rounds]
    gpu = bench.device.type == "cuda"
    return {
        "rounds": record.rounds,
        "stopped": record.stopped,
        "left_out": record.left_out,
        "samples": f"{min(samples)} to {max(samples)} in a round, each the mean of up to {_SAMPLE_CALLS} calls in a row",
        "statistic": "median over the rounds, each in another order, of the medians of their samples",
        "timer": "device events; host clock for pageable memory" if gpu else "host clock",
        "data": "random normal",
        "operands": f"rotated through {_SPREAD[bench.device.type] >> 20} MiB",
        "layout": "row-major: forward [m, k] and [n, k]; inputs [m, k] and [k, n]; weights [k, m] and [k, n]",
        "float_precision": torch.get_float32_matmul_precision(),
        "grouped_matmul": bench.grouped_name,
    }


def _rounds(
    bench: DeviceBench, record: _Record, deadline: float, seed: int, progress: Callable[[str], None]
) -> None:
    for number in range(ROUNDS):
        bench.free_host_buffers()
        order = [case for case in record.times if label(case) not in record.left_out]
        random.Random(seed + number).shuffle(order)
        for place, case in enumerate(order):
            visits = len(order) * (ROUNDS - number) - place
            try:
                times = bench.measure_case(case, (deadline - time.monotonic()) / visits)
                record.times[case].append(times)
                note = f"{np.median(times):.1f} us"
            except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors are RuntimeErrors
                after = f"after {len(record.times[case])} rounds: " if record.times[case] else ""
                note = record.left_out[label(case)] = after + str(error).partition("\n")[0]
            if label(case) in record.left_out:  # after the error let go of the operands
                _free(bench)
            progress(f"round {number + 1} of {ROUNDS}, {place + 1} of {len(order)}: {label(case)}: {note}")
        record.rounds += 1


def _free(bench: DeviceBench) -> None:
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def _warm_up_device(bench: DeviceBench, seconds: float) -> dict[str, Any]:
    """Bring a GPU to the temperature and clocks of steady work; what its tool then says."""
    share, most = _HEATING
    until = time.monotonic() + min(share * seconds, most)
    while bench.device.type == "cuda" and time.monotonic() < until:
        bench.enqueue_load()
        bench.wait()
    return read_sensors(bench.device, bench.enqueue_load, bench.wait)
