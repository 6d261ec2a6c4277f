"""What the GPU checks share: the device, its clock, the results so far, the time left. torch and stdlib alone."""

from __future__ import annotations

import gc
import itertools
import json
import platform
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARES = {"matmuls": 0.27, "operators": 0.08, "models": 0.33, "pairs": 0.32}
"""Of the time, by part; what one leaves, the next may use."""
_NOISE = (1 << 22) + 1


class DeviceClock:
    """Times work on the device, or on a CPU by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Seconds; both events must have passed."""
        return begin.elapsed_time(end) / 1e3 if self.gpu else end - begin


class GpuBench:
    """The device, its clock, the results so far and the time that is left."""

    def __init__(self, cases: dict[str, Any], out: Path, seconds: float, dry: bool) -> None:
        self.cases, self.out, self.dry = cases, out, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.clock = DeviceClock(self.device)
        self.begun = time.monotonic()
        self.end = self.begun + seconds
        self.until = self.end
        self.results: dict[str, Any] = {part: {} for part in SHARES} | {
            "errors": {},
            "machine": self.machine(),
        }
        self.random = random.Random(0)
        self._noise: dict[torch.dtype, Tensor] = {}
        self._load = None if dry else (self.noise(4096, 8192), self.noise(8192, 8192))

    def machine(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "dry": self.dry,
        }
        if not self.dry:
            facts = torch.cuda.get_device_properties(0)
            found |= {
                "device": facts.name,
                "units": facts.multi_processor_count,
                "memory": facts.total_memory,
            }
            found["smi"] = smi()
        return found

    def save(self) -> None:
        self.results["seconds"] = round(time.monotonic() - self.begun, 1)
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results))
        temporary.replace(self.out)

    def late(self) -> bool:
        return time.monotonic() > self.until

    def noise(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal numbers; large tensors repeat 4 Mi of them from another point on each time."""
        if dtype not in self._noise:
            self._noise[dtype] = torch.randn(_NOISE, device=self.device).to(dtype)
        out = torch.empty(shape, dtype=dtype, device=self.device)
        source = self._noise[dtype][self.random.randrange(_NOISE // 2) :]
        for part in out.view(-1).split(len(source)):
            part.copy_(source[: len(part)])
        return out

    def load(self) -> None:
        """About a millisecond of work, under which the host queues what is timed, and the clocks stay."""
        if self._load:
            torch.mm(*self._load)

    def times(self, calls: Iterator[Callable[[], Any]], inner: int, count: int) -> list[float]:
        """Seconds of one call, `count` times the mean of `inner`."""
        marks = []
        for _ in range(count):
            self.load()
            begin = self.clock.mark()
            for _ in range(inner):
                next(calls)()
            marks.append((begin, self.clock.mark()))
        self.clock.wait()
        return [self.clock.between(*pair) / inner for pair in marks]

    def timed(self, functions: list[Callable[[], Any]], count: int = 5) -> list[float]:
        """Seconds of one call, warm."""
        calls = itertools.cycle(functions)
        first = self.times(calls, 1, 2)[-1]
        inner = int(min(max(5e-4 / max(first, 1e-7), 1), 16))
        return self.times(calls, inner, count + 1)[1:]

    def guarded(self, part: str, name: str, work: Callable[[], Any]) -> bool:
        """Do one case; an error is kept by its name and ends nothing. False: it failed."""
        try:
            found = work()
            if found is not None:
                self.results[part][name] = found
            return True
        except Exception as error:
            self.results["errors"][f"{part}/{name}"] = f"{type(error).__name__}: {str(error)[:400]}"
            print(f"{part}/{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            return False
        finally:
            self.free()

    def free(self) -> None:
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()


def smi() -> str:
    """Clocks, power and temperature, or why there are none."""
    query = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )  # fmt: skip
        return done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
