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


def rows(hardware: HardwareConfig) -> Iterator[Row]:
    """All that is on record of a device, in the order of the table."""
    h = hardware
    for precision, peak in h.peak_tflops.items():
        yield f"peak {precision}", f"{peak:g} TFLOP/s", f"peak_tflops.{precision}"
        best, shape = h.achieved_tflops.get(precision), h.achieved_shapes.get(precision)
        if best is not None:
            at = f" at {' x '.join(map(str, shape))}" if shape else ""
            yield (
                f"best matmul {precision}",
                f"{best:g} TFLOP/s ({best / peak:.1%}){at}",
                f"achieved_tflops.{precision}",
            )
    for what, rate in h.attention_tflops.items():
        direction, _, tokens = what.partition("_")
        yield f"attention {direction}", f"{rate:g} TFLOP/s at {tokens} tokens", "attention_tflops"
    table = (
        ("compute units", _number(h.compute_units), "compute_units"),
        ("dies", _number(h.dies), "dies"),
        ("devices of a module", _number(h.parts if h.parts > 1 else None), "parts"),
        ("clock", _number(h.clock_mhz, "MHz"), "clock_mhz"),
        ("power", _number(h.power_watts, "W"), "power_watts"),
        ("memory", _number(h.memory_gib, "GiB"), "memory_gib"),
        ("memory bandwidth", _number(h.memory_gbps, "GB/s"), "memory_gbps"),
        ("memory bandwidth reached", _number(h.memory_achieved_gbps, "GB/s"), "memory_achieved_gbps"),
        ("second-level cache", _number(h.l2_mib, "MiB"), "l2_mib"),
        ("last cache", _number(h.last_cache_mib, "MiB"), "last_cache_mib"),
        ("on-chip memory of a unit", _number(h.onchip_kib, "KiB"), "onchip_kib"),
        ("devices of a node", _number(h.devices_per_node), "devices_per_node"),
        *(_links(h, h.link) if h.link.shape != "none" else ()),
        ("links of a device", _number(h.intra_node_gbps, "GB/s"), "intra_node_gbps"),
        ("link to the host", _number(h.host_gbps, "GB/s"), "host_gbps"),
        ("adapters of a node", _adapters(h.nic), "nic"),
        ("network of a device", _number(h.inter_node_gbps, "GB/s"), "inter_node_gbps"),
    )
    yield from (row for row in table if row[1])


def _number(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:g} {unit}".strip()


def _links(h: HardwareConfig, link: LinkConfig) -> Iterator[Row]:
    count = f"{link.count} links" if link.count else "links"
    reach = f" between {link.reach} devices" if link.reach else ""
    yield "links", f"{link.kind} {link.shape}, {count} of {link.gbps or 0:g} GB/s{reach}", "link"
    if link.achieved_gbps:
        low, high = link.achieved_gbps
        yield "one link reached", f"{f'{low:g} to ' if low < high else ''}{high:g} GB/s", "link.achieved_gbps"
    groups = [(n, h.group_gbps(n)) for n in (2, 4, 8) if n <= (link.reach or h.devices_per_node or 0)]
    rates = ", ".join(f"{n}: {rate:g}" for n, rate in groups if rate is not None)
    known = f"{rates} GB/s" if rates else "unknown: it depends on which devices"
    yield "a device's rate in a group of", known, "link"


def _adapters(nic: NicConfig) -> str:
    return f"{nic.per_node} {nic.name} of {nic.gbps or 0:g} GB/s" if nic.per_node else ""


SUMMARY = (
    ("device", "units", "bf16", "fp8", "best bf16", "memory", "HBM", "links", "net"),
    ("", "", "TFLOP/s", "TFLOP/s", "TFLOP/s", "GiB", "GB/s", "GB/s", "GB/s"),
)
"""Head of the overview."""


def summary(hardware: HardwareConfig) -> tuple[str, ...]:
    """One device's line of the overview; `-` where a number is unknown."""
    h = hardware
    units, bf16, fp8, best, *rest = (
        "-" if value is None else f"{value:g}"
        for value in (
            h.compute_units, h.peak_tflops.get("bf16"), h.peak_tflops.get("fp8"), h.achieved_tflops.get("bf16"),
            h.memory_gib, h.memory_gbps, h.intra_node_gbps, h.inter_node_gbps,
        )
    )  # fmt: skip
    rest[2] += f" {h.link.shape}" if h.link.shape != "none" else ""
    name = h.name + (f" (1 of {h.parts})" if h.parts > 1 else "")
    return name, units + (f"/{h.dies}" if (h.dies or 1) > 1 else ""), bf16, fp8, best, *rest
