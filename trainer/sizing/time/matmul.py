"""Seconds of a matmul, grouped or not: from a device's measured profile, or from the catalogue.

With a profile the numbers of `trainer.sizing.time.kernels` are fitted to its matmuls, and what they miss is corrected by
what they miss at shapes nearby. Without one the best matmul on record sets the rate, and the rest is as stated in
`DEFAULTS`. A device that lacks what is needed gives None, and `reason` says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial

from configs.errors import UserError
from configs.hardware import HardwareConfig
from configs.profile import DeviceProfile, Operands, known
from trainer.sizing.figures import Figure
from trainer.sizing.time import fits, fitting
from trainer.sizing.time.kernels import (
    GROUPED,
    TILES,
    Chip,
    Form,
    KernelKind,
    KernelTime,
    MatmulShape,
    Tuning,
)

_DTYPES = {"bf16": "bfloat16", "fp16": "half", "fp32": "float"}
_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0, "fp8": 1.0}

DEFAULTS = Tuning(
    rate=1.0, launch=4e-6, ramp=95.0, feed=27.0, bandwidth=1.0, split=3.5, power=1.0,
    inner=(1.06, 1.04, 1.02), outer=(1.06, 1.04, 1.02),
    even=0.26, even_feed=108.0, odd=0.13, odd_feed=47.0, odd_result=0.098, slow_ramp=150.0,
    grouped_rate=0.95, grouped_launch=6e-6, grouped_ramp=1.5, expert=2e-7,
)  # fmt: skip
"""Where nothing was measured. `ramp`, `feed`, `split`: fitted to 28 matmuls of XLA's table for H100
(xla/service/gpu/model/matmul_interpolator_data.h, 2025); `launch`: the fixed time there is 5.3 us, of which 1 to 2 us
pass between kernels; `inner`, `outer`, `even` to `slow_ramp` and grouped: the H100 profile's of 2026-11 with torch 2.11
(a library of 2024 lost less: a SwiGLU of 10922 took 1.46 times as long as one of 10944, arXiv 2401.14489). `rate` and
`bandwidth` are the device's."""
_ACHIEVED_BANDWIDTH = 0.85
"""Of the peak: H100 91 %, MI300X 82 % (Zyphra et al. 2025)."""
_ACHIEVED_RATE = {"cuda": 0.79, "rocm": 0.6}
"""Best matmul over the peak where none is on record: the median of the catalogue's devices of that kind."""
_BIG = (8192, 8192, 8192)
_INTERVALS = {"achieved": fitting.UNMEASURED, "peak": (0.6, 1.7)}
"""Measured over predicted, by what the rate is from."""
_SLOW = (0.4, 1.6)
"""The same where rows aren't 16 bytes apart and no such shape was measured: another device or library may lose less."""


@dataclass(frozen=True)
class _Precision:
    """How matmuls of one precision are timed."""

    form: Form
    basis: str
    """What the rate is from."""
    dense: fitting.Misses | None
    grouped: fitting.Misses | None
    interval: tuple[float, float]
    """Where nothing was measured."""

    def misses(self, shape: MatmulShape) -> fitting.Misses | None:
        return self.dense if shape.experts == 1 else self.grouped

    def seconds(self, shape: MatmulShape) -> tuple[float, KernelTime]:
        choice = self.form.choose(shape)
        misses = self.misses(shape)
        return choice.seconds * (math.exp(misses.at(fitting.place(shape))) if misses else 1.0), choice

    def between(self, shape: MatmulShape) -> tuple[float, float]:
        """Ratios of measured over predicted; wider where the ragged dimension is one that no profile has."""
        misses = self.misses(shape)
        low, high = misses.between(fitting.place(shape)) if misses else self.interval
        if shape.kind != KernelKind.ALIGNED and not (misses and misses.has(shape.kind)):
            low, high = min(low, _SLOW[0]), max(high, _SLOW[1])
        return (low * 0.9, high * 1.15) if shape.inner and misses else (low, high)


@dataclass
class Kernels:
    """Times of one kind of device. Make it by `Kernels.of`; answers are cached by shape."""

    hardware: HardwareConfig
    profile: DeviceProfile | None = None
    _precisions: dict[str, _Precision | str] = field(default_factory=dict, repr=False)
    """How each is timed, or why it isn't."""
    _cache: dict[tuple[object, ...], float] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, hardware: HardwareConfig, profile: DeviceProfile | None = None) -> Kernels:
        """The times of `hardware`, from `profile` where there is one.

        Raises:
            UserError: where the profile is of another device.
        """
        if profile is not None and profile.hardware != hardware.name:
            raise UserError(
                f"profile {profile.name} is of hardware={profile.hardware}, not of {hardware.name}; name a profile of "
                f"{hardware.name}, or leave it out to compute from the catalogue"
            )
        return cls(hardware, profile)

    # ---- seconds ----

    def matmul(
        self, m: int, n: int, k: int, experts: int = 1, precision: str = "bf16", imbalance: float = 1.0,
        layout: Operands = "forward",
    ) -> float | None:  # fmt: skip
        """Seconds of [m, k] times [k, n]; None where unknown, and `why` says why.

        Args:
            m: rows; of all experts together where it is grouped by rows.
            n: columns of the result.
            k: inner width; of all experts together where it is grouped by the inner dimension.
            experts: matmuls of one grouped call; 1 for a dense one.
            precision: of the operands: `bf16`, `fp16`, `fp32` or `fp8`.
            imbalance: the fullest expert's rows over the mean.
            layout: the pass of a linear layer that it is, which says how its operands lie; in the weights' gradient
                experts differ in the inner dimension.
        """
        key = (m, n, k, experts, precision, imbalance, layout)
        seconds = self._cache.get(key)
        if seconds is None:
            model = self._precision(precision)
            if model is None:
                return None
            shape = MatmulShape(m, n, k, experts, imbalance, layout, _BYTES[precision])
            seconds = self._cache[key] = model.seconds(shape)[0]
        return seconds

    def why(self, precision: str = "bf16") -> str:
        """Why matmuls of a precision have no time; empty where they have one."""
        timed = self._timed(precision)
        return timed if isinstance(timed, str) else ""

    # ---- figures ----

    def matmul_figure(self, name: str, shape: MatmulShape, precision: str = "bf16") -> Figure | None:
        """`matmul` with its interval and derivation; None where unknown."""
        model = self._precision(precision)
        if model is None:
            return None
        shape = replace(shape, bytes=_BYTES[precision])
        seconds, choice = model.seconds(shape)
        low, high = model.between(shape)
        how = partial(_derivation, model, shape, choice, seconds)
        return Figure(name, seconds, "s", seconds * low, seconds * high, how)

    # ---- models ----

    def _precision(self, precision: str) -> _Precision | None:
        timed = self._timed(precision)
        return None if isinstance(timed, str) else timed

    def _timed(self, precision: str) -> _Precision | str:
        if precision not in self._precisions:
            self._precisions[precision] = self._make(precision)
        return self._precisions[precision]

    def _make(self, precision: str) -> _Precision | str:
        """How a precision is timed, or why it isn't."""
        if precision not in _BYTES:
            return f"precision {precision} is none of {', '.join(_BYTES)}"
        chip = _chip(self.hardware)
        if isinstance(chip, str):
            return chip
        if self.profile is not None and precision in _DTYPES:
            rows = _measured(self.profile, _DTYPES[precision], _BYTES[precision])
            if rows:
                return self._fitted(chip, precision, rows)
        return self._catalogue(chip, precision)

    def _fitted(self, chip: Chip, precision: str, rows: list[fitting.Measured]) -> _Precision | str:
        start, name = self._catalogue(chip, precision), self.profile.name if self.profile else ""
        if precision != "bf16":  # few shapes: all but the rate is bf16's
            base = self._precision("bf16")
            if base is not None:
                tuning = fitting.fit(chip, base.form.tuning, ("rate",), rows)
                form, basis = Form(chip, tuning), f"profile {name}, {len(rows)} shapes of {precision}"
                missed = fitting.missed(rows, fitting.misses(form, rows))
                return _Precision(form, basis, missed, None, _INTERVALS["achieved"])
        if isinstance(start, str):
            return start
        dense = [row for row in rows if row[0].experts == 1]
        grouped = [row for row in rows if row[0].experts > 1]
        tuning, off, grouped_off = fits.fitted(
            name, chip, start.form.tuning, dense, grouped, lambda: known(DeviceProfile, name) == self.profile
        )
        basis = f"profile {name}, fitted to {len(dense)} dense and {len(grouped)} grouped shapes"
        misses = fitting.missed(dense, off), fitting.missed(grouped, grouped_off)
        return _Precision(Form(chip, tuning), basis, *misses, start.interval)

    def _catalogue(self, chip: Chip, precision: str) -> _Precision | str:
        hardware, bandwidth = self.hardware, _bandwidth(self.hardware)
        if bandwidth is None:
            return f"{hardware.name} has no memory bandwidth on record"
        achieved, peak = hardware.achieved_tflops.get(precision), hardware.peak_tflops.get(precision)
        if achieved is None and peak is None:
            return f"{hardware.name} has no {precision} rate on record"
        best = achieved or _ACHIEVED_RATE[hardware.kind] * (peak or 0.0)
        m, n, k = hardware.achieved_shapes.get(precision, _BIG)
        shape = MatmulShape(m, n, k, bytes=_BYTES[precision])
        start = replace(DEFAULTS, rate=best * 1e12, bandwidth=bandwidth)
        tuning = fitting.solve_rate(chip, start, shape, shape.flops / (best * 1e12))
        if achieved:
            basis = f"catalogue: {best:g} TFLOP/s {precision} measured at {m} x {n} x {k}"
        else:
            share = _ACHIEVED_RATE[hardware.kind]
            basis = (
                f"catalogue: {share:.0%} of the {precision} peak, as devices of its kind reach; none measured"
            )
        return _Precision(
            Form(chip, tuning), basis, None, None, _INTERVALS["achieved" if achieved else "peak"]
        )


def _chip(hardware: HardwareConfig) -> Chip | str:
    if hardware.kind == "cpu":
        return f"{hardware.name} is a CPU; only devices with compute units are modelled"
    if hardware.compute_units is None:
        return f"{hardware.name} has no number of compute units on record"
    family = (hardware.architecture or "").rstrip("0123456789")
    if family not in TILES:
        return (
            f"{hardware.name} has architecture={hardware.architecture}; tiles are known of {', '.join(TILES)}"
        )
    return Chip(hardware.compute_units, TILES[family], GROUPED.get(family))


def _bandwidth(hardware: HardwareConfig) -> float | None:
    """Bytes/s of device memory that are reached."""
    if hardware.memory_achieved_gbps is not None:
        return hardware.memory_achieved_gbps * 1e9
    return None if hardware.memory_gbps is None else hardware.memory_gbps * 1e9 * _ACHIEVED_BANDWIDTH


def _measured(profile: DeviceProfile, dtype: str, width: float) -> list[fitting.Measured]:
    return [
        (MatmulShape(r.m, r.n, r.k, r.experts, r.imbalance, r.layout, width), r.time_us / 1e6)
        for r in profile.matmuls
        if r.dtype == dtype
    ]


def _derivation(model: _Precision, shape: MatmulShape, choice: KernelTime, seconds: float) -> str:
    form, (tile, blocks, waves, parts) = model.form, choice.plan
    units = form.chip.units
    grouped = f" in {shape.experts} experts" if shape.experts > 1 else ""
    split = f", k in {parts} parts" if parts > 1 else ""
    text = (
        f"[{shape.m}, {shape.k}] x [{shape.k}, {shape.n}]{grouped}: {blocks} tiles of {tile[0]} x {tile[1]}{split} in "
        f"{waves} waves on {units} units ({blocks / (waves * units):.0%} full): arithmetic "
        f"{choice.arithmetic * 1e6:.4g} us at {form.tuning.rate / 1e12:.4g} TFLOP/s, memory "
        f"{choice.memory * 1e6:.4g} us at {form.tuning.bandwidth / 1e9:.4g} GB/s, launch {choice.launch * 1e6:.3g} us"
    )
    if choice.slowing > 1.005:
        text += f", slower by {choice.slowing - 1:.1%} at the power limit"
    factor = seconds / choice.seconds
    if abs(factor - 1) > 1e-6:
        text += f", times {factor:.3f} for what shapes nearby were measured to take"
    return f"{text}; {model.basis}"
