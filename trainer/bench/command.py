"""`python -m trainer bench`: the full step of this trainer and of its baselines, on the same shapes, in one run."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn

from configs.errors import UserError, ended_by_signals
from configs.paths import default_home
from configs.rank import RankContext, free_port
from configs.schema import RunConfig
from trainer.batch_loader import BatchLoader
from trainer.bench import baselines, ceiling, kernels, routing, variants
from trainer.bench.cases import BatchTokens, config_of, flops_of, refuse
from trainer.bench.master_weights import MasterWeightTrainer
from trainer.bench.measure import PartTimer, Times, time_steps
from trainer.bench.no_overlap import without_overlap
from trainer.bench.options import Options
from trainer.engines.base import Batch, Engine, StepResult
from trainer.engines.native import NativeEngine
from trainer.kernels.choice import reason
from trainer.parallel.mesh import Mesh, join
from trainer.sizing.model.flops import NUMERATOR, peak
from trainer.sizing.search.runnable import never_lends

PrintLine = Callable[[str], None]
_GRACE_SECONDS = 5.0
"""Until ranks have ended on SIGTERM."""


def run(options: Options, gpus: int, arguments: list[str], say: PrintLine, several: str | None = None) -> int:
    """Measure on this rank, or start ranks that do, once all that is to be measured can be.

    Args:
        gpus: ranks; more than one starts them under torchrun.
        arguments: what was typed, for the ranks.
        say: takes lines on rank 0.
        several: variants to compare, as `trainer.bench.variants.parse` reads them.

    Raises:
        UserError: where a layout, a variant or a baseline doesn't run.
    """
    starts = gpus > 1 and "RANK" not in os.environ
    on_gpu = torch.cuda.is_available()
    if options.timeline is not None and not on_gpu:
        raise UserError(
            f"--timeline {options.timeline} records a GPU's kernels, and torch sees no GPU; leave it out"
        )
    if starts and on_gpu and gpus > torch.cuda.device_count():
        raise UserError(
            f"--gpus {gpus}, but this machine has {torch.cuda.device_count()}; type --gpus {torch.cuda.device_count()}"
        )
    rank = RankContext.from_environment(os.environ, default_home() / "runs" / "bench")
    cases = _cases(options, several, gpus if starts else rank.world, on_gpu)
    if starts:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        return run_launcher([*command, "-m", "trainer", *arguments])
    if rank.world == 1:
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    config = cases[0].config
    device = torch.device("cuda", rank.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    mesh = join(config, rank, device)
    try:
        lines = _benchmark_lines(options, config, mesh) if several is None else _variant_lines(cases, mesh)
        for line in lines:
            if rank.rank == 0:
                say(line)
    finally:
        dist.destroy_process_group()
    return 0


def run_launcher(launcher: list[str]) -> int:
    """The exit code of a launcher of ranks, which are ended with it where this process is asked to end.

    torchrun answers SIGTERM and SIGINT with a traceback, and ends only those ranks that it has started so far. So it gets
    neither: a session of its own keeps it from what a terminal or `timeout` sends to a whole group, and it is killed.
    """
    with ended_by_signals():
        started = subprocess.Popen(launcher, start_new_session=True)
        try:
            return started.wait()
        except BaseException:
            launching = psutil.Process(started.pid)
            with suppress(psutil.NoSuchProcess):
                launching.suspend()  # or it would start a rank that isn't listed
            ranks = launching.children(recursive=True)
            started.kill()
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.terminate()
            _, left = psutil.wait_procs([launching, *ranks], _GRACE_SECONDS)
            for rank in left:
                with suppress(psutil.NoSuchProcess):
                    rank.kill()
            raise


@dataclass(frozen=True)
class _Case:
    """A configuration to be measured, under its name."""

    title: str
    options: Options
    config: RunConfig


def _cases(options: Options, several: str | None, world: int, on_gpu: bool) -> list[_Case]:
    """The variants, or the one case where there are none; all can be measured, with their baselines."""
    if several is None:
        config = config_of(options, world, on_gpu)
        refuse(config, world)
        for baseline in options.baselines:
            baselines.check(baseline, config, world)
        return [_Case("", options, config)]
    variants.refuse_baselines(options)
    cases = []
    for variant in variants.parse(several, options):
        config, said = variants.config_of_variant(variant, options, world, on_gpu)
        title = f"{variant.text} ({said})" if said else variant.text
        cases.append(_Case(title, variant.options, config))
    return cases


def _benchmark_lines(options: Options, config: RunConfig, mesh: Mesh) -> Any:
    """All measurements, as lines."""
    model, train = config.model, config.train
    samples = train.global_batch or 1
    tokens = samples * config.data.sequence
    name = torch.cuda.get_device_name() if mesh.device.type == "cuda" else "CPU"
    yield (
        f"{mesh.world} x {name}, torch {torch.__version__}, {train.precision}; {model.name}, {model.layers} layers, "
        f"{tokens} tokens a step, layout {mesh.layout}, routing {options.routing}"
    )
    yield f"kernels: {reason()}"
    yield from _idle_settings(config, mesh)
    flops = flops_of(config)
    yield f"FLOPs of a step: {flops / 1e12:.2f} T ({NUMERATOR})"
    measured = _native(options, config, mesh)
    native = measured.times
    yield from _result_lines("megaray", native, flops, tokens, mesh.world, config)
    if measured.profile is not None:
        yield from kernels.lines(measured.profile)
    if mesh.device.type == "cuda" and mesh.world == 1:
        ceilings = ceiling.measure_rates(config)
        yield (
            f"ceiling: dense matmul {ceilings['dense']:.0f} TFLOP/s, grouped {ceilings['grouped']:.0f}, copy "
            f"{ceilings['copy']:.2f} TB/s; all FLOPs at the grouped rate {flops / ceilings['grouped'] / 1e9:.1f} ms"
        )
    for baseline in options.baselines:
        _free_memory()
        try:
            times = _baseline(baseline, options, config, mesh)
        except UserError:
            raise
        except Exception as error:  # another's program: its failure is a line of the table
            yield f"{baseline:10} failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        yield from _result_lines(baseline, times, flops, tokens, mesh.world, config)
        passes = times.part("forward", "backward") / native.part("forward", "backward")
        yield f"{baseline:10} / megaray: step {times.median / native.median:.2f}x, forward + backward {passes:.2f}x"


def _variant_lines(cases: list[_Case], mesh: Mesh) -> Any:
    """A table of variants, and the kernels of each."""
    on_gpu = mesh.device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    yield f"{mesh.world} x {name}, torch {torch.__version__}; kernels: {reason()}"
    table = []
    for number, case in enumerate(cases):
        other = variants.mesh_of_layout(mesh, case.config)
        measured = _native(case.options, case.config, other, f"variant{number}")
        rows = list(
            variants.report_lines(case.title, case.config, mesh.world, measured, case.options.routing)
        )
        rows += _idle_settings(case.config, mesh)
        table += rows
        yield from rows
        if measured.profile is not None:
            yield from kernels.lines(measured.profile)
        variants.free_memory()
    yield from table


def _idle_settings(config: RunConfig, mesh: Mesh) -> list[str]:
    """What was set and does nothing here."""
    why = never_lends(config, mesh.node)
    return [f"note: {why}"] if why else []


def _result_lines(name: str, times: Times, flops: float, tokens: int, world: int, config: RunConfig) -> Any:
    low, high = times.spread
    passes = times.part("forward", "backward")
    each = flops / world / 1e9
    most = peak(config.hardware, str(config.train.precision))
    mfu = f", MFU {each / times.median * 1e12 / most * 100:.1f} %" if most else ""
    yield (
        f"{name:10} step {times.median:.1f} ms ({low:.1f} to {high:.1f}): forward {times.part('forward'):.1f}, backward "
        f"{times.part('backward'):.1f}, optimizer {times.part('optimizer'):.1f}; {tokens / times.median * 1e3 / world:.0f} "
        f"tokens/s and {each / times.median:.0f} TFLOP/s per device{mfu}; forward + backward {each / passes:.0f} TFLOP/s; "
        f"{times.memory / 1e9:.1f} GB"
    )


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _native(options: Options, config: RunConfig, mesh: Mesh, name: str = "megaray") -> variants.Outcome:
    engine = NativeEngine(config, mesh)
    if options.routing != "real":
        for stage in engine._stages:
            routing.force_routing(stage, options.routing)
    overlap = nullcontext() if options.overlap else without_overlap(mesh.device)
    with _step_of(engine, options, config, mesh) as step, overlap:
        times = time_steps(step, mesh.device, options.steps)
        ep = mesh["ep"].size
        fullest = routing.max_over_mean_rows(step(_no_timer).expert_load, ep) if ep > 1 else None
        if mesh.device.type != "cuda":
            return variants.Outcome(times, None, fullest)
        trace = None
        if options.timeline is not None:
            options.timeline.mkdir(parents=True, exist_ok=True)
            trace = options.timeline / f"{name}.{mesh.rank}.json"
        together = partial(dist.barrier, group=mesh.control_group)
        profiled = kernels.profile(lambda: step(_no_timer), trace, together, partial(_gather_stage, mesh))
        return variants.Outcome(times, profiled, fullest)


def _gather_stage(mesh: Mesh, mine: kernels.RankTimes) -> list[kernels.RankTimes]:
    """What each rank of this one's pipeline stage gives, by rank: other stages meet in groups of their own."""
    by_rank: list[kernels.RankTimes] = [([], []) for _ in range(mesh.world)]
    dist.all_gather_object(by_rank, mine, group=mesh.control_group)
    stage, width = mesh["pp"].index, mesh.world // mesh["pp"].size
    return by_rank[stage * width : (stage + 1) * width]


def _no_timer(_name: str) -> Any:
    return nullcontext()


@contextmanager
def _step_of(
    engine: Engine, options: Options, config: RunConfig, mesh: Mesh
) -> Iterator[Callable[[PartTimer], StepResult]]:
    """A step of an engine on new tokens each time."""
    samples = config.train.global_batch or 1
    with _batches(engine, options, config, mesh) as batches:
        yield lambda mark: engine.step(batches(), samples, config.optim.lr, mark)


@contextmanager
def _batches(
    engine: Engine, options: Options, config: RunConfig, mesh: Mesh
) -> Iterator[Callable[[], list[Batch]]]:
    if options.feed != "device":
        feed = BatchLoader.prepare(config, default_home() / "data")
        with feed.started(0, 0, engine.data_parallel, mesh.device, ahead=options.feed == "ahead"):
            yield feed.batches
        return
    samples, micro = config.train.global_batch or 1, config.train.micro_batch
    drawn = BatchTokens(config, mesh.device, options.routing == "real", engine.data_parallel.index)
    count = samples // micro // engine.data_parallel.size
    yield lambda: [Batch(drawn.draw(micro), None) for _ in range(count)]


def _force_baseline_routing(routers: Sequence[nn.Module], options: Options, config: RunConfig) -> None:
    """Have a baseline's tokens go where ours go: left to its own router, its experts would have other loads."""
    shape = (config.train.global_batch or 1, config.data.sequence)
    routing.force_baseline_routing(routers, options.routing, shape, config.model.experts, config.model.top_k)


def _baseline(name: str, options: Options, config: RunConfig, mesh: Mesh) -> Times:
    """Times of another's step, which `baselines.check` lets pass."""
    forced = options.routing != "real"
    if name == "deepspeed":
        from trainer.engines.deepspeed import DeepSpeedEngine

        engine = DeepSpeedEngine(config, mesh)
        if forced:
            routing.force_routing(engine._stage, options.routing)
        with _step_of(engine, options, config, mesh) as step:
            return time_steps(step, mesh.device, options.steps)
    samples = config.train.global_batch or 1
    drawn = BatchTokens(config, mesh.device, not forced, 0)
    if name == "plain":
        from trainer.bench.plain import PlainDecoder

        cuda = mesh.device.type == "cuda"
        with mesh.device:
            plain = PlainDecoder(config.model)
        plain = plain.to(torch.bfloat16) if cuda else plain
        if forced:
            _force_baseline_routing(plain.routers(), options, config)
        trained = MasterWeightTrainer(plain, config.optim)
        loss_of: Any = torch.compile(plain) if cuda else plain
        return time_steps(
            lambda mark: trained.step(lambda: loss_of(drawn.draw(samples)), mark), mesh.device, options.steps
        )
    from trainer.bench import hugging_face

    theirs = hugging_face.build(config.model, mesh.device)
    if forced:
        _force_baseline_routing(hugging_face.routers(theirs, config.model), options, config)
    trained = MasterWeightTrainer(theirs, config.optim)

    def loss() -> Any:
        tokens = drawn.draw(samples)[:, :-1]
        return theirs(input_ids=tokens, labels=tokens).loss

    return time_steps(lambda mark: trained.step(loss, mark), mesh.device, options.steps)
