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
from faulttol.recorder import RankPhase, Recorder
from faulttol.signs import SignWriter, is_remote
from faulttol.staged.saver import SaveOutcome, Signs
from faulttol.timeline.hooks import Tracing
from trainer import resume as resuming
from trainer import warming
from trainer.engines.base import Engine, StepResult
from trainer.feed import BatchFeed
from trainer.handover import await_memory, with_room
from trainer.lines import Lines
from trainer.metrics import PHASES, PhaseClock, balance_entropy, memory_bytes
from trainer.optim.schedule import consumed_samples, global_batch_size, learning_rate
from trainer.parallel import replicas
from trainer.parallel.mesh import Mesh, join
from trainer.saves import Measured, SaveSchedule
from trainer.sizing.search.runnable import refusal
from trainer.startup import Startup
from trainer.stopping import Stop

_WAITS = (0.5, 2.0, 8.0)
"""Seconds before the last step's save is tried again."""
_COLLECT_EVERY = 100
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
    exits.forget(rank.files.raised)
    if rank.rings is not None:
        SignWriter(
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
    _refuse(config, rank)
    device = with_room(lambda: choose_device(config, rank))
    torch.set_num_threads(threads(os.environ))
    if config.train.deterministic:
        _be_deterministic()
    startup.enter(RankPhase.DATA)
    feed = BatchFeed.prepare(config, default_home() / "data")
    startup.enter(RankPhase.RENDEZVOUS)
    mesh = join(config, rank, device)
    waited = await_memory(rank, device)
    _connect(config, mesh)
    warming.begin(config, device)
    startup.enter(RankPhase.BUILD)
    job = _Job(config, rank, mesh, feed, recorder)
    if waited:
        job.facts["waited_for_memory"] = round(waited, 3)
    startup.enter(RankPhase.LOAD)
    job.resume(startup)
    with job.stop.heeded():
        job.train()
        job.close()
    if job.stopping:
        raise Stopped(f"asked to stop by SIGTERM at step {job.progress.step}")


def _refuse(config: RunConfig, rank: RankContext) -> None:
    why = refusal(config)
    if why:
        raise UserError(why)
    parallel, ranks = config.parallel, config.parallel.ranks
    if ranks != rank.world:
        raise UserError(
            f"parallel.pp*dp*cp*tp={ranks} ranks are laid out, but {rank.world} were started; set parallel.dp="
            f"{max(1, rank.world * parallel.size('dp') // ranks)}, or start {ranks}"
        )


def _be_deterministic() -> None:
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


def _connect(config: RunConfig, mesh: Mesh) -> None:
    """Begin to make communicators; DeepSpeed has groups of its own."""
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
    away: float = 0.0
    """Seconds since then that went to saves and evaluations."""
    unsaved: Exception | None = None
    """Why the last step isn't saved."""
    ahead: int = 0
    """Samples consumed beyond what this configuration takes up to a step: a run may continue with another batch."""


class _Job:
    """What lives as long as the process group."""

    def __init__(
        self, config: RunConfig, rank: RankContext, mesh: Mesh, feed: BatchFeed, recorder: Recorder
    ) -> None:
        self.config, self.rank, self.mesh, self.feed, self.recorder = config, rank, mesh, feed, recorder
        self.engine = make_engine(config, mesh)
        self.clock = PhaseClock(recorder, mesh.device)
        signs = Signs(
            alive=recorder.touch,
            waiting=lambda: recorder.begin(RankPhase.COLLECTIVE, self.clock.step),
            working=lambda: recorder.begin(RankPhase.CHECKPOINT, self.clock.step),
        )
        self.checkpoints = resuming.Checkpoints(config, rank, mesh, feed.fingerprint, signs)
        self.saves = SaveSchedule(config.checkpoint, rank)
        self.lines = Lines(config, rank)
        self.facts = {
            "device": _device_name(mesh.device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "engine": config.train.engine,
            "network": {"name": config.network.name} | asdict(mesh.network),
        } | feed.facts
        self.progress = _Progress()
        self.differing: dict[int, str] = {}
        """By step, what differed in a state that was staged all the same."""
        self.agreed: int | None = None
        """The newest step in the store whose copies were equal; None where there is none."""
        self.stop = Stop(mesh.device)
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
        path, notes = None, self.feed.notes
        if loaded is not None:
            self.progress.step = self.progress.line_step = loaded.step
            self.progress.loss, path = loaded.loss, loaded.path
            self.progress.ahead = loaded.samples - consumed_samples(self.config.train, loaded.step)
            notes = [*notes, *loaded.notes]
            self.facts["tier"] = loaded.tier
            self.agreed = loaded.step  # whatever it holds, all ranks have got it alike
            if loaded.passed:
                self.facts["passed"] = list(loaded.passed)
        self.saves.begin(self.progress.step)
        self.lines.note(notes)
        startup.end()
        self.facts["start_seconds"] = startup.seconds
        self.lines.resumed(self.progress.step, path, self.facts)

    def train(self) -> None:
        """All steps that are left."""
        train = self.config.train
        if self.progress.step >= train.steps:
            done = f"step {self.progress.step} of {train.steps} is done"
            self.lines.note([f"nothing is left to train: {done}; raise train.steps to continue"])
        gc.collect()
        gc.freeze()
        gc.disable()
        self.progress.line_time = time.perf_counter()
        first = self.progress.step + 1
        with self.feed.started(
            self.progress.step, self.progress.ahead, self.engine.data_parallel, self.mesh.device
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
            self._tell_stopped()
            return
        step, tokens = self.progress.step, self._samples(self.progress.step) * self.config.data.sequence
        self.lines.ended(step, self.progress.loss, tokens)

    def _tell_stopped(self) -> None:
        """Write that the ranks have stopped, and which of them were asked: the others only follow."""
        self.lines.stopped(self.progress.step, self.progress.unsaved is None)
        if self.stop.signalled:
            exits.write(self.rank.files.raised, Stopped(f"SIGTERM at step {self.progress.step}"))
        else:
            exits.follow(self.rank.files.raised, f"a peer was asked to stop at step {self.progress.step}")

    def _samples(self, step: int) -> int:
        """Samples consumed before the step with index `step`."""
        return consumed_samples(self.config.train, step) + self.progress.ahead

    def _step(self, index: int) -> None:
        train, progress = self.config.train, self.progress
        self.clock.step = index + 1
        with self.clock.phase("data"):
            batches = self.feed.batches()
        lr = learning_rate(self.config.optim, index, train.steps)
        result = self.engine.step(
            batches, global_batch_size(train, index), lr, self._phase, lambda: self.stop.signalled
        )
        self.skipped[0] += result.skipped
        self.skipped[1] = (self.skipped[1] + result.skipped) * result.skipped
        progress.step = index + 1
        last = progress.step == train.steps
        self.stopping = self.stop.agreed(result.stop_requests) and not last
        tiers = self.saves.tiers(progress.step, last or self.stopping)
        if "store" in tiers or progress.step % train.log_every == 0:
            self._log(result, lr)
        self.recorder.step(progress.step)
        if train.evaluate_every and not self.stopping and (last or progress.step % train.evaluate_every == 0):
            self._evaluate()
        if tiers:
            self._save(tiers)
        self._tell_saves()
        if progress.step % _COLLECT_EVERY == 0:
            gc.collect()

    def _phase(self, name: str) -> AbstractContextManager[None]:
        """A phase of the step. What is being saved must be out of the optimizer's way."""
        if name == "optimizer":
            with self._away():
                self.checkpoints.settle()
        return self.clock.phase(name)

    @contextmanager
    def _away(self) -> Iterator[None]:
        """Time that isn't the steps'."""
        began = time.perf_counter()
        yield
        self.progress.away += time.perf_counter() - began

    def _log(self, result: StepResult, lr: float) -> None:
        """Reduce the numbers of this line over all ranks and append it."""
        progress = self.progress
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        steps = progress.step - progress.line_step
        seconds = (now - progress.line_time - progress.away) / steps
        shares = torch.stack([x.double() for x in (result.loss, result.aux_loss, result.dropped)])
        loss, aux_loss, dropped = self.mesh.reduce(shares, dist.ReduceOp.SUM).tolist()
        own = [*self.clock.take(), memory_bytes(self.mesh.device), *astuple(self.saves.measured(seconds))]
        worst = self.mesh.reduce(torch.tensor(own, dtype=torch.float64), dist.ReduceOp.MAX).tolist()
        reason = self.saves.plan(progress.step, Measured(*worst[len(PHASES) + 1 :]))
        self.lines.note([f"checkpoint.interval: {reason}"] if reason else [])
        progress.loss, progress.line_step, progress.line_time, progress.away = loss, progress.step, now, 0.0
        load = result.expert_load.tolist()
        skipped, in_a_row = (int(number) for number in self.skipped.tolist())
        tokens = self._samples(progress.step) * self.config.data.sequence
        rate = global_batch_size(self.config.train, progress.step - 1) * self.config.data.sequence / seconds
        self.lines.stepped(
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
                mfu=self.lines.mfu(rate),
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
        with self._away():
            began = time.perf_counter()
            batches, samples = self.feed.validation()
            share = self.engine.evaluate(batches, samples)
            loss = float(self.mesh.reduce(share.double(), dist.ReduceOp.SUM))
            seconds = time.perf_counter() - began
        self.lines.evaluated(self.progress.step, loss, samples, seconds)

    def _save(self, tiers: Sequence[str]) -> None:
        progress = self.progress
        with self._away(), self.clock.phase("checkpoint"):
            samples = self._samples(progress.step)
            agree = self.config.checkpoint.compare == "none" or self._compare()
            agreed = None if agree else self.agreed
            self.checkpoints.stage(self.engine, progress.step, samples, progress.loss, tiers, agreed)

    def _compare(self) -> bool:
        """Whether what several ranks have is equal, so that no attempt resumes from a copy that went wrong.

        Raises:
            ReplicasDiffer: where it isn't, under `checkpoint.compare=stop`. A save that is still being written was found
                equal, and ends first.
        """
        try:
            replicas.compare(self.engine.state(), self.mesh, self.progress.step)
        except ReplicasDiffer as error:
            self.checkpoints.finish()  # so that the newest step in the store is known
            self._tell_saves()
            if self.config.checkpoint.compare != "warn":
                raise
            pin = f"step {self.agreed} is pinned as agreed-{self.agreed} until it is unpinned"
            kept = "" if self.agreed is None else f"; {pin}"
            self.differing[self.progress.step] = f"{error}{kept}"
            self.lines.note(
                [f"{error}; it is saved all the same (checkpoint.compare=stop ends the attempt){kept}"]
            )
            return False
        return True

    def _finish_saves(self) -> None:
        """Wait for the save of the last step, which is tried again: nothing else is left of the run.

        Raises:
            Incomplete: where it failed each time, and the ranks weren't asked to stop: then they stop without it.
        """
        for wait in (*_WAITS, None):
            with self.clock.phase("checkpoint"):
                self.checkpoints.finish()
            self._tell_saves()
            if self.progress.unsaved is None:
                return
            if wait is None:
                if self.stopping:
                    return
                raise self.progress.unsaved
            time.sleep(wait)
            self._save(["store"])

    def _tell_saves(self) -> None:
        """`_tell_save` of those that ended since the last call."""
        for outcome in self.checkpoints.ended():
            self._tell_save(outcome)

    def _tell_save(self, outcome: SaveOutcome) -> None:
        """Write how a save ended. Training continues where it failed: its state is sound, and the last checkpoint stands.

        Raises:
            UserError: where the folder is another run's.
            SaveSuperseded: where a newer attempt has begun to save.
        """
        error = outcome.error
        # The folder belongs to another run or a newer attempt, and stays so: no later save can succeed.
        if isinstance(error, UserError | SaveSuperseded):
            raise error
        self.saves.ended(outcome)
        if error is None:
            # A save ends behind later steps, perhaps behind the next comparison, and once for each tier.
            self.differing = {step: why for step, why in self.differing.items() if step >= outcome.step}
            differs = self.differing.get(outcome.step, "")
            self.lines.saved(outcome, self.saves.next_due, differs)
            if outcome.tier == "store" and not differs:
                self.agreed = outcome.step
        else:
            counted = outcome.tier == "store" and not outcome.skipped
            self.lines.failed(outcome, self.saves.failed_in_a_row if counted else 0)
        at_the_end = self.stopping or outcome.step == self.config.train.steps
        if at_the_end and outcome.step == self.progress.step and outcome.tier == "store":
            self.progress.unsaved = error

    def close(self) -> None:
        """Leave together; then end at once, since a teardown that hangs must not matter any more."""
        dist.barrier(group=self.mesh.control_group)
        self.checkpoints.close()
        self.lines.close()
        self.recorder.close()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
