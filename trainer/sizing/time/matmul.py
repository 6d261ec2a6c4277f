"""Seconds of a matmul, grouped or not: from a device's measured profile, or from the catalogue.

With a profile the numbers of `trainer.sizing.time.kernels` are fitted to its matmuls, and what they miss is corrected by
what they miss at shapes nearby. Without one the best matmul on record sets the rate, and the rest is as stated in
`DEFAULTS`. A device that lacks what is needed gives NaN, and `why` says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from configs.errors import UserError
from configs.hardware import HardwareConfig
from configs.profile import DeviceProfile, Operands, known
from trainer.sizing.figures import Figure
from trainer.sizing.time import fitting, kernels
from trainer.sizing.time.kernels import (
    Chip,
    KernelKind,
    KernelTime,
    MatmulModel,
    MatmulParameters,
    MatmulShape,
)

_DTYPES = {"bf16": "bfloat16", "fp16": "half", "fp32": "float"}
_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 4.0, "fp8": 1.0}

DEFAULTS = MatmulParameters(
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
_ACHIEVED_BANDWIDTH = 0.85  # of the peak: H100 91 %, MI300X 82 % (Zyphra et al. 2025)
_ACHIEVED_RATE = {"cuda": 0.79, "rocm": 0.6}
"""Best matmul over the peak where none is on record: the median of the catalogue's devices of that kind."""
_BIG = (8192, 8192, 8192)
_FROM_PEAK = (0.6, 1.7)  # measured over predicted where the rate is from the peak
_SLOW = (0.4, 1.6)
"""The same where rows aren't 16 bytes apart and no such shape was measured: another device or library may lose less."""


def copy_rate(hardware: HardwareConfig) -> float:
    """Bytes/s of device memory that long copies reach; NaN where unknown."""
    if hardware.memory_achieved_gbps is not None:
        return hardware.memory_achieved_gbps * 1e9
    return math.nan if hardware.memory_gbps is None else hardware.memory_gbps * 1e9 * _ACHIEVED_BANDWIDTH


class _Unknown(Exception):
    """Why matmuls have no time."""


@dataclass(frozen=True)
class _Model:
    """How matmuls of one precision are timed."""

    form: MatmulModel
    basis: str
    """What the rate is from."""
    misses: dict[bool, fitting.Residuals]
    """Of dense matmuls and of grouped ones."""
    interval: tuple[float, float] = fitting.UNMEASURED
    """Measured over predicted where there are none."""

    def seconds(self, shape: MatmulShape) -> tuple[float, KernelTime]:
        """Seconds, and what the formula alone gives."""
        choice, misses = self.form.choose(shape), self.misses.get(shape.experts > 1)
        return choice.seconds * (math.exp(misses.at(fitting.place(shape))) if misses else 1.0), choice

    def between(self, shape: MatmulShape) -> tuple[float, float]:
        """Ratios of measured over predicted; wider where the ragged dimension is one that no profile has."""
        misses = self.misses.get(shape.experts > 1)
        low, high = misses.between(fitting.place(shape)) if misses else self.interval
        if shape.kind != KernelKind.ALIGNED and not (misses and misses.has(shape.kind)):
            low, high = min(low, _SLOW[0]), max(high, _SLOW[1])
        return (low * 0.9, high * 1.15) if shape.inner and misses else (low, high)

    def derivation(self, shape: MatmulShape) -> str:
        """How the seconds of a shape come about."""
        seconds, choice = self.seconds(shape)
        tuning, (tile, blocks, waves, parts) = self.form.tuning, choice.plan
        units = self.form.chip.units
        grouped = f" in {shape.experts} experts" if shape.experts > 1 else ""
        split = f", k in {parts} parts" if parts > 1 else ""
        text = (
            f"[{shape.m}, {shape.k}] x [{shape.k}, {shape.n}]{grouped}: {blocks} tiles of {tile[0]} x {tile[1]}{split} in "
            f"{waves} waves on {units} units ({blocks / (waves * units):.0%} full): arithmetic "
            f"{choice.arithmetic * 1e6:.4g} us at {tuning.rate / 1e12:.4g} TFLOP/s, memory "
            f"{choice.memory * 1e6:.4g} us at {tuning.bandwidth / 1e9:.4g} GB/s, launch {choice.launch * 1e6:.3g} us"
        )
        if choice.slowing > 1.005:
            text += f", slower by {choice.slowing - 1:.1%} at the power limit"
        factor = seconds / choice.seconds
        if abs(factor - 1) > 1e-6:
            text += f", times {factor:.3f} for what shapes nearby were measured to take"
        return f"{text}; {self.basis}"


class Kernels:
    """Times of matmuls on one kind of device; answers are cached by shape."""

    def __init__(self, hardware: HardwareConfig, profile: DeviceProfile | None = None) -> None:
        """The times of `hardware`, from `profile` where there is one; UserError where that is of another device."""
        if profile is not None and profile.hardware != hardware.name:
            raise UserError(
                f"profile {profile.name} is of hardware={profile.hardware}, not of {hardware.name}; name a profile of "
                f"{hardware.name}, or leave it out to compute from the catalogue"
            )
        self.hardware, self.profile = hardware, profile
        self._models: dict[str, _Model | str] = {}
        self._cache: dict[tuple[object, ...], float] = {}

    def matmul(
        self, m: int, n: int, k: int, experts: int = 1, precision: str = "bf16", imbalance: float = 1.0,
        layout: Operands = "forward",
    ) -> float:  # fmt: skip
        """Seconds of [m, k] times [k, n], as in `MatmulShape`, of bf16, fp16, fp32 or fp8 operands; NaN where unknown."""
        key = (m, n, k, experts, precision, imbalance, layout)
        seconds = self._cache.get(key)
        if seconds is None:
            model = self.model(precision)
            if isinstance(model, str):
                return math.nan
            shape = MatmulShape(m, n, k, experts, imbalance, layout, _BYTES[precision])
            seconds = self._cache[key] = model.seconds(shape)[0]
        return seconds

    def why(self, precision: str = "bf16") -> str:
        """Why matmuls of a precision have no time; empty where they have one."""
        model = self.model(precision)
        return model if isinstance(model, str) else ""

    def matmul_figure(self, name: str, shape: MatmulShape, precision: str = "bf16") -> Figure | None:
        """`matmul` with its interval and derivation; None where unknown."""
        model = self.model(precision)
        if isinstance(model, str):
            return None
        shape = replace(shape, bytes=_BYTES[precision])
        seconds, (low, high) = model.seconds(shape)[0], model.between(shape)
        how = partial(model.derivation, shape)
        return Figure(name, seconds, "s", seconds * low, seconds * high, how)

    def model(self, precision: str) -> _Model | str:
        """How a precision is timed, or why it isn't."""
        if precision not in self._models:
            try:
                self._models[precision] = self._made(precision)
            except _Unknown as why:
                self._models[precision] = str(why)
        return self._models[precision]

    def _made(self, precision: str) -> _Model:
        if precision not in _BYTES:
            raise _Unknown(f"precision {precision} is none of {', '.join(_BYTES)}")
        chip, width, profile = _chip(self.hardware), _BYTES[precision], self.profile
        rows = [
            (MatmulShape(r.m, r.n, r.k, r.experts, r.imbalance, r.layout, width), r.time_us / 1e6)
            for r in (profile.matmuls if profile else ())
            if r.dtype == _DTYPES.get(precision)
        ]
        if profile is None or not rows:
            return self._catalogue(chip, precision)
        if precision != "bf16" and not isinstance(base := self.model("bf16"), str):
            # Few shapes: all but the rate is bf16's.
            form = MatmulModel(chip, fitting.fit(chip, base.form.tuning, ("rate",), rows))
            basis = f"profile {profile.name}, {len(rows)} shapes of {precision}"
            return _Model(form, basis, {False: fitting.Residuals(rows, fitting.log_residuals(form, rows))})
        start = self._catalogue(chip, precision)
        dense, grouped = ([row for row in rows if (row[0].experts > 1) is many] for many in (False, True))
        tuning, *logs = fitting.load_or_fit(
            profile.name, chip, start.form.tuning, dense, grouped,
            is_whole=lambda: known(DeviceProfile, profile.name) == profile,
        )  # fmt: skip
        basis = f"profile {profile.name}, fitted to {len(dense)} dense and {len(grouped)} grouped shapes"
        parts = zip((False, True), (dense, grouped), logs, strict=True)
        misses = {many: fitting.Residuals(part, log) for many, part, log in parts if part}
        return _Model(MatmulModel(chip, tuning), basis, misses, start.interval)

    def _catalogue(self, chip: Chip, precision: str) -> _Model:
        hardware, bandwidth = self.hardware, copy_rate(self.hardware)
        if math.isnan(bandwidth):
            raise _Unknown(f"{hardware.name} has no memory bandwidth on record")
        best, peak = hardware.achieved_tflops.get(precision), hardware.peak_tflops.get(precision)
        m, n, k = hardware.achieved_shapes.get(precision, _BIG)
        interval = fitting.UNMEASURED
        basis = f"catalogue: {best:g} TFLOP/s {precision} measured at {m} x {n} x {k}" if best else ""
        if best is None:
            if peak is None:
                raise _Unknown(f"{hardware.name} has no {precision} rate on record")
            share, interval = _ACHIEVED_RATE[hardware.kind], _FROM_PEAK
            best = share * peak
            of_peak = f"{share:.0%} of the {precision} peak"
            basis = f"catalogue: {of_peak}, as devices of its kind reach; none measured"
        shape = MatmulShape(m, n, k, bytes=_BYTES[precision])
        start = replace(DEFAULTS, rate=best * 1e12, bandwidth=bandwidth)
        tuning = fitting.solve_rate(chip, start, shape, shape.flops / (best * 1e12))
        return _Model(MatmulModel(chip, tuning), basis, {}, interval)


def _chip(hardware: HardwareConfig) -> Chip:
    if hardware.kind == "cpu":
        raise _Unknown(f"{hardware.name} is a CPU; only devices with compute units are modelled")
    if hardware.compute_units is None:
        raise _Unknown(f"{hardware.name} has no number of compute units on record")
    family = (hardware.architecture or "").rstrip("0123456789")
    if family not in kernels.TILES:
        known_of = ", ".join(kernels.TILES)
        raise _Unknown(
            f"{hardware.name} has architecture={hardware.architecture}; tiles are known of {known_of}"
        )
    return Chip(hardware.compute_units, kernels.TILES[family], kernels.GROUPED.get(family))
