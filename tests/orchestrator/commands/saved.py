"""Small committed checkpoints of a run, as its ranks would have written them, for what reads only manifests."""

from __future__ import annotations

from typing import Any

from configs.paths import RunPaths
from configs.schema import RunConfig
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.peers import SoloPeers
from faulttol.checkpoint.save import Identity, Retention, TensorPiece, save
from orchestrator.record.clock import Instant
from orchestrator.record.events import GangShape, StateMoved, Submitted
from orchestrator.record.run_log import RunLog
from orchestrator.record.states import Reason, State
from trainer.fingerprint import fingerprint

PART = {
    "path": "corpus",
    "weight": 1.0,
    "digest": "d1",
    "tokens": 9000,
    "documents": 3,
    "tokenizer": "t",
    "separator": 0,
}


def data_of(config: RunConfig, **part: Any) -> dict[str, Any]:
    """What a checkpoint keeps of a corpus."""
    data = config.data
    return {
        "parts": [PART | part], "sequence": data.sequence, "validation": data.validation,
        "document_mask": data.document_mask,
    }  # fmt: skip


def commit(
    root: str, run_id: str, step: int, config: RunConfig, attempt: int = 1, samples: int | None = None
) -> None:
    """Commit a step whose state is one tensor."""
    count = step * (config.train.global_batch or 1) if samples is None else samples
    facts = {
        "samples": count, "tokens": count * config.data.sequence, "loss": 2.5,
        "fingerprint": fingerprint(config, data_of(config)), "lineage": [],
    }  # fmt: skip
    axes = ("pp", "dp", "cp", "ep", "etp", "tp")
    identity = Identity(run_id, attempt, {axis: config.parallel.size(axis) for axis in axes}, 0, 1)
    piece = TensorPiece("w", "float32", Box.full((4,)), memoryview(bytes(16)))
    save(root, step, [piece], identity, facts, SoloPeers(), Retention(last=9))


def stopped(
    run: RunPaths, config: RunConfig, ranks: int, to: State = State.CANCELLED, nodes: int | None = None
) -> None:
    """The log of a run that was queued and ended."""
    log = RunLog(run, epoch=1, now=Instant(1.0, 1.0))
    layout = {axis: config.parallel.size(axis) for axis in ("pp", "dp", "cp", "ep", "etp", "tp")}
    submitted = Submitted(0, GangShape(ranks, 1, nodes), config.train.steps, 3, 1.0, "demo", layout)
    log.append([submitted, StateMoved(State.QUEUED, Reason.SUBMITTED)], Instant(1.0, 1.0))
    moves = [] if to is State.CANCELLED else [State.PLACING, State.STARTING]
    log.append([StateMoved(state, Reason.SUBMITTED) for state in (*moves, to)], Instant(2.0, 2.0))
    log.close()
