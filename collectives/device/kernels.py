"""Which kernels are measured on one device, and how far two profiles of it agree. Pure: no torch.

The shapes follow rules, so that every device gets the same ones: widths of dense and mixture-of-experts models, and
sizes off the powers of two, which show where tiles and waves of them are left part empty.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from collectives.timing.statistics import percentile
from configs.errors import UserError
from configs.profile import CopyRate, DeviceProfile, MatmulRate, Operands

CopyKind = Literal["device", "host_to_device", "device_to_host", "pinned_to_device", "device_to_pinned"]

_TOKENS = (256, 1024, 2048, 4096, 8192, 16384)
_WIDTHS = (2048, 4096, 8192)
_LAYERS = ((6144, 4096), (28672, 4096), (4096, 14336), (2112, 7168), (7168, 2048), (50304, 2048))
"""[n, k] of layers: grouped-query and latent attention, gated MLPs up and down, a vocabulary."""
_OFF_SIZE = (
    (2049, 2048), (2048, 2049), (2560, 2560), (2880, 2880), (3000, 3000), (3584, 3584), (4096, 4104), (4160, 4096),
    (4096, 4160), (5000, 5000), (5120, 5120),
)  # fmt: skip
"""[n, k] that 64, 128 or 256 don't divide, or whose tiles don't fill a wave."""
_DEEP = ((512, 8192), (768, 12288), (1024, 16384))
"""[n, k] with few tiles and a long inner width, which libraries split between units, or don't."""
_DEEP_TOKENS = (512, 1024, 2048)
_ROWS = (320, 384, 640, 1000, 1536, 1920, 2112, 3000, 3072, 5000, 6144, 10000, 12288)
"""Rows between the powers of two, for the steps from wave to wave."""
_UNEVEN = (1, 2, 4, 8, 16, 32)
"""Elements by which a width is off a multiple of 4096: where copies of 16 bytes end to be possible."""
_LAYOUTS = (
    (2048, 4096), (4096, 2048), (1024, 1024), (8192, 2048), (2730, 1024), (1024, 2730), (2049, 2048),
)  # fmt: skip
"""[n, k] of layers whose gradients are measured too: a width that is off aligns other operands in each pass."""
_LAYOUT_TOKENS = (1024, 8192)
_EXPERTS = (4, 8, 16, 32, 64)
_EXPERT_LAYERS = ((2048, 2048), (2048, 1024), (1536, 2048), (4096, 7168), (7168, 2048))
"""[n, k] of experts: gate and up as one, or down."""
_EXPERT_ROWS = (4096, 32768)
_EXPERT_GRADIENTS = ((8, 16384, 1024, 4096), (64, 49152, 2048, 1024))
"""(experts, m, n, k) of gradients of the experts' inputs."""
_SKEWS = (0.0, 0.5)
"""Zipf exponents of the experts' load: even, and as uneven as a router without a balancing loss."""

_UNITS = ((30, "GiB"), (20, "MiB"), (10, "KiB"), (0, "B"))


@dataclass(frozen=True)
class MatmulKernel:
    """[m, k] times [k, n], or times one [k, n] for each expert: one pass of a linear layer."""

    m: int
    n: int
    k: int
    dtype: str = "bfloat16"
    experts: int = 1
    skew: float = 0.0
    """Zipf exponent of the experts' rows; 0 is even."""
    layout: Operands = "forward"

    def __post_init__(self) -> None:
        # Where the experts' rows aren't multiples of 8, torch 2.11 ends the process from within the device.
        if self.experts > 1 and self.layout == "weights":
            raise ValueError("the gradient of grouped weights isn't measured")

    @property
    def operands(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Both operands' shapes as they are stored; what isn't stored as it is multiplied gets transposed."""
        stack = (self.experts,) if self.experts > 1 else ()
        left = (self.k, self.m) if self.layout == "weights" else (self.m, self.k)
        return left, (*stack, self.n, self.k) if self.layout == "forward" else (*stack, self.k, self.n)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Rows of each expert, in no order of size; they add up to m."""
        weights = [(i + 1) ** -self.skew for i in range(self.experts)]
        edges = [round(self.m * sum(weights[:i]) / sum(weights)) for i in range(self.experts + 1)]
        rows = [after - before for before, after in zip(edges, edges[1:], strict=False)]
        random.Random(self.experts).shuffle(rows)
        return tuple(rows)

    @property
    def imbalance(self) -> float:
        """Rows of the fullest expert over the mean."""
        return round(max(self.rows) * self.experts / self.m, 3)

    @property
    def flops(self) -> int:
        """Operations of one call; every row meets one expert."""
        return 2 * self.m * self.n * self.k

    @property
    def elements(self) -> int:
        """Of both operands together."""
        return self.k * (self.m + self.n * self.experts)

    def rate(self, time_us: float, cv: float) -> MatmulRate:
        """The result."""
        return MatmulRate(
            m=self.m, n=self.n, k=self.k, experts=self.experts, imbalance=self.imbalance, dtype=self.dtype,
            layout=self.layout, time_us=_short(time_us), tflops=_short(self.flops / time_us / 1e6), cv=_short(cv),
        )  # fmt: skip


@dataclass(frozen=True)
class CopyKernel:
    """A copy of `size` bytes."""

    kind: CopyKind
    size: int

    @property
    def moved(self) -> int:
        """Bytes that the bandwidth counts: read and written on the device, once between host and device."""
        return 2 * self.size if self.kind == "device" else self.size

    def rate(self, time_us: float, cv: float) -> CopyRate:
        """The result."""
        gbps = _short(self.moved / time_us / 1e3)
        return CopyRate(kind=self.kind, size=self.size, time_us=_short(time_us), gbps=gbps, cv=_short(cv))


def _short(value: float) -> float:
    """Six digits: more than a measurement has, and a profile is read by people."""
    return float(f"{value:.6g}")


Case = MatmulKernel | CopyKernel


def label(one: Case | MatmulRate | CopyRate) -> str:
    """What tells a case from all others, the same for its result."""
    if isinstance(one, CopyKernel | CopyRate):
        shift, unit = next(scale for scale in _UNITS if one.size % (1 << scale[0]) == 0)
        return f"copy {one.kind} {one.size >> shift} {unit}"
    experts = f" {one.experts} experts, imbalance {one.imbalance:g}" if one.experts > 1 else ""
    layout = f" {one.layout}" if one.layout != "forward" else ""
    return f"matmul {one.m}x{one.n}x{one.k} {one.dtype}{layout}{experts}"


def matmuls(gpu: bool) -> list[MatmulKernel]:
    """The dense shapes, then the grouped ones; a few small ones for a CPU."""
    if not gpu:
        dense = [
            MatmulKernel(m, n, k, dtype)
            for m in (64, 256)
            for n, k in ((256, 256), (250, 384))
            for dtype in ("float", "bfloat16")
        ]
        dense += [MatmulKernel(64, 256, 256, layout="inputs"), MatmulKernel(256, 250, 64, layout="weights")]
        return dense + [MatmulKernel(256, 128, 128, experts=4, skew=skew) for skew in _SKEWS]
    square = [(n, k) for d in _WIDTHS for n, k in ((d, d), (4 * d, d), (d, 4 * d))]
    dense = [MatmulKernel(m, n, k) for n, k in (*square, *_LAYERS, *_OFF_SIZE) for m in _TOKENS]
    dense += [MatmulKernel(m, 4096, 4096) for m in _ROWS]
    dense += [MatmulKernel(m, n, k) for n, k in _DEEP for m in _DEEP_TOKENS]
    dense += [
        MatmulKernel(m, d, d, dtype)
        for dtype in ("half", "float")
        for d in (2048, 4096)
        for m in (1024, 4096, 8192)
    ]
    grouped = [
        MatmulKernel(m, n, k, experts=experts, skew=skew)
        for experts in _EXPERTS
        for n, k in _EXPERT_LAYERS
        for m in _EXPERT_ROWS
        for skew in _SKEWS
    ]
    grouped += [
        MatmulKernel(m, n, k, experts=experts, skew=skew, layout="inputs")
        for experts, m, n, k in _EXPERT_GRADIENTS
        for skew in _SKEWS
    ]
    return [*dict.fromkeys([*dense, *_layouts(), *grouped])]


def _layouts() -> list[MatmulKernel]:
    """Widths off by a little, and the passes of a layer."""
    off = [shape for by in _UNEVEN for shape in ((4096 + by, 4096), (4096, 4096 + by))]
    matmuls = []
    for m in _LAYOUT_TOKENS:
        matmuls += [MatmulKernel(m, n, k) for n, k in off]
        for n, k in _LAYOUTS:
            matmuls += [
                MatmulKernel(m, n, k),
                MatmulKernel(m, k, n, layout="inputs"),
                MatmulKernel(n, k, m, layout="weights"),
            ]
    return matmuls


def copies(gpu: bool, device_free: int, host_free: int) -> list[CopyKernel]:
    """Copies on the device by factors of 2, and between it and the host by factors of 4.

    At most a quarter of the free device memory, and an eighth of the host's, is copied at once. A CPU is its own
    device.
    """
    most = min(4 << 30, device_free // 4) if gpu else min(16 << 20, host_free // 8)
    kernels = [CopyKernel("device", size) for size in _sizes(64 << 10, most, 2 if gpu else 4)]
    if gpu:
        host = _sizes(256 << 10, min(1 << 30, host_free // 8), 4)
        kernels += [
            CopyKernel(kind, size) for kind in get_args(CopyKind) if kind != "device" for size in host
        ]
    return kernels


def _sizes(least: int, most: int, factor: int) -> list[int]:
    sizes = []
    while least <= most:
        sizes.append(least)
        least *= factor
    return sizes


@dataclass(frozen=True)
class Agreement:
    """How far a profile agrees with an earlier one of the same device."""

    ratios: dict[str, float]
    """New over old rate, by what was measured."""
    alone: tuple[str, ...]
    """What one of the two profiles lacks."""
    tolerance: float

    @property
    def deviations(self) -> dict[str, float]:
        """Relative difference, the same in both directions; ascending."""
        by_name = {name: max(ratio, 1 / ratio) - 1 for name, ratio in self.ratios.items()}
        return dict(sorted(by_name.items(), key=lambda item: item[1]))

    @property
    def inside(self) -> int:
        """Rates within the tolerance."""
        return sum(value <= self.tolerance for value in self.deviations.values())

    @property
    def median(self) -> float:
        """Of the deviations."""
        return float(np.median([*self.deviations.values()]))

    @property
    def p95(self) -> float:
        """Deviation that 95 of 100 don't exceed."""
        return percentile(np.array([*self.deviations.values()]), 95)

    @property
    def worst(self) -> tuple[str, float]:
        """The largest deviation, and what it is of."""
        return [*self.deviations.items()][-1]

    @property
    def agrees(self) -> bool:
        """Whether 95 of 100 rates, and so the median, are within the tolerance."""
        return self.p95 <= self.tolerance

    def __str__(self) -> str:
        name, worst = self.worst
        alone = f"; {len(self.alone)} only in one of the two" if self.alone else ""
        return (
            f"{self.inside} of {len(self.ratios)} rates within {self.tolerance:.0%}; deviation median "
            f"{self.median:.2%}, 95th percentile {self.p95:.2%}, worst {worst:.2%} ({name}){alone}"
        )


def agreement(old: DeviceProfile, new: DeviceProfile, tolerance: float = 0.03) -> Agreement:
    """Set two profiles against each other, rate by rate.

    Raises:
        UserError: where they have nothing in common.
    """
    before, after = _rates(old), _rates(new)
    ratios = {name: rate / before[name] for name, rate in after.items() if name in before}
    if not ratios:
        raise UserError(
            f"profiles {old.name} ({old.hardware}) and {new.name} ({new.hardware}) have no shape in common; "
            "name a profile of the same kind of device"
        )
    return Agreement(ratios, tuple(sorted(before.keys() ^ after.keys())), tolerance)


def table(profile: DeviceProfile) -> list[str]:
    """A profile as lines for a terminal: each rate with its time, and what was left out."""
    lines = [f"# {'':<64} {'time (us)':>12} {'rate':>10} {'':<8} {'cv':>6}"]
    rates: list[MatmulRate | CopyRate] = [*profile.matmuls, *profile.copies]
    for one in rates:
        rate, unit = (one.tflops, "TFLOP/s") if isinstance(one, MatmulRate) else (one.gbps, "GB/s")
        lines.append(f"  {label(one):<64} {one.time_us:>12.2f} {rate:>10.4g} {unit:<8} {one.cv:>6.1%}")
    return lines + [
        f"# {name}: left out: {note}" for name, note in profile.conditions.get("left_out", {}).items()
    ]


def _rates(profile: DeviceProfile) -> dict[str, float]:
    matmuls = {label(one): one.tflops for one in profile.matmuls}
    return matmuls | {label(one): one.gbps for one in profile.copies}
