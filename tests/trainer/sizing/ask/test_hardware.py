"""The catalogue: every number has a source and a date, and agrees with the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.compose import choices, compose, dump, load
from configs.errors import UserError
from configs.hardware import HardwareConfig, LinkConfig
from trainer.sizing.ask import catalogue, screen

pytestmark = pytest.mark.unit

DEVICES = ["a100", "b200", "b300", "cpu", "gb200", "gb300", "h100", "h100_pcie", "h200", "h800", "mi250x", "mi300x",
           "mi325x", "mi355x"]  # fmt: skip
UNSOURCED = {"name", "kind", "architecture", "parts", "sources"}
CORES = {"ampere": (4, 256), "hopper": (4, 512), "cdna2": (4, 128), "cdna3": (4, 256), "cdna4": (4, 512)}
"""Matrix cores of a compute unit, and bf16 multiply-adds of one in a cycle."""


def numbers(hardware: HardwareConfig) -> Iterator[str]:
    """Dotted names of all that is on record of a device."""
    for name, value in hardware.model_dump(exclude_unset=True).items():
        if name in UNSOURCED or value is None:
            continue
        if isinstance(value, dict):
            yield from (f"{name}.{key}" for key, each in value.items() if each is not None)
        else:
            yield name


def test_the_catalogue_has_every_device() -> None:
    assert choices("hardware") == DEVICES


@pytest.mark.parametrize("name", DEVICES)
def test_every_number_has_one_source_and_every_source_gives_a_number(name: str) -> None:
    hardware = catalogue.device(name)
    have = list(numbers(hardware))
    for field in have:
        givers = [source for source in hardware.sources if field in source.gives]
        wider = [source for source in hardware.sources if field.partition(".")[0] in source.gives]
        assert len(givers) <= 1 and len(wider) <= 1, f"{field} has two sources"
        assert hardware.source_of(field) is not None, f"{field} has no source"
    given = [field for source in hardware.sources for field in source.gives]
    for field in given:
        assert any(one == field or one.startswith(f"{field}.") for one in have), f"{field} isn't on record"
    assert name == "cpu" or len(have) > 10


def test_a_missing_source_would_be_found() -> None:
    bare = catalogue.device("h100").model_copy(update={"sources": ()})
    assert "memory_gib" in list(numbers(bare)) and bare.source_of("memory_gib") is None


@pytest.mark.parametrize(
    ("name", "tolerance"),
    # The published peak is rounded to three digits; MI250X: 383 by two dies.
    [
        ("a100", 0.001),
        ("h100", 0.001),
        ("h200", 0.001),
        ("mi250x", 0.001),
        ("mi300x", 0.001),
        ("mi355x", 0.001),
    ],
)
def test_a_peak_is_clock_times_cores(name: str, tolerance: float) -> None:
    hardware = catalogue.device(name)
    cores, per_cycle = CORES[str(hardware.architecture)]
    assert hardware.compute_units and hardware.clock_mhz
    peak = hardware.clock_mhz * 1e6 * hardware.compute_units * cores * per_cycle * 2 / 1e12
    assert hardware.peak_tflops["bf16"] == pytest.approx(peak, rel=tolerance)


@pytest.mark.parametrize("name", DEVICES)
def test_links_and_adapters_add_up(name: str) -> None:
    hardware = catalogue.device(name)
    link, nic = hardware.link, hardware.nic
    if link.shape in ("switch", "mesh"):
        assert link.count and link.gbps and hardware.intra_node_gbps == pytest.approx(link.count * link.gbps)
    if nic.per_node and nic.gbps and hardware.devices_per_node:
        assert hardware.inter_node_gbps == pytest.approx(nic.per_node * nic.gbps / hardware.devices_per_node)
    for precision, best in hardware.achieved_tflops.items():
        assert best < hardware.peak_tflops[precision] and precision in hardware.achieved_shapes
    if hardware.memory_achieved_gbps and hardware.memory_gbps:
        assert hardware.memory_achieved_gbps < hardware.memory_gbps


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("h100", {2: 450, 4: 450, 8: 450, 16: None}),  # a switch: any size at the full rate
        ("h800", {2: 200, 8: 200}),
        ("gb200", {2: 900, 8: 900, 72: 900, 73: None}),
        ("mi300x", {2: 64, 4: 192, 8: 448, 9: None}),  # a mesh: n - 1 links
        ("mi355x", {2: 76.5, 8: 535.5}),
        ("h100_pcie", {2: 300, 4: 63, 8: 63, 16: None}),  # bridged pairs, PCIe beyond
        ("mi250x", {2: None, 8: None}),  # it depends on which
        ("cpu", {2: None}),
    ],
)
def test_what_a_group_gets(name: str, rates: dict[int, float | None]) -> None:
    hardware = catalogue.device(name)
    assert {ranks: hardware.group_gbps(ranks) for ranks in rates} == rates


def test_what_was_measured_over_a_link() -> None:
    assert catalogue.device("mi300x").group_gbps(8, achieved=True) == pytest.approx(7 * 46.5)
    assert catalogue.device("h800").group_gbps(8, achieved=True) == pytest.approx(160)
    assert catalogue.device("h100").group_gbps(8, achieved=True) is None
    with pytest.raises(ValueError, match="a group of 1"):
        catalogue.device("h100").group_gbps(1)


def test_a_mesh_without_a_rate_stays_unknown() -> None:
    hardware = HardwareConfig(name="x", kind="rocm", link=LinkConfig(kind="xgmi", shape="mesh", reach=8))
    assert hardware.group_gbps(8) is None and hardware.source.startswith(
        "its peak and bandwidths are unknown"
    )


def test_the_ridge_points_of_the_reference() -> None:
    ridges = {
        name: catalogue.device(name)
        for name in ("a100", "h100", "h200", "b200", "mi300x", "mi325x", "mi355x")
    }
    points = {n: round(h.peak_tflops["bf16"] * 1e3 / (h.memory_gbps or 1)) for n, h in ridges.items()}
    assert points == {
        "a100": 153,
        "h100": 295,
        "h200": 206,
        "b200": 281,
        "mi300x": 247,
        "mi325x": 218,
        "mi355x": 314,
    }


def test_a_device_of_two_dies_is_one_of_them() -> None:
    half = catalogue.device("mi250x")
    assert half.parts == 2
    assert (half.parts * half.peak_tflops["bf16"], half.parts * (half.compute_units or 0)) == (383.0, 220)


def test_a_typed_number_has_no_published_source() -> None:
    typed = compose(["hardware=h100", "hardware.memory_gib=94", "hardware.peak_tflops.bf16=800"]).hardware
    assert catalogue.provenance(typed, "memory_gib").startswith("typed")
    assert catalogue.provenance(typed, "peak_tflops.bf16").startswith("typed")
    assert catalogue.provenance(typed, "peak_tflops.fp8").startswith("NVIDIA H100 datasheet")
    assert any("94 GiB" in line and line.endswith("typed") for line in screen.hardware_table(typed))


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_survives_being_saved(name: str, tmp_path: Path) -> None:
    config = compose(["model=demo", f"hardware={name}"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


def test_a_date_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="date"):
        compose(["hardware=h100", "hardware.sources=[{name: a, what: x, date: soon, gives: []}]"])


def test_the_table_shows_unknown_numbers_as_unknown() -> None:
    lines = list(screen.hardware_tables(catalogue.devices()))
    row = next(line for line in lines if line.startswith("  b300"))
    assert row.split()[:5] == ["b300", "-", "2250", "4500", "1769"]
    assert any(line.startswith("  mi250x (1 of 2)") for line in lines)
    assert all(len(line) <= screen.WIDTH for line in lines)
