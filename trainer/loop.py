"""One rank's training program: join, resume, train, save, end."""

from __future__ import annotations

import gc
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from collectives.team import choose_device
from configs.errors import UserError
from configs.metrics import EndedLine, MetricWriter, ResumedLine, SavedLine, StepLine
from configs.paths import default_home
from configs.rank import RankContext
from configs.schema import RunConfig
from faulttol.checkpoint import load as loading
from faulttol.checkpoint.manifest import Incomplete
from faulttol.checkpoint.pieces import Shard
from faulttol.checkpoint.save import save
from faulttol.recorder import Phase, Recorder
from trainer.data.prepare import TokenStore, prepare
from trainer.data.sampler import Sampler
from trainer.engine import Engine, StepResult
from trainer.metrics import PHASES, PhaseClock, balance_entropy, memory_bytes
from trainer.optim import learning_rate
from trainer.parallel.mesh import Mesh, join, refuse_unsupported
from trainer.sizing import flops
from trainer.sizing.planner import trainable

_COLLECT_EVERY = 100
"""Steps between garbage collections, at the same step on all ranks: irregular ones make ranks drift apart
(MegaScale section 5.3)."""


def main(config: RunConfig, rank: RankContext) -> None:
    """Train one rank to the last step, from the newest checkpoint where there is one.

    Runs alike under a gang and under torchrun. `config` must be resolved: no auto field is open.

    Raises:
        UserError: for what the user can mend.
    """
    refusal = trainable(config)
    if refusal:
        raise UserError(refusal)
    refuse_unsupported(config, rank.world)
    recorder = Recorder(rank.paths.record(rank.rank), rank.rank)
    device = choose_device(config, rank)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    recorder.begin(Phase.DATA, 0)
    store = prepare(config.data, config.model.vocab, default_home() / "data")
    recorder.begin(Phase.START, 0)
    mesh = join(config, rank, device)
    job = _Job(config, rank, mesh, store, recorder)
    job.resume()
    job.train()
    job.close()


@dataclass
class _Progress:
    step: int = 0
    """Steps finished."""
    loss: float = float("nan")
    line_step: int = 0
    """Step of the last metric line."""
    line_time: float = 0.0


class _Job:
    """What lives as long as the process group."""

    def __init__(
        self, config: RunConfig, rank: RankContext, mesh: Mesh, store: TokenStore, recorder: Recorder
    ) -> None:
        train = config.train
        assert train.global_batch is not None, "the plan fills train.global_batch in"
        self.config, self.rank, self.mesh, self.recorder = config, rank, mesh, recorder
        self.global_batch = train.global_batch
        self.accumulation = train.global_batch // (train.micro_batch * rank.world)
        self.engine = Engine(config, mesh, self.accumulation)
        self.sampler = Sampler(store.tokens, config.data.sequence, train.global_batch, train.seed)
        self.clock = PhaseClock(recorder, mesh.device)
        self.root = config.checkpoint.path or str(rank.run.checkpoints)
        self.lines = MetricWriter(rank.paths.metrics) if rank.rank == 0 else None
        self.facts = {
            "device": _device_name(mesh.device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "corpus_tokens": len(store.tokens),
            "corpus_documents": store.documents,
            "samples_per_epoch": self.sampler.samples,
            "network": {"name": config.network.name} | asdict(mesh.network),
        }
        self.progress = _Progress()

    def resume(self) -> None:
        """Load the newest checkpoint that every rank can read."""
        step, shard, passed = loading.restore(self.root, self.mesh.layout, self.rank.rank, self.mesh)
        path = None
        if step is not None and shard is not None:
            self.engine.load(dict(shard.by_name()), step)
            path = f"{self.root.rstrip('/')}/{loading.folder_of(step)}"
            self.progress.step = self.progress.line_step = step
            self.progress.loss = float(shard.scalars["loss"])
        for why in passed:
            print(f"passed over a checkpoint: {why}", file=sys.stderr)
        basis = flops.basis(self.config.hardware, str(self.config.train.precision))
        self._write(ResumedLine(time.time(), self.rank.attempt, step or 0, path, basis, self.facts))

    def train(self) -> None:
        """All steps that are left."""
        steps, every = self.config.train.steps, self.config.checkpoint.every
        gc.collect()
        gc.freeze()
        gc.disable()
        self.progress.line_time = time.perf_counter()
        while self.progress.step < steps:
            index = self.clock.step = self.progress.step
            with self.clock.phase("data"):
                batches = [self._batch(index, micro) for micro in range(self.accumulation)]
            lr = learning_rate(self.config.optim, index, steps)
            result = self.engine.step(batches, lr, self.clock.phase)
            self.progress.step = index + 1
            last = self.progress.step == steps
            saves = last or self.progress.step % every == 0
            if saves or self.progress.step % self.config.train.log_every == 0:
                self._log(result, lr)
            self.recorder.step(self.progress.step)
            if saves:
                self._save()
            if self.progress.step % _COLLECT_EVERY == 0:
                gc.collect()
        tokens = steps * self._tokens_per_step()
        self._write(EndedLine(time.time(), self.rank.attempt, steps, self.progress.loss, tokens))

    def _batch(self, step: int, micro: int) -> torch.Tensor:
        array = self.sampler.batch(
            step, micro, self.config.train.micro_batch, self.rank.rank, self.rank.world
        )
        return torch.from_numpy(array).to(self.mesh.device, non_blocking=True)

    def _tokens_per_step(self) -> int:
        return self.global_batch * self.config.data.sequence

    def _log(self, result: StepResult, lr: float) -> None:
        """Reduce the numbers of this line over all ranks and append it."""
        progress, now = self.progress, time.perf_counter()
        steps = progress.step - progress.line_step
        seconds = (now - progress.line_time) / steps
        means = (
            self.mesh.reduce(torch.stack([result.loss.double(), result.aux_loss.double()]), dist.ReduceOp.SUM)
            / self.rank.world
        )
        worst = self.mesh.reduce(
            torch.tensor([*self.clock.take(), memory_bytes(self.mesh.device)], dtype=torch.float64),
            dist.ReduceOp.MAX,
        ).tolist()
        progress.loss, progress.line_step, progress.line_time = float(means[0]), progress.step, now
        load = result.load.tolist()
        rate = self._tokens_per_step() / seconds
        self._write(
            StepLine(
                time=time.time(),
                attempt=self.rank.attempt,
                step=progress.step,
                loss=progress.loss,
                aux_loss=float(means[1]),
                lr=lr,
                grad_norm=float(result.grad_norm),
                tokens=progress.step * self._tokens_per_step(),
                tokens_per_second=rate,
                step_seconds=seconds,
                phase_seconds={name: worst[i] / steps for i, name in enumerate(PHASES)},
                mfu=self._mfu(rate),
                expert_load=load,
                balance_entropy=balance_entropy(load),
                dropped=0,
                memory_bytes=int(worst[-1]),
            )
        )
        if not torch.isfinite(means).all():
            raise FloatingPointError(f"the loss of step {progress.step} is {progress.loss}; lower optim.lr")

    def _mfu(self, tokens_per_second: float) -> float | None:
        peak = flops.peak(self.config.hardware, str(self.config.train.precision))
        if peak is None:
            return None
        per_token = flops.train_flops_per_token(self.config.model, self.config.data.sequence)
        return tokens_per_second * per_token / (peak * self.rank.world)

    def _save(self) -> None:
        with self.clock.phase("checkpoint"):
            shard = Shard(
                self.rank.rank,
                self.rank.world,
                self.mesh.layout,
                list(self.engine.pieces()),
                {"loss": self.progress.loss, "run": self.rank.run.run_id},
            )
            try:
                done = save(self.root, self.progress.step, shard, self.mesh, self.config.checkpoint.keep)
            except Incomplete as error:
                # Training state is sound and the last checkpoint stands; the next save may succeed.
                print(f"checkpoint failed: {error}", file=sys.stderr)
                if self.progress.step == self.config.train.steps:
                    raise
                return
        self._write(SavedLine(time.time(), self.rank.attempt, done.step, done.path, done.bytes, done.seconds))

    def _write(self, line: Any) -> None:
        if self.lines is not None:
            self.lines.write(line)

    def close(self) -> None:
        """Leave together; then end at once, since a teardown that hangs must not matter any more."""
        dist.barrier(group=self.mesh.control_group)
        if self.lines is not None:
            self.lines.close()
        self.recorder.close()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
