"""The run's checkpoints as one rank uses them: the one that it resumes from, and its saves."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from configs.errors import UserError
from configs.metrics import ResumedLine, SavedLine, read_all
from configs.rank import RankContext
from configs.schema import RunConfig
from faulttol.checkpoint import load as loading
from faulttol.checkpoint.folder import parse_checkpoint_path
from faulttol.checkpoint.manifest import Identity
from faulttol.checkpoint.pieces import LoadTarget, TensorPiece, owned
from faulttol.checkpoint.retention import Retention
from faulttol.checkpoint.store import CheckpointStore
from faulttol.snapshots import memory
from faulttol.staged.saver import SaveCallbacks, SaveOutcome, SavePolicy, Saver, SnapshotLocation
from trainer.engines.base import Engine
from trainer.fingerprint import compare_fingerprints, fingerprint
from trainer.optim.schedule import consumed_samples
from trainer.parallel.mesh import Mesh

_log = logging.getLogger("megaray.trainer")
_RECEIPT_TIMEOUT = timedelta(hours=1)
"""Longest time that a rank may take to write its file; a save that takes longer is given up."""


@dataclass(frozen=True)
class LoadedState:
    """What was loaded."""

    step: int
    samples: int
    """Samples consumed up to it."""
    loss: float
    path: str
    tier: str
    """Where it lay: `store`, `memory` or `another run`."""
    passed: tuple[str, ...]
    """Why newer checkpoints were passed over."""
    notes: list[str]
    """That, and settings that changed, a line each."""


class Checkpoints:
    """The run's checkpoints, as one rank uses them."""

    def __init__(
        self, config: RunConfig, rank: RankContext, mesh: Mesh, data: dict[str, Any], signs: SaveCallbacks
    ) -> None:
        self._config, self._mesh, self._rank, self._signs = config, mesh, rank, signs
        self._root = config.checkpoint.path or str(rank.run.checkpoints)
        self._fingerprint = fingerprint(config, data)
        self._identity = Identity(
            run=rank.run.run_id, attempt=rank.attempt, layout=mesh.layout, rank=rank.rank, world=rank.world
        )
        self._lineage: list[dict[str, Any]] = []
        settings = config.checkpoint
        policy = SavePolicy(
            root=self._root,
            retention=Retention(settings.keep, settings.keep_every),
            background=settings.background,
            busy=settings.busy,
        )
        self._snapshot_folder: Path | None = None
        """Of snapshots in this node's memory."""
        if settings.memory_every is not None:
            self._snapshot_folder = memory.folder(
                os.environ.get("MEGARAY_NODE") or socket.gethostname(), rank.run.run_id
            )
            memory.remove_idle_runs(self._snapshot_folder)
        kept = (
            SnapshotLocation(self._snapshot_folder, rank.master_addr)
            if self._snapshot_folder is not None
            else None
        )
        self._saver = Saver(
            policy, self._identity, mesh, _receipt_store(rank, mesh), mesh.device, signs, kept
        )

    # ---- restore ----

    def restore(self, engine: Engine) -> LoadedState | None:
        """Load the newest checkpoint that every rank can read, or what `resume` names where the run has none of its own;
        None where there is neither.

        Raises:
            UserError: where it is another model's, corpus's or run's, naming what differs.
        """
        with ExitStack() as stack:
            return self._restore(engine, self._tiers(stack))

    def _restore(self, engine: Engine, tiers: Sequence[loading.Tier]) -> LoadedState | None:
        newest = loading.newest(tiers, self._mesh)
        if newest is None:
            if self._config.resume:
                raise UserError(
                    f"resume='{self._config.resume}' holds no checkpoint; name a run that has saved one, or its folder"
                )
            return None
        refused, changes = compare_fingerprints(newest.facts.get("fingerprint", {}), self._fingerprint)
        if refused:
            raise UserError(
                f"the checkpoint of step {newest.step} in {self._root} can't be resumed: {'; '.join(refused[:4])}; set "
                "it back, or name another checkpoint.path to start afresh"
            )
        loaded = loading.restore(tiers, list(_wanted(engine)), self._mesh, self._identity, self._signs.alive)
        if loaded is None:
            return None
        engine.after_load()
        self._lineage = list(loaded.facts.get("lineage", []))
        if newest.run != self._identity.run:
            self._lineage.append({"run": newest.run, "step": loaded.step, "path": loaded.path})
        notes = [f"passed over a checkpoint: {why}" for why in loaded.passed]
        notes += [f"changed since step {loaded.step}: {line}" for line in changes]
        samples, planned = int(loaded.facts["samples"]), consumed_samples(self._config.train, loaded.step)
        if samples != planned:
            notes.append(
                f"the batch changed: {samples} samples were consumed up to step {loaded.step}, where this "
                f"configuration would have taken {planned}; it continues with sample {samples}"
            )
        loss = loaded.facts.get("loss")  # weights that came from elsewhere have none
        loss = float("nan") if loss is None else float(loss)
        return LoadedState(loaded.step, samples, loss, loaded.path, loaded.tier, tuple(loaded.passed), notes)

    def _tiers(self, stack: ExitStack) -> list[loading.Tier]:
        """What may be resumed from, while `stack` is open: memory, the store, and what `resume` names."""
        tiers = loading.stored(self._root)
        if self._snapshot_folder is not None:
            tiers = [*self._snapshots(self._snapshot_folder, stack), *tiers]
        if self._config.resume:
            root, step = parse_checkpoint_path(self._config.resume)
            tiers.append(loading.Tier("another run", CheckpointStore(root), owner=False, step=step))
        return tiers

    def _snapshots(self, folder: Path, stack: ExitStack) -> list[loading.Tier]:
        first = self._identity.rank == 0
        reason, secret = self._mesh.broadcast(
            (_snapshots_passed_over(self._rank), secrets.token_bytes(32)) if first else None
        )
        if reason is not None:
            _log.warning("snapshots in memory are passed over: %s", reason)
            return []
        context = memory.tier(folder, self._mesh, self._identity, secret, self._rank.master_addr)
        tier = stack.enter_context(context)
        return [tier] if tier is not None else []

    # ---- saves ----

    def prepare(self, engine: Engine) -> None:
        """Get memory for saves while training begins."""
        self._saver.prepare(_pieces(engine))

    def stage(
        self,
        engine: Engine,
        step: int,
        samples: int,
        loss: float,
        tiers: Sequence[str],
        agreed: int | None = None,
    ) -> None:
        """Begin to save; `settle` comes before anything that is saved changes.

        Args:
            samples: consumed up to this step.
            tiers: `memory`, `store` or both.
            agreed: where copies of the state differ, the newest saved step in which they didn't; it is pinned.
        """
        facts = {
            "fingerprint": self._fingerprint,
            "samples": samples,
            "tokens": samples * self._config.data.sequence,
            "loss": loss,
            "lineage": self._lineage,
            "agreed": agreed,
        }
        self._saver.stage(step, _pieces(engine), facts, tiers)

    def settle(self) -> None:
        """Return once nothing live is read any more."""
        self._saver.settle()

    def ended(self) -> list[SaveOutcome]:
        """Saves that ended since the last call."""
        return self._saver.poll()

    def finish(self) -> None:
        """Wait until no save is being written."""
        self._saver.finish()

    def close(self) -> None:
        """Give memory and the writer process back; the run has ended, and what it needs is in the store."""
        self._saver.close()
        if self._snapshot_folder is not None:
            memory.remove_run(self._snapshot_folder)


def _pieces(engine: Engine) -> Iterator[TensorPiece]:
    return owned(engine.state())


def _wanted(engine: Engine) -> Iterator[LoadTarget]:
    for part in engine.state():
        dtype = str(part.tensor.dtype).removeprefix("torch.")
        yield LoadTarget(part.name, dtype, part.box, part.tensor)


def _snapshots_passed_over(rank: RankContext) -> str | None:
    """Why snapshots in memory are passed over, by the outcome of the previous attempts."""
    history = []
    for attempt in range(1, rank.attempt):
        resumed: ResumedLine | None = None
        newer = False
        for line in read_all(rank.run.attempt(attempt).metrics):
            if isinstance(line, ResumedLine):
                resumed = line
            elif isinstance(line, SavedLine):
                newer = newer or resumed is None or line.step > resumed.step
            if newer and resumed is not None:
                break  # a day's steps may follow, and nobody trains before this is known
        if resumed is not None and resumed.path is not None:
            history.append((str(resumed.facts.get("tier", "store")), resumed.step, newer))
    return memory.reason_to_skip_memory(history)


def _receipt_store(rank: RankContext, mesh: Mesh) -> dist.Store:
    """The store for receipts of saves, which rank 0 serves."""
    if rank.world == 1:
        return dist.HashStore()
    first = rank.rank == 0
    own = (
        dist.TCPStore(rank.master_addr, 0, is_master=True, wait_for_workers=False, timeout=_RECEIPT_TIMEOUT)
        if first
        else None
    )
    port = mesh.broadcast(own.port if own is not None else None)
    return own or dist.TCPStore(rank.master_addr, port, is_master=False, timeout=_RECEIPT_TIMEOUT)
