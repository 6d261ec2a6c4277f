"""One kind of device: what its makers publish, what others measured on it, and who says so of each number."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.errors import nearest
from configs.section import NonNegative, Positive, Section

Quantity = Annotated[float, Field(gt=0)]
PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
"""That sizing prices matmuls in; nothing would read the rate of another."""


class SourceConfig(Section):
    """Who gives which numbers of a device."""

    name: str
    """Short name, for tables."""
    what: str
    """The document or measurement, with its conditions where they matter."""
    date: Annotated[str, Field(pattern=r"^\d{4}(-\d{2}){0,2}$")]
    """Published, measured or read: `2025`, `2025-06` or `2025-06-12`."""
    gives: tuple[str, ...]
    """Fields that are from it; `peak_tflops` stands for all its precisions, `peak_tflops.fp8` for one."""


class LinkConfig(Section):
    """The links between the devices of a node, or of a rack that one switch joins."""

    kind: Literal["none", "nvlink", "xgmi", "pcie"] = "none"
    """Who makes them."""
    shape: Literal["none", "switch", "mesh", "pairs", "irregular"] = "none"
    """`switch`: a group of any size has the full rate; `mesh`: one link to each other device, so that n devices
    have n - 1 links each; `pairs`: bridges between two; `irregular`: it depends on which devices."""
    count: Positive | None = None
    """Links of one device."""
    gbps: Quantity | None = None
    """One link in one direction, in GB/s."""
    achieved_gbps: tuple[Quantity, Quantity] | None = None
    """Least and most that was measured over one link in one direction, in GB/s."""
    reach: Positive | None = None
    """Devices that they join."""


class NicConfig(Section):
    """The network adapters of a usual node."""

    name: str = "none"
    """Model of the adapter."""
    per_node: NonNegative = 0
    """Adapters of a node that carry the training's traffic."""
    gbps: Quantity | None = None
    """One adapter in one direction, in GB/s."""


class HardwareConfig(Section):
    """One kind of device; an unknown number is None, or an absent key, and stays unknown."""

    name: str
    """Preset name."""
    kind: Literal["cpu", "cuda", "rocm"]
    """Which runtime drives it; both GPU kinds are `cuda` devices to torch."""
    architecture: str | None = None
    """Generation, as its maker calls it: `hopper`, `cdna3`."""
    parts: Positive = 1
    """Devices, as the runtime shows them, that are sold as one module: MI250X is two. All numbers are of one."""
    memory_gib: Quantity | None = None
    """Memory of one device in GiB; None: the host's memory, shared by all ranks on it."""
    memory_gbps: Quantity | None = None
    """Peak memory bandwidth in GB/s."""
    memory_achieved_gbps: Quantity | None = None
    """Memory bandwidth that was measured, reads plus writes, in GB/s."""
    peak_tflops: dict[str, Quantity] = {}
    """Dense peak by precision (`bf16`, `fp8`, `fp32`) in TFLOP/s; a precision that is absent has no MFU."""
    achieved_tflops: dict[str, Quantity] = {}
    """Best dense matmul that was measured, by precision, in TFLOP/s."""
    achieved_shapes: dict[str, tuple[Positive, Positive, Positive]] = {}
    """Rows, columns and inner width of that matmul."""
    attention_tflops: dict[str, Quantity] = {}
    """Attention kernels that were measured, by direction and tokens (`forward_4096`), in TFLOP/s."""
    compute_units: Positive | None = None
    """Streaming multiprocessors or compute units that are enabled."""
    dies: Positive | None = None
    """Dies over which consecutive blocks of a launch go in turn (AMD's XCDs); 1 where launches see one device."""
    clock_mhz: Quantity | None = None
    """Clock that the peak is reached at."""
    l2_mib: Quantity | None = None
    """Second-level cache of the device, all dies together, in MiB."""
    last_cache_mib: Quantity | None = None
    """Cache behind it (AMD's Infinity Cache) in MiB."""
    onchip_kib: Quantity | None = None
    """Memory of one compute unit that a tile's operands are held in (shared memory with L1, or LDS), in KiB."""
    power_watts: Quantity | None = None
    """Board power."""
    devices_per_node: Positive | None = None
    """Devices in a usual node; None on a CPU."""
    intra_node_gbps: Quantity | None = None
    """Link bandwidth inside a node per device and direction, in GB/s, with all devices taking part."""
    host_gbps: Quantity | None = None
    """PCIe or chip-to-chip link between device and host, one direction, in GB/s."""
    inter_node_gbps: Quantity | None = None
    """Network bandwidth per device and direction, in GB/s."""
    link: LinkConfig = LinkConfig()
    """Links behind `intra_node_gbps`."""
    nic: NicConfig = NicConfig()
    """Adapters behind `inter_node_gbps`."""
    sources: tuple[SourceConfig, ...] = ()
    """Every number's origin."""

    @model_validator(mode="after")
    def _known_precisions(self) -> Self:
        for field in ("peak_tflops", "achieved_tflops", "achieved_shapes"):
            for precision in getattr(self, field):
                if precision not in PRECISIONS:
                    raise ValueError(
                        f"hardware.{field}.{precision}: '{precision}' is not a precision that matmuls are priced in"
                        f"{nearest(precision, PRECISIONS, cutoff=0.5)}; use one of {', '.join(PRECISIONS)}"
                    )
        return self

    @property
    def source(self) -> str:
        """Where most numbers are from, in one line."""
        if not self.sources:
            return "its peak and bandwidths are unknown until you measure them"
        first, *others = self.sources
        return f"{first.what}, {first.date}" + (f", and {len(others)} more" if others else "")

    def source_of(self, field: str) -> SourceConfig | None:
        """Who gives `field` (`memory_gib`, `peak_tflops.bf16`, `link.gbps`); None where nobody is named."""
        for name in (field, field.partition(".")[0]):
            for source in self.sources:
                if name in source.gives:
                    return source
        return None

    def group_gbps(self, ranks: int, achieved: bool = False) -> float | None:
        """Bandwidth of each device of a group of `ranks` in a node, one direction, in GB/s; None where unknown.

        A switch gives any group the full rate, a mesh n - 1 links (Zyphra et al. 2025, arXiv 2511.17127), a pair
        its bridge; devices that no link joins meet over the host's bus. `achieved` scales by the middle of what was
        measured over one link, where that is on record, and is None where it is not.

        Raises:
            ValueError: for a group of fewer than two.
        """
        if ranks < 2:
            raise ValueError(f"a group of {ranks} exchanges nothing")
        link = self.link
        reach = link.reach or self.devices_per_node or 0
        within = ranks <= reach
        if link.shape == "pairs" and not within:
            return None if achieved or ranks > (self.devices_per_node or 0) else self.host_gbps
        if link.shape in ("none", "irregular") or not within or link.gbps is None:
            return None
        links = {"mesh": ranks - 1, "pairs": link.count, "switch": link.count}[link.shape]
        each = link.gbps
        if achieved:
            if link.achieved_gbps is None:
                return None
            each = sum(link.achieved_gbps) / 2
        return None if links is None else links * each
