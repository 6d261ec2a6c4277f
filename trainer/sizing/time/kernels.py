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
`trainer.sizing.time.fitting` finds a device's numbers, its `Tuning`, in a profile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
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
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Parts that the inner dimension may be split into."""
_SHORTEST_SPLIT = 128
_MOST_SPLIT_WAVES = 2
_SOFTNESS = 3.5
"""Exponent of the soft maximum of arithmetic and memory time."""
_POWER_SOFTNESS = 12.0
_CUBE = 3.0
_ROUNDING = 1e-9
"""Of a row: sums of shares are off by less."""
LEVELS = 3
"""Of alignment from 16 bytes on: 16, 32, 64; at 128 nothing more is gained."""
SLOW_TILES: tuple[Tile, ...] = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
"""Of the kernels for rows that aren't 16 bytes apart."""


class KernelKind(IntEnum):
    """Which kernels a shape may use."""

    ALIGNED = 0
    """All rows begin at multiples of 16 bytes."""
    EVEN = 1
    """Of 4 bytes."""
    ODD = 2
    """Some operand's rows begin at odd elements, but not the result's."""
    ODD_RESULT = 3


@dataclass(frozen=True)
class Grouped:
    """How a grouped matmul is tiled."""

    tile: Tile
    small: Tile
    """Where an expert has few rows, or the output few columns."""
    few: int
    """Up to so many."""
    cluster: int
    """Tiles along an expert's rows that are launched together: their number is rounded up to it."""


GROUPED: dict[str, Grouped] = {
    "hopper": Grouped((128, 256), (64, 128), 128, 2),
    "blackwell": Grouped((128, 256), (128, 256), 128, 2),
}
"""torch's grouped_mm: fixed tiles (aten/src/ATen/native/cuda/GroupMM.cu of 2.11). Others choose as for a dense one."""


@dataclass(frozen=True)
class Chip:
    """What of a device the tiling depends on."""

    units: int
    """Compute units."""
    tiles: tuple[Tile, ...]
    grouped: Grouped | None


@dataclass(frozen=True)
class Tuning:
    """A device's numbers; times in seconds, rates in FLOP/s and bytes/s."""

    rate: float
    """Of all units in the inner loop of the best tile."""
    launch: float
    """From the end of one kernel to the first work of the next."""
    ramp: float
    """Elements of the inner dimension that a tile's begin and end are worth."""
    feed: float
    """Elements: what the operands' way to the units costs, times 1/a + 1/b of the tile."""
    bandwidth: float
    """Of device memory."""
    split: float
    """Passes over the partial results, in 8 bytes an element, that one more part costs."""
    power: float
    """Share of `rate` above which the power limit lowers the clock."""
    inner: tuple[float, ...] = (1.0,) * LEVELS
    """Factor on the arithmetic where rows of the operands begin at multiples of 16, 32, 64 bytes and no more."""
    outer: tuple[float, ...] = (1.0,) * LEVELS
    """The same for rows of the result."""
    even: float = 0.5
    """Rate of the kernels for 4 bytes, in their 128 x 128 tile, over `rate`."""
    even_feed: float = 100.0
    odd: float = 0.2
    """The same for odd elements."""
    odd_feed: float = 200.0
    odd_result: float = 0.15
    """The same where the result's rows are the odd ones."""
    slow_ramp: float = 200.0
    """Ramp of all three."""
    grouped_rate: float = 1.0
    """Rate of the grouped kernel over the dense one's."""
    grouped_launch: float = 4e-6
    """What a grouped call costs more than a dense one, in seconds."""
    grouped_ramp: float = 1.0
    """Ramp of the grouped kernel over the dense one's."""
    expert: float = 1e-7
    """Seconds for each expert of a grouped call."""


@dataclass(frozen=True)
class MatmulShape:
    """[m, k] times [k, n]; `experts` of them where it is grouped."""

    m: int
    """Rows: of all experts together, or, where the inner dimension is the ragged one, of each result."""
    n: int
    k: int
    """Inner width: of each, or, where it is the ragged one, of all experts together."""
    experts: int = 1
    imbalance: float = 1.0
    """The fullest expert's rows over the mean."""
    layout: Operands = "forward"
    """Which pass of a linear layer it is; in the weights' one the experts differ in the inner dimension."""
    bytes: float = 2.0
    """Of an operand's element."""

    @property
    def inner(self) -> bool:
        """Whether the inner dimension is the ragged one."""
        return self.layout == "weights" and self.experts > 1

    @property
    def rows(self) -> tuple[int, int]:
        """Elements from one row to the next: of the operands, their bits joined, and of the result."""
        if self.layout == "forward":
            return self.k, self.n
        return (self.k if self.layout == "inputs" else self.m) | self.n, self.n

    @property
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
        weights = 1 if self.inner else self.experts
        results = self.experts if self.inner else 1
        operands = self.m * self.k + weights * self.k * self.n
        return self.bytes * operands + max(self.bytes, 2.0) * results * self.m * self.n


class KernelPlan(NamedTuple):
    """How a library runs a shape."""

    tile: Tile
    blocks: int
    """Tiles, those of all parts and experts."""
    waves: int
    parts: int
    """Parts that the inner dimension is split into."""


class KernelTime(NamedTuple):
    """How the time of a shape comes about; all in seconds."""

    seconds: float
    plan: KernelPlan
    launch: float
    arithmetic: float
    """Of the waves."""
    memory: float
    """Of the roofline."""
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


class Form:
    """The formula with a device's numbers in it."""

    def __init__(self, chip: Chip, tuning: Tuning) -> None:
        self.chip, self.tuning = chip, tuning
        best = min(1 + tuning.feed * (1 / a + 1 / b) for a, b in chip.tiles)
        self._scale = chip.units / (tuning.rate * best)
        self._costs = {KernelKind.ALIGNED: _costs(chip.tiles, tuning.feed, self._scale)}
        for kind, share, feed in (
            (KernelKind.EVEN, tuning.even, tuning.even_feed),
            (KernelKind.ODD, tuning.odd, tuning.odd_feed),
            (KernelKind.ODD_RESULT, tuning.odd_result, tuning.odd_feed),
        ):
            scale = chip.units / (tuning.rate * share * (1 + feed / 64))
            self._costs[kind] = _costs(SLOW_TILES, feed, scale)

    def choose(self, shape: MatmulShape) -> KernelTime:
        """The time of a shape, run as the library is thought to."""
        return self.time(shape, self.plan(shape))

    def plan(self, shape: MatmulShape) -> KernelPlan:
        """What the library is thought to choose: by the grouped kernel's rule, otherwise the least arithmetic time."""
        if shape.experts == 1:
            return self._dense(shape)
        rule = self.chip.grouped
        if rule is None:
            plans = [self._tiled(shape, tile, 1) for tile in self.chip.tiles]
            return min(plans, key=lambda plan: self._waiting(shape, plan))
        rows = shape.m if shape.inner else shape.m / shape.experts
        return self._tiled(shape, rule.small if min(rows, shape.n) <= rule.few else rule.tile, rule.cluster)

    def time(self, shape: MatmulShape, plan: KernelPlan) -> KernelTime:
        """The time of a shape that is run so."""
        tuning = self.tuning
        launch = tuning.launch
        arithmetic = self._waiting(shape, plan)
        if shape.experts > 1:
            launch += tuning.grouped_launch + tuning.expert * shape.experts
        if shape.experts == 1 and shape.kind == KernelKind.ALIGNED:
            inner, outer = shape.levels
            arithmetic *= tuning.inner[inner] if inner < LEVELS else 1.0
            arithmetic *= tuning.outer[outer] if outer < LEVELS else 1.0
        memory = shape.moved / tuning.bandwidth
        high, low = (arithmetic, memory) if arithmetic > memory else (memory, arithmetic)
        busy = high * (1 + (low / high) ** _SOFTNESS) ** (1 / _SOFTNESS)
        share = shape.flops / ((launch + busy) * tuning.rate * tuning.power)
        slowing = 1.0
        if share > 0.5:  # below, the factor is 1 to five digits
            slowing = (1 + share**_POWER_SOFTNESS) ** (1 / (_POWER_SOFTNESS * _CUBE))
        return KernelTime(launch + busy * slowing, plan, launch, arithmetic, memory, slowing)

    def _dense(self, shape: MatmulShape) -> KernelPlan:
        m, n, k, ramp = shape.m, shape.n, shape.k, self._ramp(shape)
        units, part_cost = self.chip.units, self._part_cost(shape)
        most = _MOST_SPLIT_WAVES * units
        least, best = math.inf, (0, 0, 0, 0, 1)
        for (a, b), cost in self._costs[shape.kind].items():
            tiles = -(-m // a) * -(-n // b)
            for parts in SPLITS:
                blocks = tiles * parts
                if parts > 1 and (blocks > most or k < parts * _SHORTEST_SPLIT):
                    break
                waves = -(-blocks // units)
                seconds = waves * (k / parts + ramp) * cost
                if parts > 1:
                    seconds += part_cost * parts
                if seconds < least:
                    least, best = seconds, (a, b, blocks, waves, parts)
        return KernelPlan(best[:2], *best[2:])

    def _tiled(self, shape: MatmulShape, tile: Tile, cluster: int) -> KernelPlan:
        """A grouped call in tiles of one size."""
        step, columns = tile[0] * cluster, -(-shape.n // tile[1])
        if shape.inner:
            rounded = shape.experts * -(-shape.m // step)
        elif shape.imbalance <= 1:
            rounded = shape.experts * -(-shape.m // (step * shape.experts))
        else:
            parts = shares(shape.experts, shape.imbalance)
            rounded = sum(math.ceil(shape.m * part / step - _ROUNDING) for part in parts)
        blocks = rounded * cluster * columns
        return KernelPlan(tile, blocks, -(-blocks // self.chip.units), 1)

    def _waiting(self, shape: MatmulShape, plan: KernelPlan) -> float:
        """Seconds of the waves."""
        tile, _, waves, parts = plan
        tuning = self.tuning
        if shape.experts == 1:
            seconds = waves * (shape.k / parts + self._ramp(shape)) * self._costs[shape.kind][tile]
            return seconds + self._part_cost(shape) * parts if parts > 1 else seconds
        cost = _cost(tile, tuning.feed, self._scale) / tuning.grouped_rate
        ramp = tuning.ramp * tuning.grouped_ramp
        if not shape.inner:
            return waves * (shape.k + ramp) * cost
        # Tiles of all experts share the waves, so that only the last one shows the fullest expert's depth.
        mean = shape.k / shape.experts
        return (waves * (mean + ramp) + mean * (shape.imbalance - 1)) * cost

    def _part_cost(self, shape: MatmulShape) -> float:
        """Seconds of passing over one part's results."""
        return self.tuning.split * 8.0 * shape.m * shape.n / self.tuning.bandwidth

    def _ramp(self, shape: MatmulShape) -> float:
        return self.tuning.ramp if shape.kind == KernelKind.ALIGNED else self.tuning.slow_ramp


def _cost(tile: Tile, feed: float, scale: float) -> float:
    """Seconds of an element of the inner dimension in one tile."""
    a, b = tile
    return 2.0 * a * b * (1 + feed * (1 / a + 1 / b)) * scale


def _costs(tiles: Iterable[Tile], feed: float, scale: float) -> dict[Tile, float]:
    return {tile: _cost(tile, feed, scale) for tile in tiles}


def level(size: int) -> int:
    """Doublings of 16 that divide a number of bytes, 0 to `LEVELS`."""
    return max(0, min((size & -size).bit_length() - 5, LEVELS))
