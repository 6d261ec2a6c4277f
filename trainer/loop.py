"""One rank's training program: join, resume, train, save, end."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, astuple, dataclass

import torch
import torch.distributed as dist

from collectives.timing.team import choose_device
from configs.errors import ReplicasDiffer, Stopped, UserError
from configs.metrics import StepLine
from configs.paths import default_home
from configs.rank import RankContext, threads
from configs.schema import RunConfig
from faulttol import exits
from faulttol.checkpoint.manifest import SaveSuperseded
from faulttol.progress_report import ProgressReporter, is_remote
from faulttol.recorder import RankPhase, Recorder
from faulttol.staged.saver import SaveCallbacks, SaveOutcome
from faulttol.timeline.hooks import Tracing
from trainer import checkpoints, kernel_warmup
from trainer.batch_loader import BatchLoader
from trainer.device_memory import retry_out_of_memory, wait_for_memory
from trainer.engines.base import Engine, StepResult
from trainer.metric_log import MetricLog
from trainer.metrics import PHASES, PhaseClock, balance_entropy, memory_bytes
from trainer.optim.schedule import consumed_samples, global_batch_size, learning_rate
from trainer.parallel import replicas
from trainer.parallel.mesh import Mesh, join
from trainer.save_schedule import SaveSchedule, SaveTimings
from trainer.sizing.search.runnable import refusal
from trainer.startup import Startup
from trainer.stopping import StopRequest

_SAVE_RETRY_SECONDS = (0.5, 2.0, 8.0)
"""Seconds before the last step's save is tried again."""
_GC_EVERY = 100
"""Steps between garbage collections, at the same step on all ranks: irregular ones make ranks drift apart
(MegaScale section 5.3)."""


def main(config: RunConfig, rank: RankContext, recorder: Recorder | None = None) -> None:
    """Train one rank to the last step, from the newest checkpoint where there is one.

    Runs alike under a gang and under torchrun. `config` must be resolved: no auto field is open. An error is written to
    the rank's exit record before anything is torn down.

    Args:
        config: of the attempt.
        rank: this one.
        recorder: of this rank, where it exists already.

    Raises:
        UserError: for what the user can mend.
        Stopped: where all ranks have stopped, since one was asked to by SIGTERM.
    """
    recorder = recorder or Recorder(rank.files.ring, rank.rank)
    exits.remove(rank.files.raised)
    if rank.rings is not None:
        ProgressReporter(
            rank.files.signs, is_remote(config.checkpoint.path, config.data.path, config.data.cache)
        ).start()
        Tracing.start(rank.files)  # before the first process group is made
    try:
        _main(config, rank, recorder)
    except BaseException as error:
        exits.write(rank.files.raised, error)
        raise


def _main(config: RunConfig, rank: RankContext, recorder: Recorder) -> None:
    startup = Startup(recorder)
    _check_layout(config, rank)
    device = retry_out_of_memory(lambda: choose_device(config, rank))
    torch.set_num_threads(threads(os.environ))
    if config.train.deterministic:
        _set_deterministic()
    startup.enter(RankPhase.DATA)
    loader = BatchLoader.prepare(config, default_home() / "data")
    startup.enter(RankPhase.RENDEZVOUS)
    mesh = join(config, rank, device)
    waited = wait_for_memory(rank, device)
    _start_communicators(config, mesh)
    kernel_warmup.start(config, device)
    startup.enter(RankPhase.BUILD)
    trainer = _Trainer(config, rank, mesh, loader, recorder)
    if waited:
        trainer.facts["waited_for_memory"] = round(waited, 3)
    startup.enter(RankPhase.LOAD)
    trainer.resume(startup)
    with trainer.stop.handle_sigterm():
        trainer.train()
        trainer.close()
    if trainer.stopping:
        raise Stopped(f"asked to stop by SIGTERM at step {trainer.progress.step}")


def _check_layout(config: RunConfig, rank: RankContext) -> None:
    why = refusal(config)
    if why:
        raise UserError(why)
    parallel, ranks = config.parallel, config.parallel.ranks
    if ranks != rank.world:
        raise UserError(
            f"parallel.pp*dp*cp*tp={ranks} ranks are laid out, but {rank.world} were started; set parallel.dp="
            f"{max(1, rank.world * parallel.size('dp') // ranks)}, or start {ranks}"
        )


def _set_deterministic() -> None:
    """Have every operator give the same bits each time, and refuse those that can't.

    cuBLAS needs a fixed workspace, which is read when its first handle is made (CUDA's documentation, "Results
    reproducibility"); collectives keep one algorithm and protocol, or sums would depend on NCCL's choice of the day.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NCCL_PROTO", "Simple")
    torch.use_deterministic_algorithms(True)


def make_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """The engine that the configuration names."""
    if config.train.engine == "deepspeed":
        from trainer.engines.deepspeed import DeepSpeedEngine  # slow to import, and looks for its accelerator

        return DeepSpeedEngine(config, mesh)
    from trainer.engines.native import NativeEngine

    return NativeEngine(config, mesh)


def _start_communicators(config: RunConfig, mesh: Mesh) -> None:
    """Start to initialize the communicators; DeepSpeed has groups of its own."""
    if config.train.engine != "deepspeed":
        from trainer.parallel.apply import axes_in_use  # slow to import

        names = axes_in_use(mesh, config.model.top_k)
        mesh.communicators.begin({name: mesh[name] for name in names}, mesh.device)


@dataclass
class _Progress:
    step: int = 0
    """Steps finished."""
    loss: float = float("nan")
    line_step: int = 0
    """Step of the last metric line."""
    line_time: float = 0.0
    excluded_seconds: float = 0.0
    """Seconds since then of saves and evaluations, which aren't part of the step time."""
    save_error: Exception | None = None
    """Why the save of the last step failed."""
    sample_offset: int = 0
    """Samples consumed beyond what this configuration consumes up to a step: a run may continue with another batch size."""


class _Trainer:
    """One rank's training, from the load of a checkpoint to the last save."""

    def __init__(
        self, config: RunConfig, rank: RankContext, mesh: Mesh, loader: BatchLoader, recorder: Recorder
    ) -> None:
        self.config, self.rank, self.mesh, self.loader, self.recorder = config, rank, mesh, loader, recorder
        self.engine = make_engine(config, mesh)
        self.clock = PhaseClock(recorder, mesh.device)
        signs = SaveCallbacks(
            alive=recorder.touch,
            waiting=lambda: recorder.begin(RankPhase.COLLECTIVE, self.clock.step),
            working=lambda: recorder.begin(RankPhase.CHECKPOINT, self.clock.step),
        )
        self.checkpoints = checkpoints.Checkpoints(config, rank, mesh, loader.fingerprint, signs)
        self.saves = SaveSchedule(config.checkpoint, rank)
        self.log = MetricLog(config, rank)
        self.facts = {
            "device": _device_name(mesh.device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "engine": config.train.engine,
            "network": {"name": config.network.name} | asdict(mesh.network),
        } | loader.facts
        self.progress = _Progress()
        self.replica_differences: dict[int, str] = {}
        """By step, which copies differed in a state that was saved all the same."""
        self.agreed_step: int | None = None
        """The newest step in the store whose copies were equal; None where there is none."""
        self.stop = StopRequest(mesh.device)
        self.stopping = False
        """All ranks have agreed to stop before the last step."""
        self.skipped = torch.zeros(2, dtype=torch.float64, device=mesh.device)
        """Steps that moved nothing: of this attempt, and in a row up to now."""

    def resume(self, startup: Startup) -> None:
        """Load the newest checkpoint that every rank can read."""
        loaded = self.checkpoints.restore(self.engine)
        startup.enter(RankPhase.RENDEZVOUS)
        self.mesh.communicators.wait()
        self.facts["communicators"] = self.mesh.communicators.seconds
        path, notes = None, self.loader.notes
        if loaded is not None:
            self.progress.step = self.progress.line_step = loaded.step
            self.progress.loss, path = loaded.loss, loaded.path
            self.progress.sample_offset = loaded.samples - consumed_samples(self.config.train, loaded.step)
            notes = [*notes, *loaded.notes]
            self.facts["tier"] = loaded.tier
            self.agreed_step = loaded.step  # all ranks have loaded the same copy
            if loaded.passed:
                self.facts["passed"] = list(loaded.passed)
        self.saves.start(self.progress.step)
        self.log.message(notes)
        startup.end()
        self.facts["start_seconds"] = startup.seconds
        self.log.resumed(self.progress.step, path, self.facts)

    def train(self) -> None:
        """All steps that are left."""
        train = self.config.train
        if self.progress.step >= train.steps:
            done = f"step {self.progress.step} of {train.steps} is done"
            self.log.message([f"nothing is left to train: {done}; raise train.steps to continue"])
        gc.collect()
        gc.freeze()
        gc.disable()
        self.progress.line_time = time.perf_counter()
        first = self.progress.step + 1
        with self.loader.started(
            self.progress.step, self.progress.sample_offset, self.engine.data_parallel, self.mesh.device
        ):
            while self.progress.step < train.steps and not self.stopping:
                try:
                    self._step(self.progress.step)
                    if self.progress.step == first:
                        # Not beside the load or the first step, which map memory and load kernels: these wait for it.
                        self.checkpoints.prepare(self.engine)
                except BaseException as error:
                    # Before the threads of the data are waited for.
                    exits.write(self.rank.files.raised, error)
                    raise
        self._finish_saves()
        if self.stopping:
            self._record_stop()
            return
        step, tokens = self.progress.step, self._samples(self.progress.step) * self.config.data.sequence
        self.log.ended(step, self.progress.loss, tokens)

    def _record_stop(self) -> None:
        """Record that the ranks have stopped, and whether this one was asked or only follows."""
        self.log.stopped(self.progress.step, self.progress.save_error is None)
        if self.stop.signalled:
            exits.write(self.rank.files.raised, Stopped(f"SIGTERM at step {self.progress.step}"))
        else:
            exits.write_as_peers(
                self.rank.files.raised, f"a peer was asked to stop at step {self.progress.step}"
            )

    def _samples(self, step: int) -> int:
        """Samples consumed before the step with index `step`."""
        return consumed_samples(self.config.train, step) + self.progress.sample_offset

    def _step(self, index: int) -> None:
        train, progress = self.config.train, self.progress
        self.clock.step = index + 1
        with self.clock.phase("data"):
            batches = self.loader.batches()
        lr = learning_rate(self.config.optim, index, train.steps)
        result = self.engine.step(
            batches, global_batch_size(train, index), lr, self._phase, lambda: self.stop.signalled
        )
        self.skipped[0] += result.skipped
        self.skipped[1] = (self.skipped[1] + result.skipped) * result.skipped
        progress.step = index + 1
        last = progress.step == train.steps
        self.stopping = self.stop.agreed_by_all(result.stop_requests) and not last
        tiers = self.saves.tiers(progress.step, last or self.stopping)
        if "store" in tiers or progress.step % train.log_every == 0:
            self._write_step_line(result, lr)
        self.recorder.step(progress.step)
        if train.evaluate_every and not self.stopping and (last or progress.step % train.evaluate_every == 0):
            self._evaluate()
        if tiers:
            self._save(tiers)
        self._report_saves()
        if progress.step % _GC_EVERY == 0:
            gc.collect()

    def _phase(self, name: str) -> AbstractContextManager[None]:
        """A phase of the step. Before the optimizer's, a save must have copied the state."""
        if name == "optimizer":
            with self._excluded_from_step_time():
                self.checkpoints.settle()
        return self.clock.phase(name)

    @contextmanager
    def _excluded_from_step_time(self) -> Iterator[None]:
        """Time of a save or an evaluation, which no step is charged for."""
        began = time.perf_counter()
        yield
        self.progress.excluded_seconds += time.perf_counter() - began

    def _write_step_line(self, result: StepResult, lr: float) -> None:
        """Reduce the numbers of this line over all ranks and append it."""
        progress = self.progress
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        steps = progress.step - progress.line_step
        seconds = (now - progress.line_time - progress.excluded_seconds) / steps
        shares = torch.stack([x.double() for x in (result.loss, result.aux_loss, result.dropped)])
        loss, aux_loss, dropped = self.mesh.reduce(shares, dist.ReduceOp.SUM).tolist()
        phases, save_timings = self.clock.pop_seconds(), astuple(self.saves.timings(seconds))
        own = [*phases, memory_bytes(self.mesh.device), *save_timings]
        worst = self.mesh.reduce(torch.tensor(own, dtype=torch.float64), dist.ReduceOp.MAX).tolist()
        reason = self.saves.update_interval(progress.step, SaveTimings(*worst[len(PHASES) + 1 :]))
        self.log.message([f"checkpoint.interval: {reason}"] if reason else [])
        progress.loss, progress.excluded_seconds = loss, 0.0
        progress.line_step, progress.line_time = progress.step, now
        load = result.expert_load.tolist()
        skipped, in_a_row = (int(number) for number in self.skipped.tolist())
        tokens = self._samples(progress.step) * self.config.data.sequence
        rate = global_batch_size(self.config.train, progress.step - 1) * self.config.data.sequence / seconds
        self.log.stepped(
            StepLine(
                time=time.time(),
                attempt=self.rank.attempt,
                step=progress.step,
                loss=loss,
                aux_loss=aux_loss,
                lr=lr,
                grad_norm=float(result.grad_norm),
                tokens=tokens,
                tokens_per_second=rate,
                step_seconds=seconds,
                phase_seconds={name: worst[i] / steps for i, name in enumerate(PHASES)},
                mfu=self.log.mfu(rate),
                expert_load=load,
                balance_entropy=balance_entropy(load),
                dropped=int(dropped),
                memory_bytes=int(worst[len(PHASES)]),
                skipped=skipped,
            )
        )
        if in_a_row >= self.config.train.max_skipped:
            raise UserError(
                f"train.max_skipped={self.config.train.max_skipped}: the gradients of the last {in_a_row} steps weren't "
                f"finite, so no weight was updated since step {progress.step - in_a_row}; lower "
                f"optim.lr={self.config.optim.lr:g}"
            )

    def _evaluate(self) -> None:
        with self._excluded_from_step_time():
            began = time.perf_counter()
            batches, samples = self.loader.validation()
            share = self.engine.evaluate(batches, samples)
            loss = float(self.mesh.reduce(share.double(), dist.ReduceOp.SUM))
            seconds = time.perf_counter() - began
        self.log.evaluated(self.progress.step, loss, samples, seconds)

    def _save(self, tiers: Sequence[str]) -> None:
        progress = self.progress
        with self._excluded_from_step_time(), self.clock.phase("checkpoint"):
            samples = self._samples(progress.step)
            agree = self.config.checkpoint.compare == "none" or self._replicas_agree()
            pinned_step = None if agree else self.agreed_step
            self.checkpoints.stage(self.engine, progress.step, samples, progress.loss, tiers, pinned_step)

    def _replicas_agree(self) -> bool:
        """Whether all copies of the state are equal, so that no attempt resumes from a corrupt one.

        Raises:
            ReplicasDiffer: where it isn't, under `checkpoint.compare=stop`. A save that is still being written was found
                equal, and ends first.
        """
        try:
            replicas.compare(self.engine.state(), self.mesh, self.progress.step)
        except ReplicasDiffer as error:
            self.checkpoints.finish()  # so that the newest step in the store is known
            self._report_saves()
            if self.config.checkpoint.compare != "warn":
                raise
            step = self.agreed_step
            kept = "" if step is None else f"; step {step} is pinned as agreed-{step} until it is unpinned"
            self.replica_differences[self.progress.step] = f"{error}{kept}"
            self.log.message(
                [f"{error}; it is saved all the same (checkpoint.compare=stop ends the attempt){kept}"]
            )
            return False
        return True

    def _finish_saves(self) -> None:
        """Wait for the save of the last step, which is tried again: nothing else is left of the run.

        Raises:
            Incomplete: where it failed each time, and the ranks weren't asked to stop: then they stop without it.
        """
        for wait in (*_SAVE_RETRY_SECONDS, None):
            with self.clock.phase("checkpoint"):
                self.checkpoints.finish()
            self._report_saves()
            if self.progress.save_error is None:
                return
            if wait is None:
                if self.stopping:
                    return
                raise self.progress.save_error
            time.sleep(wait)
            self._save(["store"])

    def _report_saves(self) -> None:
        """Report the saves that ended since the last call."""
        for outcome in self.checkpoints.ended():
            self._report_save(outcome)

    def _report_save(self, outcome: SaveOutcome) -> None:
        """Log how a save ended. Training continues where it failed: its state is sound, and the last checkpoint stands.

        Raises:
            UserError: where the folder is another run's.
            SaveSuperseded: where a newer attempt has begun to save.
        """
        error = outcome.error
        # The folder belongs to another run or a newer attempt, and stays so: no later save can succeed.
        if isinstance(error, UserError | SaveSuperseded):
            raise error
        self.saves.record(outcome)
        if error is None:
            # A save ends behind later steps, perhaps behind the next comparison, and once for each tier.
            self.replica_differences = {
                step: why for step, why in self.replica_differences.items() if step >= outcome.step
            }
            differs = self.replica_differences.get(outcome.step, "")
            self.log.saved(outcome, self.saves.next_due, differs)
            if outcome.tier == "store" and not differs:
                self.agreed_step = outcome.step
        else:
            counted = outcome.tier == "store" and not outcome.skipped
            self.log.failed(outcome, self.saves.failed_in_a_row if counted else 0)
        at_the_end = self.stopping or outcome.step == self.config.train.steps
        if at_the_end and outcome.step == self.progress.step and outcome.tier == "store":
            self.progress.save_error = error

    def close(self) -> None:
        """Wait for all ranks, then close; a teardown that hangs must not matter any more."""
        dist.barrier(group=self.mesh.control_group)
        self.checkpoints.close()
        self.log.close()
        self.recorder.close()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
