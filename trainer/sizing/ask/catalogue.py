"""The hardware catalogue as a table, each number with who says so and when."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from configs.compose import choices, compose
from configs.hardware import HardwareConfig, LinkConfig, NicConfig

Row = tuple[str, str, str]
"""Label, value with its unit, field whose source it has."""


@cache
def device(name: str) -> HardwareConfig:
    """A device of the catalogue.

    Raises:
        UserError: where there is none of that name.
    """
    return compose([f"hardware={name}"]).hardware


def devices() -> list[HardwareConfig]:
    """All devices."""
    return [device(name) for name in choices("hardware")]


def provenance(hardware: HardwareConfig, field: str) -> str:
    """Who gives a number and when; that it was typed, where the catalogue has another."""
    name, _, key = field.partition(".")
    if hardware.name in choices("hardware"):
        here, there = (getattr(one, name) for one in (hardware, device(hardware.name)))
        if key and isinstance(here, dict):
            here, there = here.get(key), there.get(key)
        if here != there:
            return "typed on the command line or in a file"
    source = hardware.source_of(field)
    return f"{source.what}, {source.date}" if source else "nobody is named"


def rows(hardware: HardwareConfig) -> list[Row]:
    """All that is on record of a device, in the order of the table."""
    h = hardware
    table = [*_compute(h), *_memory(h), *_links(h, h.link, h.nic)]
    return [(label, value, field) for label, value, field in table if value]


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:g} {unit}"


def _compute(h: HardwareConfig) -> Iterator[Row]:
    for precision, peak in h.peak_tflops.items():
        yield f"peak {precision}", _number(peak, "TFLOP/s"), f"peak_tflops.{precision}"
        best = h.achieved_tflops.get(precision)
        if best is not None:
            shape = h.achieved_shapes.get(precision)
            at = (
                f" ({best / peak:.1%}) at {' x '.join(map(str, shape))}" if shape else f" ({best / peak:.1%})"
            )
            yield f"best matmul {precision}", _number(best, "TFLOP/s") + at, f"achieved_tflops.{precision}"
    for what, rate in h.attention_tflops.items():
        direction, _, tokens = what.partition("_")
        yield f"attention {direction}", f"{rate:g} TFLOP/s at {tokens} tokens", "attention_tflops"
    yield "compute units", _number(h.compute_units, "").strip(), "compute_units"
    yield "dies", _number(h.dies, "").strip(), "dies"
    yield "devices of a module", str(h.parts) if h.parts > 1 else "", "parts"
    yield "clock", _number(h.clock_mhz, "MHz"), "clock_mhz"
    yield "power", _number(h.power_watts, "W"), "power_watts"


def _memory(h: HardwareConfig) -> Iterator[Row]:
    yield "memory", _number(h.memory_gib, "GiB"), "memory_gib"
    yield "memory bandwidth", _number(h.memory_gbps, "GB/s"), "memory_gbps"
    yield "memory bandwidth reached", _number(h.memory_achieved_gbps, "GB/s"), "memory_achieved_gbps"
    yield "second-level cache", _number(h.l2_mib, "MiB"), "l2_mib"
    yield "last cache", _number(h.last_cache_mib, "MiB"), "last_cache_mib"
    yield "on-chip memory of a unit", _number(h.onchip_kib, "KiB"), "onchip_kib"


def _links(h: HardwareConfig, link: LinkConfig, nic: NicConfig) -> Iterator[Row]:
    yield "devices of a node", _number(h.devices_per_node, "").strip(), "devices_per_node"
    if link.shape != "none":
        count = f"{link.count} links" if link.count else "links"
        reach = f" between {link.reach} devices" if link.reach else ""
        yield "links", f"{link.kind} {link.shape}, {count} of {link.gbps or 0:g} GB/s{reach}", "link"
        if link.achieved_gbps:
            low, high = link.achieved_gbps
            yield (
                "one link reached",
                f"{low:g} to {high:g} GB/s" if low < high else f"{low:g} GB/s",
                "link.achieved_gbps",
            )
        groups = [(n, h.group_gbps(n)) for n in (2, 4, 8) if n <= (link.reach or h.devices_per_node or 0)]
        rates = ", ".join(f"{n}: {rate:g}" for n, rate in groups if rate is not None)
        yield (
            "a device's rate in a group of",
            f"{rates} GB/s" if rates else "unknown: it depends on which devices",
            "link",
        )
    yield "links of a device", _number(h.intra_node_gbps, "GB/s"), "intra_node_gbps"
    yield "link to the host", _number(h.host_gbps, "GB/s"), "host_gbps"
    adapters = f"{nic.per_node} {nic.name} of {nic.gbps or 0:g} GB/s" if nic.per_node else ""
    yield "adapters of a node", adapters, "nic"
    yield "network of a device", _number(h.inter_node_gbps, "GB/s"), "inter_node_gbps"


SUMMARY = (
    ("device", "units", "bf16", "fp8", "best bf16", "memory", "HBM", "links", "net"),
    ("", "", "TFLOP/s", "TFLOP/s", "TFLOP/s", "GiB", "GB/s", "GB/s", "GB/s"),
)
"""Head of the overview."""


def summary(hardware: HardwareConfig) -> tuple[str, ...]:
    """One device's line of the overview; `-` where a number is unknown."""
    h = hardware

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:g}"

    units = cell(h.compute_units) + (f"/{h.dies}" if h.dies and h.dies > 1 else "")
    best = h.achieved_tflops.get("bf16")
    return (
        h.name + (f" (1 of {h.parts})" if h.parts > 1 else ""), units, cell(h.peak_tflops.get("bf16")),
        cell(h.peak_tflops.get("fp8")), cell(best), cell(h.memory_gib), cell(h.memory_gbps),
        f"{cell(h.intra_node_gbps)} {h.link.shape}" if h.link.shape != "none" else cell(h.intra_node_gbps),
        cell(h.inter_node_gbps),
    )  # fmt: skip
