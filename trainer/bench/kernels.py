"""Where a step's time on the device goes: kernels by name, what they belong to, and how much of the step nothing runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

PARTS = (
    ("communication", r"nccl|rccl|AllGather|ReduceScatter|AllReduce|SendRecv"),
    ("attention", r"sdpa|flash|fmha|attention"),
    ("experts' matmuls", r"cutlass.*(Group|group)|_grouped|GroupProblem|ck_grouped"),
    ("matmuls", r"nvjet|gemm|cutlass|cublas|Cijk|splitK|gemv"),
    ("optimizer and norm", r"^_adamw|^_squared_norm|^_add_gradients|adam|multi_tensor|foreach|lerp"),
    ("router", r"^_route|^_plan_loans"),
    ("norms, rotation, activation", r"^_norm|^_scaled_sum|^_cca|^_swiglu|silu|gelu|norm|Norm"),
    (
        "rows to experts and back",
        r"^_dispatch|^_combine|^_weighted_back|_pairs$|^_regroup_rows|gather|index|scatter|[sS]ort|Radix",
    ),
    ("loss", r"^_entropy|^_scale_rows|[sS]oft[mM]ax|nll_loss"),
    ("copies", r"copy|Memcpy|cat|fill|Memset|chunk"),
)
"""Name of a part, and what its kernels' names contain; the first that fits."""


Span = tuple[str, float, float]
"""Name of a kernel or copy, its start and its end in microseconds."""
RankTimes = tuple[list[float], list[float]]
"""Microseconds of a rank's collectives, and of its messages."""


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
    waiting: float | None = None
    """Milliseconds of `exposed` in which this rank waited for others; None where that isn't known."""

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


def profile(
    step: Callable[[], object],
    trace: Path | None,
    together: Callable[[], object],
    of_all: Callable[[RankTimes], list[RankTimes]],
) -> Profile:
    """Record one step on a GPU; `trace` gets its timeline, for chrome://tracing or Perfetto.

    The device alone is recorded: what the host does takes longer where it is recorded too, and the device waits for it.

    Args:
        together: has the ranks wait for each other, so that none waits on its device for another that records already.
        of_all: what each rank gives it, by rank.
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
    collectives, messages = ([end - start for _, start, end in part] for part in calls(spans))
    return replace(of_spans(spans), waiting=waiting(spans, of_all((collectives, messages))))


def calls(spans: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """Kernels of collectives and of messages between two ranks, each in the order of their starts."""
    ours = sorted((one for one in spans if part_of(one[0]) == "communication"), key=lambda one: one[1:])
    return [one for one in ours if "SendRecv" not in one[0]], [one for one in ours if "SendRecv" in one[0]]


def waiting(spans: Sequence[Span], of_all: Sequence[RankTimes]) -> float | None:
    """Milliseconds of a rank's exposed communication that went to waiting for ranks which came later.

    The last rank to come waits for nobody: what a kernel took where it was shortest is what moving the data takes, and what
    it takes longer elsewhere lies before that. Where ranks send other numbers of messages, as those that lend experts do,
    a message is all moving.

    Args:
        of_all: by rank. Where ranks have other numbers of collectives nobody knows which belong together: None.
    """
    collectives, messages = calls(spans)
    moving = _moving(collectives, [theirs for theirs, _ in of_all])
    if moving is None:
        return None
    sent = _moving(messages, [theirs for _, theirs in of_all])
    moving += [(start, end) for _, start, end in messages] if sent is None else sent
    others = [(start, end) for name, start, end in spans if part_of(name) != "communication"]
    return (_union((start, end) for _, start, end in spans) - _union([*others, *moving])) / 1e3


def _moving(mine: Sequence[Span], by_rank: Sequence[Sequence[float]]) -> list[tuple[float, float]] | None:
    """When a rank's kernels moved data, None where others have another number of them."""
    if any(len(theirs) != len(mine) for theirs in by_rank):
        return None
    shortest = [min(same) for same in zip(*by_rank, strict=True)]
    return [(end - least, end) for (_, _, end), least in zip(mine, shortest, strict=True)]


def of_spans(spans: Sequence[Span]) -> Profile:
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
        f"one step on the device: {profiled.span:.1f} ms, idle for {profiled.idle:.1f} ms, exposed communication "
        f"{profiled.exposed:.1f} ms{of_waiting(profiled)}"
    ]
    text += [f"  {part:28}{milliseconds:9.2f} ms" for part, milliseconds in profiled.parts().items()]
    text.append("kernels that take longest:")
    text += [
        f"  {kernel.milliseconds:8.2f} ms {kernel.count:5}x  {kernel.part:28}{_short(kernel.name)}"
        for kernel in profiled.kernels[:most]
    ]
    return text


def of_waiting(profiled: Profile) -> str:
    """How much of the exposed communication was waiting, where there was any and it is known."""
    if not profiled.waiting or profiled.waiting < 0.05:
        return ""
    return f", {profiled.waiting:.1f} of them waiting for stragglers"


def _short(name: str) -> str:
    name = re.sub(r"void |at::native::|\(anonymous namespace\)::|<.*", "", name)
    return name[:70]
