"""Where a step's time on the device goes: kernels by name, what they belong to, and how much of the step nothing runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

PARTS = (
    ("communication", r"nccl|rccl|AllGather|ReduceScatter|AllReduce|SendRecv"),
    ("attention", r"sdpa|flash|fmha|attention"),
    ("experts' matmuls", r"cutlass.*(Group|group)|_grouped|GroupProblem|ck_grouped"),
    ("matmuls", r"nvjet|gemm|cutlass|cublas|Cijk|splitK|gemv"),
    ("optimizer and norm", r"^_move|^_squared|adam|multi_tensor|foreach|lerp"),
    (
        "norms, rotation, activation",
        r"^_norm|^_turn|^_sum|^_pairs|^_values|^_enter|^_bend|^_forward$|^_backward$|silu|gelu|norm|Norm",
    ),
    ("rows to experts and back", r"^_spread|^_collect|^_weighted_back|gather|index|scatter|[sS]ort|Radix"),
    ("loss", r"^_entropy|[sS]oft[mM]ax|nll_loss"),
    ("copies", r"copy|Memcpy|cat|fill|Memset|chunk"),
)
"""Name of a part, and what its kernels' names contain; the first that fits."""


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a step."""

    name: str
    part: str
    count: int
    milliseconds: float


@dataclass(frozen=True)
class Profile:
    """One step on the device."""

    kernels: list[Kernel]
    span: float
    """Milliseconds from the first kernel's start to the last one's end."""
    idle: float
    """Milliseconds of it in which nothing ran."""
    exposed: float
    """Milliseconds of it in which communication alone ran."""

    @property
    def computing(self) -> float:
        """Milliseconds of it in which something else than communication ran."""
        return self.span - self.idle - self.exposed

    def uncovered(self, step: float) -> float:
        """Milliseconds of a timed step of `step` in which at most communication ran: a bound that recording doesn't move,
        since it makes steps longer by what lies between kernels, and kernels themselves hardly."""
        return max(0.0, step - self.computing)

    def parts(self) -> dict[str, float]:
        """Milliseconds by part, the largest first."""
        milliseconds: dict[str, float] = {}
        for kernel in self.kernels:
            milliseconds[kernel.part] = milliseconds.get(kernel.part, 0.0) + kernel.milliseconds
        return dict(sorted(milliseconds.items(), key=lambda pair: -pair[1]))


def part_of(name: str) -> str:
    """The part that a kernel belongs to."""
    return next((part for part, pattern in PARTS if re.search(pattern, name)), "elementwise")


def profile(step: Callable[[], object], trace: Path | None, together: Callable[[], object]) -> Profile:
    """Record one step on a GPU; `trace` gets its timeline, for chrome://tracing or Perfetto.

    The device alone is recorded: what the host does takes longer where it is recorded too, and the device waits for it.

    Args:
        together: has the ranks wait for each other, so that none waits on its device for another that records already.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    step()
    torch.cuda.synchronize()
    with recorded(activities=[ProfilerActivity.CUDA]) as recording:
        together()
        step()
        torch.cuda.synchronize()
    if trace is not None:
        recording.export_chrome_trace(str(trace))
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in recording.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("nccl:", "FSDP::"))
    ]
    return of_spans(spans)


def of_spans(spans: Sequence[tuple[str, float, float]]) -> Profile:
    """A profile from names, starts and ends in microseconds."""
    counted: dict[str, tuple[int, float]] = {}
    for name, start, end in spans:
        count, total = counted.get(name, (0, 0.0))
        counted[name] = count + 1, total + (end - start) / 1e3
    kernels = [Kernel(name, part_of(name), count, total) for name, (count, total) in counted.items()]
    kernels.sort(key=lambda kernel: -kernel.milliseconds)
    if not spans:
        return Profile([], 0.0, 0.0, 0.0)
    busy = _union((start, end) for _, start, end in spans)
    working = _union((start, end) for name, start, end in spans if part_of(name) != "communication")
    span = (max(end for *_, end in spans) - min(start for _, start, _ in spans)) / 1e3
    return Profile(kernels, span, span - busy / 1e3, (busy - working) / 1e3)


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what the spans cover."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


def lines(profiled: Profile, most: int = 24) -> list[str]:
    """The table as a person reads it."""
    text = [
        f"one step on the device: {profiled.span:.1f} ms, nothing ran for {profiled.idle:.1f} ms, communication alone for "
        f"{profiled.exposed:.1f} ms"
    ]
    text += [f"  {part:28}{milliseconds:9.2f} ms" for part, milliseconds in profiled.parts().items()]
    text.append("kernels that take longest:")
    text += [
        f"  {kernel.milliseconds:8.2f} ms {kernel.count:5}x  {kernel.part:26}{_short(kernel.name)}"
        for kernel in profiled.kernels[:most]
    ]
    return text


def _short(name: str) -> str:
    name = re.sub(r"void |at::native::|\(anonymous namespace\)::|<.*", "", name)
    return name[:70]
