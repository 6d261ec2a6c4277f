"""How long a matmul takes on one device: tiles, waves of them, a bandwidth roofline, a launch and a power limit.

A library cuts an output [m, n] into tiles, one for each compute unit at a time. So with the tile [a, b] the time is

    launch + max'(waves * (k + ramp) * 2 a b (1 + feed (1/a + 1/b)) / unit rate, bytes / bandwidth)

with waves = ceil(tiles / units), and the library takes the tile, and the number of parts it splits k into, for which
that is least. `ramp` is what filling and emptying the pipeline of a tile costs, in elements of k; `feed` what a small
tile costs because it loads more operands for its work; max' is a soft maximum. Above a share of the peak the power
limit lowers the clock: power grows with the cube of it, so the rate only with the cube root of what it would be.

Which kernels there are to choose from is decided by where rows of the operands and of the result begin (`KernelKind`): copy
engines and 16-byte loads want multiples of 16 bytes. Otherwise kernels of an older make run, with fewer tiles, another
rate and ramp, and a larger `feed`, since loads are what limits them.
`trainer.sizing.time.fitting` fits a device's `MatmulParameters` to a profile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, cached_property
from typing import NamedTuple

from configs.profile import Operands

Tile = tuple[int, int]

_NVIDIA: tuple[Tile, ...] = (
    (64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (256, 64), (128, 192), (192, 128), (128, 256), (256, 128),
)  # fmt: skip
TILES: dict[str, tuple[Tile, ...]] = {
    "ampere": _NVIDIA,
    "hopper": (
        *_NVIDIA, (64, 96), (96, 64), (96, 128), (128, 96), (64, 160), (160, 64), (64, 192), (192, 64), (128, 160),
        (160, 128), (160, 192), (192, 160), (192, 192), (128, 224), (224, 128), (128, 320), (320, 128),
    ),
    "blackwell": (*_NVIDIA, (192, 256), (256, 192), (256, 256)),
    "cdna": (
        (64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (256, 64), (128, 256), (256, 128), (256, 160), (160, 256),
        (192, 256), (256, 192), (256, 256),
    ),
}  # fmt: skip
"""Output tiles that cuBLAS and hipBLASLt choose among, by the names of their kernels."""
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)  # parts that the inner dimension may be split into
_SHORTEST_SPLIT = 128
_MOST_SPLIT_WAVES = 2
_SOFTNESS = 3.5  # exponent of the soft maximum of arithmetic and memory time
_POWER_SOFTNESS = 12.0
_CUBE = 3.0
_ROUNDING = 1e-9  # of a row: sums of shares are off by less
LEVELS = 3  # of alignment from 16 bytes on: 16, 32, 64; at 128 nothing more is gained
SLOW_TILES: tuple[Tile, ...] = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
"""Of the kernels for rows that aren't 16 bytes apart."""


class KernelKind(IntEnum):
    """Which kernels a shape may use, by where rows begin."""

    ALIGNED = 0
    """All at multiples of 16 bytes."""
    EVEN = 1
    """Of 4 bytes."""
    ODD = 2
    """Some operand's at odd elements, but not the result's."""
    ODD_RESULT = 3


@dataclass(frozen=True)
class Grouped:
    """How a grouped matmul is tiled."""

    tile: Tile
    small: Tile
    """Where an expert has up to `few` rows, or the output as few columns."""
    few: int
    cluster: int
    """Tiles along an expert's rows that are launched together: their number is rounded up to it."""


GROUPED: dict[str, Grouped] = {
    "hopper": Grouped((128, 256), (64, 128), 128, 2),
    "blackwell": Grouped((128, 256), (128, 256), 128, 2),
}
"""torch's grouped_mm: fixed tiles (aten/src/ATen/native/cuda/GroupMM.cu of 2.11). Others choose as for a dense one."""


@dataclass(frozen=True)
class Chip:
    """What of a device the tiling depends on: compute units, tiles to choose from, and those of a grouped matmul."""

    units: int
    tiles: tuple[Tile, ...]
    grouped: Grouped | None


@dataclass(frozen=True)
class MatmulParameters:
    """A device's parameters of the formula; times in seconds, rates in FLOP/s and bytes/s.

    `rate` is of all units in the inner loop of the best tile; `launch` from the end of one kernel to the first work of the
    next; `ramp` and `feed` are in elements; `split` is the passes over the partial results, in 8 bytes an element, that one
    more part costs; `power` the share of `rate` above which the power limit lowers the clock. `inner` and `outer` are
    factors on the arithmetic where rows of the operands and of the result begin at multiples of 16, 32, 64 bytes and no
    more. Kernels for other rows have a rate over `rate` in their 128 x 128 tile, a `feed`, and one ramp for all. The
    grouped kernel's rate and ramp are over the dense one's; a call and each `expert` of it take so many seconds on top.
    """

    rate: float
    launch: float
    ramp: float
    feed: float
    bandwidth: float
    split: float
    power: float
    inner: tuple[float, ...] = (1.0,) * LEVELS
    outer: tuple[float, ...] = (1.0,) * LEVELS
    even: float = 0.5
    even_feed: float = 100.0
    odd: float = 0.2
    odd_feed: float = 200.0
    odd_result: float = 0.15
    slow_ramp: float = 200.0
    grouped_rate: float = 1.0
    grouped_launch: float = 4e-6
    grouped_ramp: float = 1.0
    expert: float = 1e-7


@dataclass(frozen=True)
class MatmulShape:
    """[m, k] times [k, n], or `experts` of them in one grouped call.

    m is of all experts together, or, in the pass of the weights' gradient (`layout`), where experts differ in the inner
    dimension, k is. `imbalance` is the fullest expert's rows over the mean; `bytes` are of an operand's element.
    """

    m: int
    n: int
    k: int
    experts: int = 1
    imbalance: float = 1.0
    layout: Operands = "forward"
    bytes: float = 2.0

    @property
    def inner(self) -> bool:
        """Whether the inner dimension is the ragged one."""
        return self.layout == "weights" and self.experts > 1

    @property
    def each(self) -> tuple[float, float]:
        """Rows and inner width of an expert's matmul, on average."""
        return (self.m, self.k / self.experts) if self.inner else (self.m / self.experts, self.k)

    @property
    def rows(self) -> tuple[int, int]:
        """Elements from one row to the next: of the operands, their bits joined, and of the result."""
        if self.layout == "forward":
            return self.k, self.n
        return (self.k if self.layout == "inputs" else self.m) | self.n, self.n

    @cached_property
    def kind(self) -> KernelKind:
        """Which kernels it may use."""
        operands, result = self.rows
        least = ((operands | result) & -(operands | result)) * self.bytes
        if least >= 16:
            return KernelKind.ALIGNED
        if least >= 4:
            return KernelKind.EVEN
        return KernelKind.ODD if result * self.bytes % 4 == 0 else KernelKind.ODD_RESULT

    @property
    def levels(self) -> tuple[int, int]:
        """Alignment of the operands' and of the result's rows, in doublings of 16 bytes, at most `LEVELS`."""
        operands, result = self.rows
        return level(int(operands * self.bytes)), level(int(result * self.bytes))

    @property
    def flops(self) -> float:
        """Operations, a multiply-add as two."""
        return 2.0 * self.m * self.n * self.k

    @property
    def moved(self) -> float:
        """Bytes of operands and result, each once; results have at least 2 bytes."""
        weights, results = (1, self.experts) if self.inner else (self.experts, 1)
        operands = self.m * self.k + weights * self.k * self.n
        return self.bytes * operands + max(self.bytes, 2.0) * results * self.m * self.n


def level(size: int) -> int:
    """Doublings of 16 that divide a number of bytes, 0 to `LEVELS`."""
    return max(0, min((size & -size).bit_length() - 5, LEVELS))


class KernelPlan(NamedTuple):
    """How a library runs a shape: tiles, those of all parts and experts, in waves; parts of the inner dimension."""

    tile: Tile
    blocks: int
    waves: int
    parts: int


class KernelTime(NamedTuple):
    """How the time of a shape comes about: seconds, of the waves (`arithmetic`) and of the roofline (`memory`)."""

    seconds: float
    plan: KernelPlan
    launch: float
    arithmetic: float
    memory: float
    slowing: float
    """Factor of the power limit."""


@cache
def shares(experts: int, imbalance: float) -> tuple[float, ...]:
    """Share of each expert in the rows, on a power law whose largest is `imbalance` times the mean."""
    if imbalance <= 1.0 or experts == 1:
        return (1.0 / experts,) * experts
    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        largest = experts / sum((i + 1) ** -middle for i in range(experts))
        low, high = (middle, high) if largest < imbalance else (low, middle)
    weights = [(i + 1) ** -low for i in range(experts)]
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def _cost(tile: Tile, feed: float, scale: float) -> float:
    """Seconds of an element of the inner dimension in one tile."""
    a, b = tile
    return 2.0 * a * b * (1 + feed * (1 / a + 1 / b)) * scale


class MatmulModel:
    """The time of matmuls on a device: the formula above with its parameters."""

    def __init__(self, chip: Chip, tuning: MatmulParameters) -> None:
        self.chip, self.tuning = chip, tuning
        best = min(1 + tuning.feed * (1 / a + 1 / b) for a, b in chip.tiles)
        self._scale = chip.units / (tuning.rate * best)
        self._costs = {KernelKind.ALIGNED: {t: _cost(t, tuning.feed, self._scale) for t in chip.tiles}}
        for kind, share, feed in (
            (KernelKind.EVEN, tuning.even, tuning.even_feed),
            (KernelKind.ODD, tuning.odd, tuning.odd_feed),
            (KernelKind.ODD_RESULT, tuning.odd_result, tuning.odd_feed),
        ):
            scale = chip.units / (tuning.rate * share * (1 + feed / 64))
            self._costs[kind] = {tile: _cost(tile, feed, scale) for tile in SLOW_TILES}

    def choose(self, shape: MatmulShape) -> KernelTime:
        """The time of a shape, run as the library is thought to."""
        return self.time(shape, self.plan(shape))

    def plan(self, shape: MatmulShape) -> KernelPlan:
        """What the library is thought to choose: by the grouped kernel's rule, otherwise the least arithmetic time."""
        rule = self.chip.grouped
        if shape.experts > 1 and rule is not None:
            small = min(shape.each[0], shape.n) <= rule.few
            return self._tiled(shape, rule.small if small else rule.tile, rule.cluster)
        tiled = (self._tiled(shape, tile, 1) for tile in self.chip.tiles)
        return min(self._splits(shape) if shape.experts == 1 else tiled, key=self._waves(shape))

    def time(self, shape: MatmulShape, plan: KernelPlan) -> KernelTime:
        """The time of a shape that is run so."""
        tuning = self.tuning
        launch, arithmetic = tuning.launch, self._waves(shape)(plan)
        if shape.experts > 1:
            launch += tuning.grouped_launch + tuning.expert * shape.experts
        elif shape.kind == KernelKind.ALIGNED:
            for factors, off in zip((tuning.inner, tuning.outer), shape.levels, strict=True):
                arithmetic *= factors[off] if off < LEVELS else 1.0
        memory = shape.moved / tuning.bandwidth
        low, high = sorted((arithmetic, memory))
        busy = high * (1 + (low / high) ** _SOFTNESS) ** (1 / _SOFTNESS)
        share = shape.flops / ((launch + busy) * tuning.rate * tuning.power)
        slowing = 1.0
        if share > 0.5:  # below, the factor is 1 to five digits
            slowing = (1 + share**_POWER_SOFTNESS) ** (1 / (_POWER_SOFTNESS * _CUBE))
        return KernelTime(launch + busy * slowing, plan, launch, arithmetic, memory, slowing)

    def _splits(self, shape: MatmulShape) -> Iterator[KernelPlan]:
        """A dense matmul in each tile, its inner dimension in one part or more."""
        m, n, units = shape.m, shape.n, self.chip.units
        splits = [parts for parts in SPLITS if parts == 1 or shape.k >= parts * _SHORTEST_SPLIT]
        for tile in self._costs[shape.kind]:
            tiles = -(-m // tile[0]) * -(-n // tile[1])
            for parts in splits:
                blocks = tiles * parts
                if parts > 1 and blocks > _MOST_SPLIT_WAVES * units:
                    break
                yield KernelPlan(tile, blocks, -(-blocks // units), parts)

    def _tiled(self, shape: MatmulShape, tile: Tile, cluster: int) -> KernelPlan:
        step, columns = tile[0] * cluster, -(-shape.n // tile[1])
        if shape.inner or shape.imbalance <= 1:
            rounded = shape.experts * -(-shape.m // (step if shape.inner else step * shape.experts))
        else:
            parts = shares(shape.experts, shape.imbalance)
            rounded = sum(math.ceil(shape.m * part / step - _ROUNDING) for part in parts)
        blocks = rounded * cluster * columns
        return KernelPlan(tile, blocks, -(-blocks // self.chip.units), 1)

    def _waves(self, shape: MatmulShape) -> Callable[[KernelPlan], float]:
        """Seconds of a plan's waves."""
        tuning, k = self.tuning, shape.k
        if shape.experts == 1:
            ramp = tuning.ramp if shape.kind == KernelKind.ALIGNED else tuning.slow_ramp
            costs = self._costs[shape.kind]
            passed_over = tuning.split * 8.0 * shape.m * shape.n / tuning.bandwidth

            def dense(plan: KernelPlan) -> float:
                tile, _, waves, parts = plan
                seconds = waves * (k / parts + ramp) * costs[tile]
                return seconds + passed_over * parts if parts > 1 else seconds

            return dense
        # Tiles of all experts share the waves, so that only the last one shows the fullest expert's depth.
        ramp, mean = tuning.ramp * tuning.grouped_ramp, shape.each[1]
        deeper = mean * (shape.imbalance - 1) if shape.inner else 0.0

        def grouped(plan: KernelPlan) -> float:
            cost = _cost(plan.tile, tuning.feed, self._scale) / tuning.grouped_rate
            return (plan.waves * (mean + ramp) + deeper) * cost

        return grouped
