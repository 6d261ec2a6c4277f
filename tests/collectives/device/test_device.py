"""Rates of one device: which shapes, how they are timed, what is left out, and how two profiles agree."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from collectives.device import profile as subject
from collectives.device.kernels import (
    Case,
    CopyKernel,
    MatmulKernel,
    agreement,
    copies,
    label,
    matmuls,
    table,
)
from collectives.device.profile import ROUNDS, DeviceBench, grouped_kernel, measure
from collectives.device.smi import parse, read_sensors
from collectives.timing.team import choose_device
from configs.compose import compose
from configs.errors import UserError
from configs.profile import CopyRate, DeviceProfile, MatmulRate, load, save
from configs.rank import RankContext
from configs.schema import RunConfig
from tests.source_tree import ROOT

CPU = torch.device("cpu")
SMALL = MatmulKernel(64, 64, 64, "float")
GIB = 1 << 30


def config_of(*words: str) -> RunConfig:
    return compose(["workload=collectives", "hardware=cpu", *words])


def only(monkeypatch: pytest.MonkeyPatch, *cases: Case) -> None:
    """Measure these instead of the whole list."""
    monkeypatch.setitem(subject._SPREAD, "cpu", 1 << 20)
    monkeypatch.setattr(subject, "matmuls", lambda gpu: [c for c in cases if isinstance(c, MatmulKernel)])
    monkeypatch.setattr(subject, "copies", lambda *free: [c for c in cases if isinstance(c, CopyKernel)])


@pytest.mark.unit
def test_a_gpu_has_over_two_hundred_shapes_dense_and_grouped_on_and_off_size() -> None:
    shapes = matmuls(gpu=True)
    dense = [shape for shape in shapes if shape.experts == 1]
    grouped = [shape for shape in shapes if shape.experts > 1]
    assert len({label(shape) for shape in shapes}) == len(shapes) >= 200
    assert len(dense) >= 160 and len(grouped) >= 48
    assert {4, 64} <= {shape.experts for shape in grouped}
    assert sum(shape.imbalance > 1.2 for shape in grouped) == sum(shape.imbalance == 1 for shape in grouped)
    assert sum(bool(shape.n % 64 or shape.k % 64) for shape in dense) >= 24
    assert {shape.dtype for shape in dense} == {"bfloat16", "half", "float"}
    assert all(shape.n % 8 == shape.k % 8 == 0 for shape in grouped)  # torch's kernel wants 16-byte rows
    assert {shape.layout for shape in dense} == {"forward", "inputs", "weights"}
    assert {shape.layout for shape in grouped} == {"forward", "inputs"}
    for layout in ("forward", "inputs", "weights"):
        off = [s for s in dense if s.layout == layout and (s.m % 8 or s.n % 8 or s.k % 8)]
        assert {True, False} == {s.m % 2 == s.n % 2 == s.k % 2 == 0 for s in off}


@pytest.mark.unit
def test_the_gradient_of_grouped_weights_is_not_to_be_had() -> None:
    with pytest.raises(ValueError, match="isn't measured"):
        MatmulKernel(64, 64, 64, experts=4, layout="weights")


@pytest.mark.unit
@pytest.mark.parametrize("experts", [1, 4])
def test_operands_lie_as_in_the_pass_of_a_layer(experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(subject._SPREAD, "cpu", 1)
    bench, rows, out, inner = DeviceBench(CPU, 1, 0), 48, 24, 16
    stack = (experts,) if experts > 1 else ()
    cases = [
        MatmulKernel(rows, out, inner, experts=experts),
        MatmulKernel(rows, inner, out, experts=experts, layout="inputs"),
    ]
    right = [(*stack, inner, out), (*stack, out, inner)]
    contiguous = [(True, False), (True, True)]
    if experts == 1:
        cases.append(MatmulKernel(out, inner, rows, layout="weights"))
        right.append((rows, inner))
        contiguous.append((False, True))
    for case, shape, rowwise in zip(cases, right, contiguous, strict=True):
        (call,) = bench.calls(case)
        x, w = call.args
        assert x.shape == (case.m, case.k) and tuple(w.shape) == shape
        assert (x.stride(-1) == 1, w.stride(-1) == 1) == rowwise
        assert call().shape == (case.m, case.n)
        torch.testing.assert_close(
            call().float(),
            (x.view(experts, -1, case.k).float() @ w.float()).view(case.m, case.n)
            if experts > 1
            else x.float() @ w.float(),
            rtol=0.02,
            atol=0.1,
        )


@pytest.mark.unit
def test_a_layout_is_part_of_a_name_and_old_profiles_are_forward() -> None:
    inputs = MatmulKernel(64, 64, 64, layout="inputs")
    assert label(inputs) == label(inputs.rate(1.0, 0.0)) == "matmul 64x64x64 bfloat16 inputs"
    row = {"m": 8, "n": 8, "k": 8, "dtype": "float", "time_us": 1.0, "tflops": 1.0, "cv": 0.0}
    assert MatmulRate.model_validate(row).layout == "forward"


@pytest.mark.unit
@pytest.mark.parametrize("skew", [0.0, 0.5, 2.0])
def test_rows_of_the_experts_add_up_and_are_as_uneven_as_told(skew: float) -> None:
    for experts in (4, 32, 64):
        shape = MatmulKernel(4096, 8, 8, experts=experts, skew=skew)
        assert len(shape.rows) == experts and sum(shape.rows) == 4096 and min(shape.rows) >= 0
        assert shape.imbalance == pytest.approx(max(shape.rows) / (4096 / experts), abs=1e-3)
        assert (shape.imbalance == 1) == (skew == 0)


@pytest.mark.unit
def test_copies_stay_within_the_free_memory() -> None:
    plenty = copies(True, 140 * GIB, 200 * GIB)
    assert max(c.size for c in plenty if c.kind == "device") == 4 * GIB
    assert set(Counter(c.kind for c in plenty)) == {
        "device", "host_to_device", "device_to_host", "pinned_to_device", "device_to_pinned",
    }  # fmt: skip
    scarce = copies(True, GIB, GIB)
    assert max(c.size for c in scarce if c.kind == "device") == GIB // 4
    assert max(c.size for c in scarce if c.kind != "device") <= GIB // 8
    assert {c.kind for c in copies(False, GIB, GIB)} == {"device"}


@pytest.mark.unit
def test_rates_are_operations_and_bytes_over_time() -> None:
    assert MatmulKernel(1000, 300, 20).rate(10.0, 0.1).tflops == pytest.approx(
        2 * 1000 * 300 * 20 / 10e-6 / 1e12
    )
    assert MatmulKernel(64, 8, 8, experts=4, skew=1.0).flops == 2 * 64 * 8 * 8
    assert CopyKernel("device", 1000).rate(2.0, 0.1).gbps == pytest.approx(1.0)
    assert CopyKernel("pinned_to_device", 1000).rate(2.0, 0.1).gbps == pytest.approx(0.5)


@pytest.mark.unit
@pytest.mark.parametrize("kernel", ["torch", "loop"])
def test_grouped_products_are_right_and_the_operands_outgrow_the_caches(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grouped_kernel(CPU)[1] is not None
    if kernel == "loop":
        monkeypatch.setattr(subject, "grouped_kernel", lambda device: ("loop", None))
    bench, case = DeviceBench(CPU, 1, 0), MatmulKernel(100, 16, 24, experts=8, skew=1.5)
    shape = MatmulKernel(256, 512, 256, experts=8, skew=1.0)
    assert len(bench.calls(shape)) * shape.elements * 2 >= 64 << 20
    monkeypatch.setitem(subject._SPREAD, "cpu", 1)
    (call,) = bench.calls(case)
    if kernel == "loop":
        parts = call.args[0]
        x, w, made = torch.cat([x for x, _ in parts]), torch.stack([w for _, w in parts]), torch.cat(call())
    else:
        (x, w), made = call.args, call()
    expert = torch.repeat_interleave(torch.arange(8), torch.tensor(case.rows))
    right = torch.einsum("mk,mkn->mn", x.float(), w.float()[expert])
    torch.testing.assert_close(made.float(), right, rtol=0.02, atol=0.1)


@pytest.mark.unit
def test_noise_is_normal_and_never_the_same_twice() -> None:
    bench = DeviceBench(CPU, 1, 0)
    one, other = (bench.random_normal(3, 1 << 21, dtype=torch.float) for _ in range(2))
    assert abs(float(one.mean())) < 0.01 and float(one.std()) == pytest.approx(1, abs=0.01)
    assert abs(float((one * other).mean())) < 0.01


@pytest.fixture(scope="module")
def measured() -> tuple[DeviceProfile, list[str]]:
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(subject._SPREAD, "cpu", 1 << 20)
        return measure(config_of("name=here"), CPU, 1.0, lines.append), lines


@pytest.mark.dist
def test_a_cpu_is_measured_in_shuffled_rounds(measured: tuple[DeviceProfile, list[str]]) -> None:
    profile, lines = measured
    assert (profile.name, profile.hardware, profile.conditions["left_out"]) == ("here", "cpu", {})
    assert profile.conditions["rounds"] == ROUNDS and not profile.conditions["stopped"]
    assert "grouped_mm" in profile.conditions["grouped_matmul"]
    assert [label(rate) for rate in profile.matmuls] == [label(case) for case in matmuls(gpu=False)]
    for rate in profile.matmuls:
        assert rate.tflops == pytest.approx(2 * rate.m * rate.n * rate.k / rate.time_us / 1e6, rel=1e-4)
    for copy in profile.copies:
        assert copy.kind == "device" and copy.gbps == pytest.approx(
            2 * copy.size / copy.time_us / 1e3, rel=1e-4
        )
    cases = len(profile.matmuls) + len(profile.copies)
    orders = [[row.split(": ")[1] for row in lines if f"round {n} of" in row] for n in range(1, ROUNDS + 1)]
    assert [len(order) for order in orders] == [cases] * ROUNDS
    assert (
        len({frozenset(order) for order in orders}) == 1 and len({tuple(order) for order in orders}) == ROUNDS
    )


@pytest.mark.dist
def test_a_profile_comes_back_from_its_file(
    measured: tuple[DeviceProfile, list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "device" / "here.yaml"
    save(measured[0], path)
    again = load(DeviceProfile, str(path))
    assert again == measured[0]
    assert set(agreement(measured[0], again).ratios.values()) == {1.0}


@pytest.mark.dist
def test_what_does_not_fit_the_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = MatmulKernel(1 << 20, 1 << 20, 1 << 20)
    only(monkeypatch, huge, SMALL, CopyKernel("device", 1 << 44), CopyKernel("device", 1 << 16))
    profile = measure(config_of(), CPU, 0.1, lambda line: None)
    assert [label(rate) for rate in profile.matmuls] == [label(SMALL)]
    assert [copy.size for copy in profile.copies] == [1 << 16]
    left_out = profile.conditions["left_out"]
    assert set(left_out) == {label(huge), "copy device 16384 GiB"}
    assert all("out of memory" in note and "GiB needed" in note for note in left_out.values())
    assert profile.conditions["rounds"] == ROUNDS


@pytest.mark.dist
def test_a_device_that_can_do_nothing_gives_no_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, MatmulKernel(1 << 20, 1 << 20, 1 << 20))
    with pytest.raises(RuntimeError, match="nothing could be measured: out of memory"):
        measure(config_of(), CPU, 0.05, lambda line: None)


LIMITED = """
import resource, torch
from collectives.device import profile as device
from collectives.device.kernels import MatmulKernel
from configs.compose import compose
device._SPREAD["cpu"] = 1 << 20
cases = [MatmulKernel(16384, 16384, 16384), MatmulKernel(64, 64, 64)]
device.matmuls, device.copies = lambda gpu: cases, lambda *free: []
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
profile = device.measure(compose(["hardware=cpu"]), torch.device("cpu"), 0.1, lambda line: None)
assert [rate.m for rate in profile.matmuls] == [64], profile
print(profile.conditions["left_out"])
"""


@pytest.mark.dist
def test_torch_running_out_of_memory_leaves_the_shape_out() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "16384x16384x16384" in done.stdout and "allocate memory" in done.stdout


def interrupt_after(lines: int) -> Callable[[str], None]:
    seen: list[str] = []

    def progress(line: str) -> None:
        seen.append(line)
        if len(seen) == lines:
            raise KeyboardInterrupt

    return progress


@pytest.mark.dist
def test_an_interrupt_keeps_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, SMALL, MatmulKernel(32, 32, 32), CopyKernel("device", 1 << 16))
    profile = measure(config_of(), CPU, 0.05, interrupt_after(3))  # the first says that it warms up
    assert len(profile.matmuls) + len(profile.copies) == 2
    assert profile.conditions["stopped"] == "interrupted" and profile.conditions["rounds"] == 0

    def at_once(*case: object) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(DeviceBench, "measure_case", at_once)
    with pytest.raises(KeyboardInterrupt):
        measure(config_of(), CPU, 0.05, lambda line: None)


@pytest.mark.unit
@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_no_time_to_measure_in_is_refused(seconds: float) -> None:
    with pytest.raises(UserError, match=r"--seconds=.* must be above 0; type e.g. --seconds 150$"):
        measure(config_of(), CPU, seconds, lambda line: None)


def profile_of(name: str, *rates: MatmulRate | CopyRate) -> DeviceProfile:
    return DeviceProfile(
        name=name, hardware="cpu", conditions={},
        matmuls=tuple(rate for rate in rates if isinstance(rate, MatmulRate)),
        copies=tuple(rate for rate in rates if isinstance(rate, CopyRate)),
    )  # fmt: skip


@pytest.mark.unit
def test_agreement_counts_what_is_inside_in_both_directions() -> None:
    even, uneven = MatmulKernel(64, 8, 8, experts=4), MatmulKernel(64, 8, 8, experts=4, skew=1.0)
    copy = CopyKernel("device", 1 << 20)
    old = profile_of("old", SMALL.rate(100, 0), even.rate(100, 0), uneven.rate(100, 0), copy.rate(100, 0))
    new = profile_of("new", SMALL.rate(102, 0), even.rate(110, 0), uneven.rate(90, 0),
                     CopyKernel("device", 1 << 21).rate(100, 0))  # fmt: skip
    found = agreement(old, new)
    assert found.ratios == pytest.approx(
        {label(SMALL): 100 / 102, label(even): 1 / 1.1, label(uneven): 1 / 0.9}
    )
    assert found.alone == ("copy device 1 MiB", "copy device 2 MiB") and found.inside == 1
    assert (found.median, found.p95) == pytest.approx((0.1, 1 / 0.9 - 1), rel=1e-4)
    assert found.worst == (label(uneven), pytest.approx(1 / 0.9 - 1, rel=1e-4))
    assert not found.agrees and agreement(old, old).agrees
    assert str(found) == (
        "1 of 3 rates within 3%; deviation median 10.00%, 95th percentile 11.11%, worst 11.11% "
        f"({label(uneven)}); 2 only in one of the two"
    )


@pytest.mark.unit
def test_the_table_tells_every_rate_and_what_was_left_out() -> None:
    profile = profile_of(
        "a", MatmulKernel(64, 8, 8, experts=4).rate(1.0, 0.02), CopyKernel("device", 1 << 20).rate(100, 0)
    )
    left_out = {"copy device 4 GiB": "out of memory"}
    rows = table(profile.model_copy(update={"conditions": {"left_out": left_out}}))
    assert [" ".join(row.split()) for row in rows[1:3]] == [
        "matmul 64x8x8 bfloat16 4 experts, imbalance 1 1.00 0.008192 TFLOP/s 2.0%",
        "copy device 1 MiB 100.00 20.97 GB/s 0.0%",
    ]
    assert rows[3] == "# copy device 4 GiB: left out: out of memory"


@pytest.mark.unit
def test_profiles_without_a_common_shape_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"profiles a \(cpu\) and b \(cpu\) have no shape in common; name a profile"
    ):
        agreement(profile_of("a", SMALL.rate(1, 0)), profile_of("b", MatmulKernel(8, 8, 8).rate(1, 0)))


@pytest.mark.unit
def test_the_drivers_tools_are_read_and_may_be_missing() -> None:
    told = parse("nvidia-smi", "580.82.07, 1755 MHz, 1980 MHz, 3201 MHz, 693.12 W, 700.00 W, 58\n")
    assert (told["driver_version"], told["clocks.sm"], told["power.limit"]) == (
        "580.82.07",
        "1755 MHz",
        "700.00 W",
    )
    assert parse("nvidia-smi", "No devices were found\n") == {}
    assert parse("amd-smi", '[{"gpu": 0}]') == {"amd-smi": [{"gpu": 0}]} and parse("amd-smi", "ERROR") == {}
    assert read_sensors(CPU, lambda: None, lambda: None) == {}


@pytest.mark.gpu
@pytest.mark.timeout(240)
def test_a_gpu_gives_rates_below_its_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    config = config_of(f"hardware={'mi300x' if torch.version.hip else 'h200'}")
    device = choose_device(config, RankContext.from_environment({}, tmp_path))
    only(monkeypatch, MatmulKernel(4096, 4096, 4096), MatmulKernel(4096, 2048, 2048, experts=8, skew=0.5),
         *copies(True, 4 * GIB, 4 * GIB))  # fmt: skip
    profile = measure(config, device, 10.0, lambda line: None)
    assert not profile.conditions["left_out"] and len(profile.matmuls) == 2
    assert all(1 < rate.tflops < config.hardware.peak_tflops["bf16"] for rate in profile.matmuls)
    assert len({copy.kind for copy in profile.copies}) == 5
