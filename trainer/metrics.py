"""Metrics of a step: time by phase, balance of the experts, memory."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from faulttol.recorder import RankPhase, Recorder

PHASES = ("data", "forward", "backward", "optimizer", "checkpoint")
_BY_NAME = {name: RankPhase[name.upper()] for name in PHASES}


class PhaseClock:
    """Times phases and records them. On a GPU by events, which are read once per metric line, never waited for."""

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        self._recorder = recorder
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.step = 0
        """Step that the next records belong to, from 1; 0 before the first."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record and time what is done inside."""
        which = _BY_NAME[name]
        self._recorder.begin(which, self.step)
        begin = self._timestamp()
        try:
            yield
        finally:
            end = self._timestamp()
            self._recorder.end(which, self.step)
            if self._cuda:
                self._events.append((name, begin, end))
            else:
                self._seconds[name] += end - begin

    def _timestamp(self) -> Any:
        """An event on a GPU, else seconds; both ends of a phase are of one kind."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def pop_seconds(self) -> list[float]:
        """Seconds by phase, in the order of `PHASES`, since the last call."""
        if self._events:
            torch.cuda.synchronize()
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1e3
            self._events.clear()
        seconds = [self._seconds[name] for name in PHASES]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return seconds


def balance_entropy(load: Sequence[Sequence[int]]) -> float:
    """Entropy of each layer's load over log(experts), averaged over the layers; 1 is even, 0 one expert."""
    values = []
    for layer in load:
        total = sum(layer)
        if total and len(layer) > 1:
            shares = [count / total for count in layer if count]
            values.append(-sum(s * math.log(s) for s in shares) / math.log(len(layer)))
    return sum(values) / len(values) if values else 1.0


def memory_bytes(device: torch.device) -> int:
    """Peak so far: of device memory on a GPU, of this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
