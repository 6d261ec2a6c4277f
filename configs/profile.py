"""Measured profiles: what a fabric and a device were found to do. Written by `collectives`, read by sizing.

A profile is a YAML file under `configs/profiles/`: `fabric/NAME.yaml` or `device/NAME.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import yaml
from pydantic import Field, ValidationError

from configs.errors import UserError
from configs.paths import write_whole
from configs.section import Positive, Section

FOLDER = Path(__file__).parent / "profiles"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's, where it is built in: a device profile takes a fifth of a second without it."""
Rate = Annotated[float, Field(gt=0)]
Operands = Literal["forward", "inputs", "weights"]
"""How the operands of [m, k] times [k, n] lie: as in a linear layer's forward pass, its weight stored as [n, k]; as in the
gradient of its inputs, both as they are written; as in that of its weights, the left one stored as [k, m]."""


class Segment(Section):
    """A region of sizes with one algorithm: time = latency + size / bandwidth."""

    low: Positive
    """Smallest measured size in bytes."""
    high: Positive
    """Largest measured size in bytes."""
    latency_us: Annotated[float, Field(ge=0)]
    """Alpha, in microseconds."""
    gbps: Rate | None
    """One over beta, in GB/s (10^9 bytes); None where time doesn't grow with size."""
    latency_range_us: tuple[float, float]
    """Confidence interval of alpha."""
    gbps_range: tuple[float, float | None] | None
    """Confidence interval of the bandwidth; without an upper end where time may not grow at all."""

    def time_us(self, size: float) -> float:
        """Microseconds of `size` bytes, by this segment's line."""
        return self.latency_us + (size / self.gbps / 1e3 if self.gbps else 0.0)


class CurveSegment(Protocol):
    """Time over a region of sizes."""

    @property
    def low(self) -> float:
        """Smallest size in bytes."""

    @property
    def high(self) -> float:
        """Largest size in bytes."""

    def time_us(self, size: float) -> float:
        """Microseconds of `size` bytes."""


def piecewise_us(lines: Sequence[CurveSegment], size: float) -> float:
    """Microseconds of `size` bytes: by its line, or on a straight line in log-log space between the ends of two."""
    before = lines[0]
    for line in lines:
        if size < line.low and line is not before:
            x0, x1 = math.log(before.high), math.log(line.low)
            y0, y1 = math.log(before.time_us(before.high)), math.log(line.time_us(line.low))
            return math.exp(y0 + (y1 - y0) * (math.log(size) - x0) / (x1 - x0))
        if size <= line.high:
            return line.time_us(size)
        before = line
    return before.time_us(size)


class CollectiveCurve(Section):
    """Time over size of one operation in one kind of group: the median iteration's."""

    op: str
    group: str
    """Kind of group, as in `collectives.groups`."""
    ranks: Positive
    """Ranks of each group."""
    groups: Positive
    """Groups that ran at once."""
    nodes: Positive
    """Nodes that one group spans."""
    dtype: str
    redop: str
    segments: Annotated[tuple[Segment, ...], Field(min_length=1)]
    """Ascending in size; between two of them time is read off a straight line in log-log space."""
    held_out_error: float
    """Mean relative error of sizes that the fit had not seen."""
    line_error: float
    """The same of one straight line, for comparison."""
    interval: tuple[float, float]
    """A fresh measurement over the fitted time lies between these ratios, at `confidence`."""
    confidence: float
    outliers: tuple[int, ...] = ()
    """Sizes that fit no neighbour, by name: they are in the held-out error all the same."""

    def time_us(self, size: float) -> float:
        """Microseconds of a call with `size` bytes, in nccl-tests' sense; by the outer lines beyond what was measured."""
        return piecewise_us(self.segments, size)


class FabricProfile(Section):
    """What a fabric was found to do."""

    name: str
    hardware: str
    """Preset name of the devices."""
    conditions: dict[str, Any]
    """System, software, settings and method of the measurement."""
    curves: tuple[CollectiveCurve, ...]

    def find(self, op: str, ranks: int, nodes: int) -> CollectiveCurve | None:
        """The curve of an operation for groups of `ranks` over `nodes`; None where that wasn't measured."""
        curves = (c for c in self.curves if (c.op, c.ranks, c.nodes) == (op, ranks, nodes))
        return next(curves, None)


class MatmulRate(Section):
    """Rate of one shape: [m, k] times [k, n], `experts` of them at once where it is grouped."""

    m: Positive
    """Rows: tokens, of all experts together where it is grouped."""
    n: Positive
    k: Positive
    experts: Positive = 1
    imbalance: Annotated[float, Field(ge=1)] = 1.0
    """Rows of the fullest expert over the mean."""
    dtype: str
    layout: Operands = "forward"
    time_us: Rate
    """Median time."""
    tflops: Rate
    """2 m n k over the median time, in 10^12 a second."""
    cv: float
    """Standard deviation over mean of the times."""


class CopyRate(Section):
    """Bandwidth of one copy."""

    kind: Literal["device", "host_to_device", "device_to_host", "pinned_to_device", "device_to_pinned"]
    size: Positive
    """Bytes copied; a copy on the device reads and writes them."""
    time_us: Rate
    gbps: Rate
    """GB/s (10^9 bytes): bytes read plus written on the device, bytes moved between host and device."""
    cv: float


class DeviceProfile(Section):
    """What one device was found to do."""

    name: str
    hardware: str
    conditions: dict[str, Any]
    """Device, software, clocks and method of the measurement."""
    matmuls: tuple[MatmulRate, ...]
    copies: tuple[CopyRate, ...]


P = TypeVar("P", FabricProfile, DeviceProfile)


def save(profile: FabricProfile | DeviceProfile, path: Path) -> None:
    """Write a profile, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = profile.model_dump(mode="json")
    write_whole(path, yaml.safe_dump(tree, sort_keys=False, width=120, default_flow_style=None))


def load(kind: type[P], name: str) -> P:
    """A profile by name, or by path where the name ends in `.yaml`.

    Raises:
        UserError: where there is none of that name, or the file isn't one.
    """
    folder = FOLDER / ("fabric" if kind is FabricProfile else "device")
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    try:
        return kind.model_validate(yaml.load(path.read_text(), _LOADER))
    except FileNotFoundError:
        have = ", ".join(_names(folder)) or "none yet"
        raise UserError(f"profile {name} is not there; have: {have}, or a path that ends in .yaml") from None
    except (ValidationError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a {kind.__name__}: {str(error).splitlines()[0]}") from None


def known(kind: type[P], name: str) -> P | None:
    """The profile of that name under `configs/profiles/`; None where none was made.

    Raises:
        UserError: where the file isn't a profile.
    """
    folder = FOLDER / ("fabric" if kind is FabricProfile else "device")
    return load(kind, name) if (folder / f"{name}.yaml").is_file() else None


def _names(folder: Path) -> Iterator[str]:
    return (path.stem for path in sorted(folder.glob("*.yaml")))
