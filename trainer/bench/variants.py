"""One shape under several layouts and settings, in one run: a table of what was measured beside what was forecast."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from configs.errors import UserError, nearest
from configs.schema import RunConfig
from trainer.bench import kernels
from trainer.bench.cases import config_of, flops_of, refuse
from trainer.bench.measure import Times
from trainer.bench.options import FEEDS, ROUTINGS, Options
from trainer.parallel.mesh import Mesh, assemble
from trainer.sizing.memory import estimate
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import auto
from trainer.sizing.search.legal import AXES

_CHOICES = {"routing": ROUTINGS, "feed": FEEDS}
AUTO = "auto"
"""A variant whose open axes the planner sets."""


@dataclass(frozen=True)
class Variant:
    """A line of the table."""

    text: str
    options: Options


@dataclass(frozen=True)
class Outcome:
    """What was measured of a configuration."""

    times: Times
    profile: kernels.Profile | None = None
    """None on a CPU."""
    fullest: float | None = None
    """Rows of the fullest rank of ep over the mean (`trainer.bench.routing.max_over_mean_rows`); None without ep."""


def parse(text: str, options: Options) -> list[Variant]:
    """`ep=4 | tp=2 ep=4 | routing=zipf ep=4 | auto`: overrides on top of the others; a word without a dot is an axis of
    `parallel`, but for `routing`, `layers`, `feed`, and `overlap`, which is `on` or `off`.

    Raises:
        UserError: for a value of these four that there isn't, or a setting that one variant has twice.
    """
    return [_variant(one.strip(), options) for one in text.split("|")]


def _variant(text: str, options: Options) -> Variant:
    words: list[str] = []
    names: set[str] = set()
    for word in text.split():
        name, _, value = word.partition("=")
        if name.removeprefix("parallel.") in names:
            raise UserError(
                f"--variants '{text}' has {name} twice; type it once, or separate the variants by |"
            )
        names.add(name.removeprefix("parallel."))
        if name in _CHOICES:
            if value not in _CHOICES[name]:
                raise UserError(
                    f"--variants '{text}': {word} doesn't exist{nearest(value, _CHOICES[name])}; use one of "
                    f"{', '.join(_CHOICES[name])}"
                )
            change: dict[str, Any] = {name: value}
            options = replace(options, **change)
        elif name == "overlap":
            if value not in ("on", "off"):
                raise UserError(
                    f"--variants '{text}': overlap={value} doesn't exist; type overlap=on or overlap=off"
                )
            options = replace(options, overlap=value == "on")
        elif name == "layers":
            if not value.isdecimal() or int(value) < 1:
                raise UserError(
                    f"--variants '{text}': layers={value} is not a whole number above 0; type e.g. layers=8"
                )
            options = replace(options, layers=int(value))
        elif word == AUTO:
            words.append("parallel=auto")
        elif not value:
            raise UserError(f"--variants '{text}': {word} has no value; type e.g. {name}=2")
        else:
            words.append(word if "." in name or name in ("model", "optim") else f"parallel.{word}")
    return Variant(text or "as it is", replace(options, overrides=(*options.overrides, *words)))


def config_of_variant(variant: Variant, plain: Options, world: int, on_gpu: bool) -> tuple[RunConfig, str]:
    """As `resolve`; an error names the variant, unless it is one of what all variants have, too.

    Args:
        plain: what was typed besides the variants.

    Raises:
        UserError: where the trainer doesn't run it, or not on so many ranks.
    """
    try:
        return resolve(variant.options, world, on_gpu)
    except UserError as error:
        if str(error) == _error_of(plain, world, on_gpu):
            raise
        raise UserError(f"--variants '{variant.text}': {error}") from None


def _error_of(options: Options, world: int, on_gpu: bool) -> str:
    """Why a configuration is refused; empty where it isn't."""
    try:
        resolve(options, world, on_gpu)
    except UserError as error:
        return str(error)
    return ""


def resolve(options: Options, world: int, on_gpu: bool) -> tuple[RunConfig, str]:
    """The configuration of a variant, and what the planner said of it where it set the layout.

    Raises:
        UserError: where the trainer doesn't run it, or not on so many ranks.
    """
    config, said = _resolve(options, world, on_gpu)
    refuse(config, world)
    return config, said


def _resolve(options: Options, world: int, on_gpu: bool) -> tuple[RunConfig, str]:
    if "parallel=auto" not in options.overrides:
        return config_of(options, world, on_gpu), ""
    rest = tuple(word for word in options.overrides if word != "parallel=auto")
    plain = config_of(replace(options, overrides=rest), world, on_gpu)
    without_layout = plain.model_copy(
        update={"parallel": plain.parallel.model_copy(update=dict.fromkeys(AXES))}
    )
    choice = auto.choose(without_layout, (world,), imbalance_of(options.routing))
    settings = auto.settings(choice.job) if choice.job is not None else {}
    words = [
        f"{section}.{name}={value}" for section, fields in settings.items() for name, value in fields.items()
    ]
    words += [f"parallel.{axis}={size}" for axis, size in choice.layout.to_json().items()]
    kept = [word for word in words if word.partition("=")[0] not in {one.partition("=")[0] for one in rest}]
    return config_of(replace(options, overrides=(*rest, *kept)), world, on_gpu), " ".join(kept)


def imbalance_of(routing: str) -> float | None:
    """Rows of the fullest rank over the mean, where they are known before anything is routed; None: as a plan expects."""
    return 1.0 if routing == "balanced" else None


def forecast(config: RunConfig, world: int, imbalance: float | None = None) -> tuple[float | None, float]:
    """Seconds of a step, None where no rates are known, and bytes of the fullest rank's tensors.

    Args:
        imbalance: rows of the fullest rank of ep over the mean; None: as a plan expects of real text.
    """
    layout = Layout(**{axis: config.parallel.size(axis) for axis in AXES})
    job = auto.job_of(config, layout, world)
    if imbalance is not None:
        job = replace(job, imbalance=imbalance)
    step = auto.predicted(job, config.hardware)
    return None if isinstance(step, str) else step.value, estimate.worst(job, config.hardware.kind)[
        1
    ].allocated


def mesh_of_layout(mesh: Mesh, config: RunConfig) -> Mesh:
    """Groups of another layout over the same ranks."""
    return assemble(config, mesh.rank, mesh.world, mesh.device, mesh.control_group, mesh.network, mesh.node)


def free_memory() -> None:
    """Free the memory of a layout whose engine is gone. Its process groups stay: a new one of the same ranks would get the
    name of a destroyed one, and meet what that has left in the store."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def report_lines(
    text: str, config: RunConfig, world: int, measured: Outcome, routing: str = "real"
) -> Iterator[str]:
    """Lines of a variant, with the forecast of a plan, and that for the rows which the fullest rank really had."""
    times, profiled = measured.times, measured.profile
    each = flops_of(config) / world / 1e9
    tokens = (config.train.global_batch or 1) * config.data.sequence / world
    guess = _forecast_text(forecast(config, world, imbalance_of(routing)), times)
    if measured.fullest is not None and routing != "balanced":
        guess += f"; load imbalance {measured.fullest:.2f}"
        if config.parallel.lend_rows is None:
            guess += f", {_forecast_text(forecast(config, world, measured.fullest), times)} at that"
        else:
            guess += " before lending"
    apart = "" if profiled is None else (
        f", exposed communication {profiled.exposed:.1f} ms ({profiled.exposed / profiled.span * 100:.1f} %)"
        f"{kernels.of_waiting(profiled)}, idle {profiled.idle:.1f} ms, at most {profiled.uncovered(times.median):.1f} ms "
        f"({profiled.uncovered(times.median) / times.median * 100:.1f} %) of communication exposed or idle"
    )  # fmt: skip
    yield (
        f"{text:34} step {times.median:.1f} ms, forward + backward {times.part('forward', 'backward'):.1f}, optimizer "
        f"{times.part('optimizer'):.1f}; {tokens / times.median * 1e3:.0f} tokens/s and {each / times.median:.0f} TFLOP/s "
        f"per device, {times.memory / 1e9:.1f} GB{apart}; {guess}"
    )


def _forecast_text(made: tuple[float | None, float], times: Times) -> str:
    """A forecast, and how far it is off."""
    seconds, size = made
    text = "no forecast" if seconds is None else (
        f"forecast {seconds * 1e3:.1f} ms ({(seconds * 1e3 / times.median - 1) * 100:+.1f} %)"
    )  # fmt: skip
    return text + (
        f" and {size / 1e9:.1f} GB ({(size / times.memory - 1) * 100:+.1f} %)" if times.memory else ""
    )


def refuse_baselines(options: Options) -> None:
    """Raises:
    UserError: where baselines are asked for beside variants.
    """
    if options.baselines:
        raise UserError("--variants compares this trainer's own settings; type --baselines none with it")
