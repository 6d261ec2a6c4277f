"""Times a step and the parts of it, by the device's events; on a CPU by the host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

PartTimer = Callable[[str], Any]
"""A context that times what is inside under a name."""


@dataclass
class Times:
    """Milliseconds of the timed steps."""

    step: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    memory: int = 0
    """Bytes at the peak; 0 where it isn't known."""

    @property
    def median(self) -> float:
        """Of the steps."""
        return statistics.median(self.step)

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of the steps."""
        low, _, high = statistics.quantiles(self.step, n=4) if len(self.step) > 1 else [self.step[0]] * 3
        return low, high

    def part(self, *names: str) -> float:
        """Median of the sum of parts."""
        return sum(statistics.median(self.parts[name]) for name in names if name in self.parts)


class Stopwatch:
    """Times the parts of a step without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        begin = self._now()
        yield
        self._marks.append((name, begin, self._now()))

    def pop_times(self) -> list[tuple[str, float]]:
        """Names and milliseconds since the last call; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        marks, self._marks = self._marks, []
        return [
            (name, begin.elapsed_time(end) if self._cuda else (end - begin) * 1e3)
            for name, begin, end in marks
        ]


def time_steps(step: Callable[[PartTimer], object], device: torch.device, steps: int, warm: int = 3) -> Times:
    """Run a step a few times, then `steps` times under the clock, one after the other without a pause between."""
    watch, times = Stopwatch(device), Times()
    for _ in range(warm):
        step(watch)
    watch.pop_times()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(steps):
        with watch("step"):
            step(watch)
        if device.type != "cuda":
            taken.append(watch.pop_times())
    if device.type == "cuda":
        every_mark = watch.pop_times()
        times.memory = torch.cuda.max_memory_allocated()
        one: list[tuple[str, float]] = []
        for name, milliseconds in every_mark:
            one.append((name, milliseconds))
            if name == "step":
                taken.append(one)
                one = []
    for marks in taken:
        sums: dict[str, float] = {}
        for name, milliseconds in marks:
            sums[name] = sums.get(name, 0.0) + milliseconds
        times.step.append(sums.pop("step"))
        for name, milliseconds in sums.items():
            times.parts.setdefault(name, []).append(milliseconds)
    return times
