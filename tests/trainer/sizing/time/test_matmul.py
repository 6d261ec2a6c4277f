"""Matmul times: against published and measured ones, held-out shapes, tile and wave rules, and what is refused."""

from __future__ import annotations

import math
import statistics

import pytest

from configs.compose import choices, compose
from configs.errors import UserError
from configs.hardware import HardwareConfig
from configs.profile import DeviceProfile, load
from tests.trainer.sizing.bench_matmul import cross_validated, shape_of
from tests.trainer.sizing.time import synthetic
from trainer.sizing.time.kernels import (
    GROUPED,
    TILES,
    Chip,
    KernelKind,
    MatmulModel,
    MatmulParameters,
    MatmulShape,
    level,
    shares,
)
from trainer.sizing.time.matmul import DEFAULTS, Kernels

pytestmark = pytest.mark.unit

#: H100, bf16: m, n, k, TFLOP/s. XLA's performance table (xla/service/gpu/model/matmul_interpolator_data.h, Apache-2.0).
XLA_H100 = (
    (1024, 2048, 256, 139.5), (256, 2048, 2048, 332.2), (4096, 512, 512, 238.8), (256, 2048, 4096, 285.9),
    (4096, 1024, 512, 343.7), (2048, 2048, 2048, 632.0), (4096, 4096, 256, 392.2), (2048, 512, 2048, 347.7),
    (4096, 4096, 4096, 783.3), (512, 4096, 1024, 373.3), (4096, 2048, 512, 447.0), (2048, 1024, 2048, 523.3),
    (4096, 256, 2048, 304.7), (1024, 1024, 2048, 350.0), (256, 4096, 2048, 324.6), (1024, 2048, 2048, 524.3),
    (1024, 512, 2048, 220.0), (512, 2048, 1024, 232.6),
)  # fmt: skip


def hardware(name: str) -> HardwareConfig:
    return compose([f"hardware={name}"]).hardware


def form(units: int = 132, family: str = "hopper", **values: float) -> MatmulModel:
    tuning = {"rate": 800e12, "bandwidth": 3e12, "power": 3.0} | values
    return MatmulModel(
        Chip(units, TILES[family], GROUPED.get(family)), MatmulParameters(**{**vars(DEFAULTS), **tuning})
    )


@pytest.fixture(scope="module")
def h100() -> DeviceProfile:
    """What was measured on one."""
    return load(DeviceProfile, "h100")


@pytest.fixture(scope="module")
def made() -> DeviceProfile:
    """A made-up device."""
    return synthetic.profile()


# ---- against measurements ----


def test_the_catalogue_alone_gives_published_h100_rates() -> None:
    kernels = Kernels(hardware("h100"))
    ratios = []
    for m, n, k, tflops in XLA_H100:
        figure = kernels.matmul_figure("matmul", MatmulShape(m, n, k))
        assert figure is not None
        measured = 2 * m * n * k / tflops / 1e12
        ratios.append(figure.value / measured)
        assert figure.low <= measured <= figure.high, (m, n, k, figure.value / measured)
    assert statistics.mean(abs(ratio - 1) for ratio in ratios) < 0.12


@pytest.mark.parametrize("name", [n for n in choices("hardware") if n != "cpu"])
def test_the_best_matmul_on_record_is_what_sets_the_rate(name: str) -> None:
    device = hardware(name)
    kernels = Kernels(device)
    for precision, tflops in device.achieved_tflops.items():
        shape = device.achieved_shapes.get(precision, (8192, 8192, 8192))
        seconds = kernels.matmul(*shape, precision=precision)
        if device.compute_units is None:
            assert math.isnan(seconds) and "compute units" in kernels.why(precision)
            continue
        assert 2 * math.prod(shape) / seconds / 1e12 == pytest.approx(tflops, rel=0.01)


@pytest.mark.timeout(180)
def test_shapes_held_out_of_the_h100_profile_are_predicted(h100: DeviceProfile) -> None:
    """Rates over shapes that the fit hasn't seen, dense and grouped; `bench_matmul` also leaves out all of one [n, k]."""
    pairs = cross_validated(hardware("h100"), h100, "random")
    dense = [
        r
        for row, r in pairs
        if row.experts == 1 and row.dtype == "bfloat16" and shape_of(row).kind == KernelKind.ALIGNED
    ]
    grouped = [r for row, r in pairs if row.experts > 1]
    assert len(dense) > 150 and len(grouped) == 116
    for part, most in ((dense, 0.06), (grouped, 0.05)):
        assert statistics.mean(abs(1 / ratio - 1) for ratio, _, _ in part) < most
        assert sum(low <= 1 <= high for _, low, high in part) / len(part) > 0.85


def test_a_device_that_follows_other_formulas_is_predicted_too(made: DeviceProfile) -> None:
    kernels = Kernels(hardware("h100"), made)
    errors = []
    for row in synthetic.fresh(100, seed=7):
        figure = kernels.matmul_figure("matmul", MatmulShape(row.m, row.n, row.k))
        assert figure is not None
        errors.append(abs(row.time_us / 1e6 / figure.value - 1))
    assert statistics.mean(errors) < 0.15


def test_unaligned_widths_are_as_slow_as_measured(made: DeviceProfile, h100: DeviceProfile) -> None:
    for profile in (made, h100):
        kernels = Kernels(hardware("h100"), profile)
        rows = [r for r in profile.matmuls if shape_of(r).kind != KernelKind.ALIGNED and r.m >= 1024]
        assert {row.layout for row in rows} == {"forward", "inputs", "weights"}
        for row in rows:
            seconds = kernels.matmul(row.m, row.n, row.k, layout=row.layout)
            assert seconds == pytest.approx(row.time_us / 1e6, rel=0.2)


def test_a_precision_with_few_shapes_takes_its_rate_from_them(made: DeviceProfile) -> None:
    kernels = Kernels(hardware("h100"), made)
    bf16, fp32 = kernels.matmul(8192, 4096, 4096), kernels.matmul(8192, 4096, 4096, precision="fp32")
    assert bf16 and fp32
    assert fp32 / bf16 == pytest.approx(synthetic.RATE / synthetic.FLOAT_RATE, rel=0.1)


def test_fp8_that_no_profile_has_comes_from_the_catalogue(h100: DeviceProfile) -> None:
    kernels = Kernels(hardware("h100"), h100)
    figure = kernels.matmul_figure("matmul", MatmulShape(8192, 8192, 8192), "fp8")
    assert figure is not None and "catalogue: 1402.6 TFLOP/s fp8" in figure.derivation
    assert figure.high / figure.low > 1.5


# ---- rules ----


@pytest.mark.parametrize(
    ("units", "tile", "m", "n", "waves", "fill"),
    [  # the reference's table of wave efficiencies
        (132, (128, 256), 4096, 4096, 4, 0.970), (132, (128, 256), 8192, 28672, 55, 0.987),
        (132, (128, 256), 1024, 1536, 1, 0.364), (148, (128, 256), 4096, 4096, 4, 0.865),
        (304, (256, 256), 8192, 8192, 4, 0.842), (304, (256, 128), 8192, 8192, 7, 0.962),
        (304, (128, 128), 4096, 1536, 2, 0.632), (256, (256, 256), 4096, 2048, 1, 0.5),
    ],
)  # fmt: skip
def test_tiles_fill_waves(units: int, tile: tuple[int, int], m: int, n: int, waves: int, fill: float) -> None:
    plan = MatmulModel(
        Chip(units, (tile,), None), MatmulParameters(**{**vars(DEFAULTS), "rate": 1e15, "bandwidth": 1e13})
    ).plan(MatmulShape(m, n, 256))
    assert plan.waves == waves
    assert plan.blocks / (plan.waves * units) == pytest.approx(fill, abs=0.001)


def test_one_row_more_than_a_wave_holds_costs_a_wave() -> None:
    one = MatmulModel(
        Chip(132, ((128, 256),), None),
        MatmulParameters(**{**vars(DEFAULTS), "rate": 8e14, "bandwidth": 3e12}),
    )
    full, over = (
        one.choose(MatmulShape(128 * 33, 1024, 4096)),
        one.choose(MatmulShape(128 * 33 + 1, 1024, 4096)),
    )
    assert (full.plan.waves, over.plan.waves) == (1, 2)
    assert over.arithmetic == pytest.approx(2 * full.arithmetic)


def test_a_long_inner_width_is_split_where_tiles_are_few() -> None:
    few = form().plan(MatmulShape(128, 128, 65536))
    many = form().plan(MatmulShape(16384, 8192, 65536))
    assert few.parts > 1 and many.parts == 1


def test_an_expert_s_rows_are_rounded_to_two_tiles_on_hopper() -> None:
    one = form()
    blocks = [
        one.plan(MatmulShape(8 * rows, 256, 2048, experts=8)).blocks for rows in (256, 257, 512, 128, 64)
    ]
    assert blocks == [8 * 2, 8 * 4, 8 * 4, 8 * 2 * 2, 8 * 2 * 2]
    assert one.plan(MatmulShape(8 * 128, 256, 2048, experts=8)).tile == (64, 128)
    assert one.plan(MatmulShape(8 * 129, 256, 2048, experts=8)).tile == (128, 256)


def test_uneven_experts_take_longer() -> None:
    times = [
        form().choose(MatmulShape(16384, 2048, 2048, experts=32, imbalance=skew)).seconds
        for skew in (1.0, 2.0, 6.0)
    ]
    assert times[0] < min(times[1:])


def test_the_weights_gradient_sums_over_the_rows() -> None:
    one = form()
    plan = one.plan(MatmulShape(2048, 1024, 16384, experts=8, layout="weights"))
    assert plan.blocks == 8 * 16 * 4
    even, uneven = (
        one.choose(MatmulShape(2048, 1024, 16384, experts=8, layout="weights", imbalance=i)).seconds
        for i in (1.0, 3.0)
    )
    assert even < uneven
    dense = one.choose(MatmulShape(8 * 2048, 1024, 2048)).seconds
    assert even == pytest.approx(dense, rel=0.3)


@pytest.mark.parametrize(("experts", "imbalance"), [(8, 1.0), (64, 2.5), (16, 16.0), (1, 1.0)])
def test_shares_add_up_and_the_largest_is_as_asked(experts: int, imbalance: float) -> None:
    parts = shares(experts, imbalance)
    assert len(parts) == experts and sum(parts) == pytest.approx(1)
    assert max(parts) * experts == pytest.approx(imbalance, rel=0.01)


def test_the_power_limit_slows_what_is_dense_and_spares_what_is_not() -> None:
    hot, cool = form(power=0.7), form(power=3.0)
    large, small = MatmulShape(16384, 8192, 8192), MatmulShape(256, 1024, 1024)
    assert hot.choose(large).slowing == pytest.approx((0.95 / 0.7) ** (1 / 3), rel=0.03)
    assert hot.choose(small).seconds == cool.choose(small).seconds


def test_small_batches_are_bound_by_memory() -> None:
    choice = form().choose(MatmulShape(16, 8192, 8192))
    assert choice.memory > choice.arithmetic
    assert choice.seconds > 2 * 8192 * 8192 / 3e12


@pytest.mark.parametrize(
    ("size", "doublings"), [(16, 0), (32, 1), (96, 1), (192, 2), (128, 3), (4096, 3), (10000, 0)]
)
def test_levels_of_alignment(size: int, doublings: int) -> None:
    assert level(size) == doublings


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        (MatmulShape(1001, 1024, 1024), KernelKind.ALIGNED),
        (MatmulShape(1024, 1028, 1024), KernelKind.EVEN),
        (MatmulShape(1024, 1024, 1025), KernelKind.ODD),
        (MatmulShape(1024, 1025, 1024), KernelKind.ODD_RESULT),
        (MatmulShape(1001, 1024, 1025, layout="inputs"), KernelKind.ODD),
        (MatmulShape(1001, 1025, 1024, layout="inputs"), KernelKind.ODD_RESULT),
        # An odd number of tokens is the inner width of the weights' gradient, and no row's length.
        (MatmulShape(1024, 1024, 1001, layout="weights"), KernelKind.ALIGNED),
        (MatmulShape(1025, 1024, 1001, layout="weights"), KernelKind.ODD),
        (MatmulShape(1024, 1025, 1001, layout="weights"), KernelKind.ODD_RESULT),
        (MatmulShape(1024, 1024, 1025, bytes=4), KernelKind.EVEN),
        (MatmulShape(1024, 1024, 1028, bytes=4), KernelKind.ALIGNED),
        (MatmulShape(1024, 1024, 1032, bytes=1), KernelKind.EVEN),
    ],
)
def test_kernels_go_by_where_rows_begin(shape: MatmulShape, kind: KernelKind) -> None:
    assert shape.kind == kind


def test_each_step_of_misalignment_costs_more_and_is_known_less(h100: DeviceProfile) -> None:
    for profile in (None, h100):
        kernels = Kernels(hardware("h100"), profile)
        figures = [kernels.matmul_figure("matmul", MatmulShape(8192, n, 4096)) for n in (4096, 4098, 4097)]
        times = [figure.value for figure in figures if figure]
        assert len(times) == 3 and times[1] > 2 * times[0] and times[2] > 2 * times[1]
        assert all(f and a and f.high / f.low > a.high / a.low for a, f in [figures[:2], figures[::2]])


def test_wider_never_costs_less_by_more_than_alignment_gives() -> None:
    """A width that is padded to the next multiple of 64 is never slower, when it wasn't a multiple of 8."""
    one = form()
    for n in (2047, 2730, 4097, 10922, 50257):
        padded = -(-n // 64) * 64
        assert (
            one.choose(MatmulShape(8192, padded, 2048)).seconds
            < one.choose(MatmulShape(8192, n, 2048)).seconds
        )


# ---- what is unknown ----


def test_a_cpu_has_no_times_and_says_why() -> None:
    kernels = Kernels(hardware("cpu"))
    assert math.isnan(kernels.matmul(1024, 1024, 1024))
    assert kernels.matmul_figure("matmul", MatmulShape(8, 8, 8)) is None
    assert "is a CPU" in kernels.why()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"compute_units": None}, "no number of compute units"),
        ({"architecture": "volta"}, "architecture=volta; tiles are known of ampere, hopper"),
        ({"memory_gbps": None, "memory_achieved_gbps": None}, "no memory bandwidth"),
        ({"peak_tflops": {}, "achieved_tflops": {}}, "no bf16 rate"),
    ],
)
def test_what_a_device_lacks_is_named(change: dict[str, object], reason: str) -> None:
    kernels = Kernels(hardware("h100").model_copy(update=change))
    assert math.isnan(kernels.matmul(1024, 1024, 1024))
    assert reason in kernels.why()


def test_an_unknown_precision_is_named() -> None:
    assert "precision int4 is none of bf16, fp16, fp32, fp8" in Kernels(hardware("h100")).why("int4")


def test_another_device_s_profile_is_refused(made: DeviceProfile) -> None:
    with pytest.raises(UserError, match="profile synthetic is of hardware=h100, not of mi300x"):
        Kernels(hardware("mi300x"), made)


# ---- figures ----


def test_a_figure_tells_its_tiles_and_its_source(h100: DeviceProfile) -> None:
    kernels = Kernels(hardware("h100"), h100)
    figure = kernels.matmul_figure("matmul", MatmulShape(8192, 4096, 4096))
    assert figure is not None
    assert figure.low < figure.value < figure.high
    assert figure.value == kernels.matmul(8192, 4096, 4096)
    for words in (
        "waves on 132 units",
        "TFLOP/s, memory",
        "profile h100, fitted to 229 dense and 116 grouped",
    ):
        assert words in figure.derivation


def test_answers_are_cached_by_all_that_matters(made: DeviceProfile) -> None:
    kernels = Kernels(hardware("h100"), made)
    questions = {
        kernels.matmul(8192, 2048, 4096), kernels.matmul(8192, 2048, 4096, experts=16),
        kernels.matmul(8192, 2048, 4096, experts=16, imbalance=2.0),
        kernels.matmul(8192, 2048, 4096, experts=16, layout="weights"), kernels.matmul(8192, 2048, 4096, precision="fp32"),
    }  # fmt: skip
    assert len(questions) == 5
    assert kernels.matmul(8192, 2048, 4096) in questions
