"""Saves in two stages: training waits for a copy in host memory; digesting, writing and committing continue beside it.

On every rank a thread leads a save through: it waits for the copy, has the writer process write the rank's file, and
leaves a receipt in a key-value store that rank 0 serves. Rank 0's thread collects the receipts and has its writer commit.
No collective is used, so nothing can race training's own, and a rank that dies leaves its peers in no call that hangs.
"""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError, from_json
from faulttol.checkpoint import save as saving
from faulttol.checkpoint.coverage import FilePlan
from faulttol.checkpoint.folder import CheckpointCommit, folder_of, run_tag
from faulttol.checkpoint.manifest import Identity, Incomplete, SaveSuperseded, ShardFile, Uncertain
from faulttol.checkpoint.peers import Peers, by_rank, failure_of
from faulttol.checkpoint.pieces import TensorPiece
from faulttol.checkpoint.retention import Retention
from faulttol.checkpoint.shards import ShardLayout, layout, ordered
from faulttol.checkpoint.store import CheckpointStore
from faulttol.snapshots.partners import partners
from faulttol.staged.buffers import Buffer, Buffers, StagedCopy
from faulttol.staged.writer import (
    CommitRequest,
    DiscardRequest,
    InlineWriter,
    PurgeRequest,
    ReplicateRequest,
    SealRequest,
    ServeRequest,
    WriteRequest,
    WriterProcess,
)

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

_POLL_SECONDS = 0.1
"""Seconds between two looks at a save that is waited for."""
_KINDS = {kind.__name__: kind for kind in (UserError, SaveSuperseded, Uncertain, Incomplete)}


@dataclass(frozen=True)
class SavePolicy:
    """How a run saves."""

    root: str
    """Folder or fsspec URL."""
    retention: Retention
    background: bool = True
    """Whether training continues while a save is written."""
    busy: str = "wait"
    """`wait` or `skip`: what a save does while the one before is being written."""


@dataclass(frozen=True)
class SaveCallbacks:
    """What a rank shows while it waits for a save."""

    alive: Callable[[], None] = lambda: None
    """Called while its own part makes progress."""
    waiting: Callable[[], None] = lambda: None
    """Called when its own part is done and the other ranks' isn't."""
    working: Callable[[], None] = lambda: None
    """Called when it has something to do again after it has waited: the next tier, or the commit on rank 0."""


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended."""

    step: int
    path: str
    bytes: int
    """Over all ranks; 0 where it failed."""
    seconds: float
    """From the call to the commit or failure."""
    tier: str
    """`store` or `memory`."""
    held: float
    """Seconds that training stood still for it, on the rank that stood longest."""
    error: Exception | None = None
    """Why nothing was committed."""
    skipped: bool = False
    """Left out, since the save before was still being written."""


@dataclass(frozen=True)
class SnapshotLocation:
    """Where snapshots in memory lie."""

    folder: Path
    """Of this rank's node, as `faulttol.snapshots.memory.folder` gives it."""
    rank_zero_address: str
    """Address of rank 0's node."""


@dataclass
class _Job:
    """One save on this rank."""

    step: int
    token: str
    facts: dict[str, Any]
    began: float
    tiers: Sequence[str]
    layout: ShardLayout | None = None
    buffer: Buffer | None = None
    copy: StagedCopy | None = None
    failed: Exception | None = None
    """Why this rank has nothing to write."""
    held: float = 0.0
    progress: int = 0
    own_done: threading.Event = field(default_factory=threading.Event)
    """This rank's part is done."""
    commits: bool = False
    """This is rank 0, and all ranks have done their part."""
    ended: threading.Event = field(default_factory=threading.Event)
    outcomes: list[SaveOutcome] = field(default_factory=list)
    live: list[TensorPiece] | None = None
    """What is written without a copy."""
    copied: bool = False
    sealed: ShardFile | None = None
    """The buffer is a whole file."""


class Saver:
    """One rank's saves. Every rank makes one at the same point, and stages the same steps in the same order.

    Args:
        policy: of the run.
        identity: of this rank.
        peers: used when it is made, and at each save under `skip`.
        control: key-value store that all ranks share.
        device: where what is saved lives.
        callbacks: for whoever watches the rank.
        memory: for snapshots in memory; None: there are none.
    """

    def __init__(
        self,
        policy: SavePolicy,
        identity: Identity,
        peers: Peers,
        control: dist.Store,
        device: torch.device,
        callbacks: SaveCallbacks | None = None,
        memory: SnapshotLocation | None = None,
    ) -> None:
        self._policy, self._identity, self._peers = policy, identity, peers
        self._control, self._device, self._callbacks = control, device, callbacks or SaveCallbacks()
        self._first = identity.rank == 0
        self._nonce = str(peers.broadcast(saving.new_token() if self._first else None))
        self._count = 0
        self._writer: InlineWriter | WriterProcess = WriterProcess() if policy.background else InlineWriter()
        word = f"{run_tag(identity.run)}.a{identity.attempt:04d}.r{identity.rank:05d}"
        self._memory = memory
        self._partner = self._choose_partner(memory, peers) if memory is not None else None
        self._secret = peers.broadcast(secrets.token_bytes(32) if self._first else None)
        self._served: int | None = None
        """Process id of the writer that serves this node's snapshots."""
        self._buffers = Buffers(device, memory.folder if memory is not None else None, word)
        self._preparing: threading.Thread | None = None
        self._job: _Job | None = None
        self._known_plan: str | None = None
        """Digest of the plan that rank 0 knows of this rank."""
        self._plans: dict[str, bytes] = {}
        """On rank 0, packed plans of all ranks by digest: a few KB each."""
        self._known: set[str] = set()
        """Digests of those that the writer `_known_by` has got."""
        self._known_by: int | None = None
        self._ended: list[SaveOutcome] = []

    @property
    def writer_pid(self) -> int | None:
        """Process id of the writer, where it runs."""
        return self._writer.pid

    # ---- what training calls ----

    def prepare(self, pieces: Iterable[TensorPiece]) -> None:
        """Get memory and writer for saves of such pieces, beside what follows: the first save then waits for neither."""
        if (not self._policy.background and self._memory is None) or self._count:
            return  # a save that has begun gets them itself
        size = layout(0, self._identity, ordered(pieces)).size
        with suppress(Exception):  # the save will meet it again, and tell it
            self._writer.ready()
        self._preparing = threading.Thread(target=self._prepare_in_background, args=(size,), daemon=True)
        self._preparing.start()

    def _prepare_in_background(self, size: int) -> None:
        with suppress(Exception):
            self._serve()
        with suppress(Exception):
            self._buffers.prepare(size)

    def stage(
        self,
        step: int,
        pieces: Iterable[TensorPiece],
        facts: dict[str, Any],
        tiers: Sequence[str] = ("store",),
    ) -> None:
        """Begin to save a step. What is saved mustn't change before `settle`.

        The pieces of all ranks must cover each tensor exactly once; `owned` chooses among replicas. What goes wrong is
        an outcome, never an exception here.

        Args:
            facts: JSON that a resumed run needs; rank 0's is kept.
            tiers: `memory`, `store` or both, in this order.
        """
        if self._policy.busy == "skip" and self._any_busy():
            why = Incomplete("the save before was still being written (checkpoint.busy=skip)")
            self._ended += [
                SaveOutcome(step, self._path(step, tier), 0, 0.0, tier, 0.0, why, skipped=True)
                for tier in tiers
            ]
            return
        self.finish()  # which holds training for the save before, not for this one
        began = time.monotonic()
        self._count += 1
        job = _Job(step, f"{self._nonce}{self._count:04x}", facts, began, tiers)
        try:
            self._join_preparation()
            self._start_writer()
            kept = ordered(pieces)
            job.layout = layout(step, self._identity, kept)
            if not self._policy.background and list(tiers) == ["store"]:
                job.live = kept  # training waits, so a copy would only cost memory and time
            else:
                job.buffer = self._buffers.acquire(job.layout.size)
                job.copy = StagedCopy(job.buffer, job.layout, kept, self._device)
        except Exception as error:
            job.failed = error
        self._job = job
        threading.Thread(target=self._run_save, args=(job,), daemon=True).start()
        job.held += time.monotonic() - began
        if not self._policy.background:
            self.settle()
            self.finish()

    def settle(self) -> None:
        """Return once nothing live is read any more; called before the optimizer changes it."""
        job = self._job
        if job is not None and job.copy is not None and not job.ended.is_set():
            with self._measure_hold(job):
                job.copy.settle()

    def poll(self) -> list[SaveOutcome]:
        """Saves that ended since the last call."""
        if self._job is not None and self._job.ended.is_set():
            self._collect_outcomes()
        ended, self._ended = self._ended, []
        return ended

    def finish(self) -> None:
        """Wait until no save is being written; `poll` then tells how the last one ended."""
        job = self._job
        if job is None:
            return
        with self._measure_hold(job):
            seen, waited = 0, False
            while not job.ended.wait(_POLL_SECONDS):
                if job.progress != seen:
                    seen = job.progress
                    self._callbacks.alive()
                waits = job.own_done.is_set() and not job.commits
                if waits != waited:
                    waited = waits
                    (self._callbacks.waiting if waits else self._callbacks.working)()
        self._collect_outcomes()

    def close(self) -> None:
        """Wait for what is being written, then give memory and process back; snapshots in memory stay."""
        self.finish()
        self._join_preparation()
        self._writer.close()
        self._buffers.close()

    # ---- this rank's part ----

    def _any_busy(self) -> bool:
        mine = self._job is not None and not self._job.ended.is_set()
        answers = self._peers.gather(mine)
        return bool(self._peers.broadcast(any(answers) if answers is not None else None))

    @contextmanager
    def _measure_hold(self, job: _Job) -> Iterator[None]:
        began = time.monotonic()
        yield
        job.held += time.monotonic() - began

    def _collect_outcomes(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            self._ended += [replace(one, held=max(one.held, job.held)) for one in job.outcomes]

    def _join_preparation(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None

    def _start_writer(self) -> None:
        """The writer runs, and serves its node's snapshots where there are any."""
        self._writer.ready()
        self._serve()

    def _serve(self) -> None:
        pid = self.writer_pid or 0
        if self._memory is not None and self._served != pid:
            request = ServeRequest(str(self._memory.folder), self._secret, self._memory.rank_zero_address)
            address = self._writer.request(request, lambda _: None)
            self._control.set(f"serve/{self._identity.rank}", address)
            self._served = pid

    def _choose_partner(self, memory: SnapshotLocation, peers: Peers) -> int | None:
        """The rank whose node keeps the copy of this one's files."""
        nodes = peers.gather(str(memory.folder))
        keepers = peers.broadcast(partners(nodes) if nodes is not None else None)
        return keepers[self._identity.rank]

    def _run_save(self, job: _Job) -> None:
        """Lead a save to its end, in a thread of its own."""
        try:
            for tier in job.tiers:
                job.own_done.clear()
                job.outcomes.append(self._save_to_tier(job, tier))
        finally:
            job.ended.set()

    def _save_to_tier(self, job: _Job, tier: str) -> SaveOutcome:
        """How the save to a tier ended."""
        try:
            receipt = self._write(job, tier)
        except Exception as error:
            kind, text = failure_of(error)
            receipt = {"failed": [kind.__name__, text]}
        job.own_done.set()
        try:
            size, held = self._agree(job, tier, receipt | {"held": job.held})
            if tier == "memory" and job.buffer is not None:
                self._buffers.retain(job.buffer)
                who = self._identity
                sweep = PurgeRequest(CheckpointCommit(who.attempt, job.step, run_tag(who.run)))
                with suppress(Exception):  # memory is wasted, nothing is lost
                    self._writer.request(sweep, lambda _: None)
            return self._outcome(job, tier, size, held, None)
        except Exception as error:
            if not isinstance(error, Uncertain):
                with suppress(Exception):
                    discard = DiscardRequest(self._root(tier), job.step, job.token, self._identity)
                    self._writer.request(discard, lambda _: None)
            kind, text = failure_of(error)
            return self._outcome(job, tier, 0, job.held, kind(text))

    def _root(self, tier: str) -> str | None:
        return self._policy.root if tier == "store" else None

    def _path(self, step: int, tier: str) -> str:
        root = self._policy.root.rstrip("/") if tier == "store" else "memory:/"
        return f"{root}/{folder_of(step)}"

    def _outcome(self, job: _Job, tier: str, size: int, held: float, error: Exception | None) -> SaveOutcome:
        path, seconds = self._path(job.step, tier), time.monotonic() - job.began
        return SaveOutcome(job.step, path, size, seconds, tier, held, error)

    def _write(self, job: _Job, tier: str) -> dict[str, Any]:
        """Write this rank's file; its receipt."""
        if job.live is not None:
            store = CheckpointStore(self._policy.root)
            written = saving.write(store, job.step, job.token, self._identity, job.live)
            return self._receipt(written.record, FilePlan(written.plain or ()))
        if job.failed is not None or job.copy is None or job.layout is None or job.buffer is None:
            raise job.failed or Incomplete("nothing was staged")

        def progressed(done: int) -> None:
            job.progress += 1 + done

        plain, path, token, fresh = job.layout, job.buffer.path, job.token, job.sealed is None
        if not job.copied:
            job.copied = True  # once: what is live has changed by the next time
            try:
                job.copy.run()
            except Exception as error:
                job.failed = error
                raise
        if job.sealed is None:
            job.sealed = self._writer.request(SealRequest(path, plain, token, self._root(tier)), progressed)
        if tier == "memory":
            partner = (
                self._control.get(f"serve/{self._partner}").decode() if self._partner is not None else None
            )
            self._writer.request(ReplicateRequest(path, plain, token, partner), progressed)
        elif not fresh:
            self._writer.request(WriteRequest(path, plain, token, self._policy.root), progressed)
        return self._receipt(job.sealed, FilePlan(plain.pieces))

    def _receipt(self, record: ShardFile, plan: FilePlan) -> dict[str, Any]:
        """What rank 0 has to know; a plan is sent once."""
        if self._known_plan != plan.digest:
            self._control.set(
                f"plan/{self._identity.rank}/{plan.digest}", base64.b64encode(plan.packed).decode()
            )
            self._known_plan = plan.digest
        return {"record": [record.bytes, record.index, record.digest], "plan": plan.digest}

    # ---- all ranks ----

    def _agree(self, job: _Job, tier: str, receipt: dict[str, Any]) -> tuple[int, float]:
        """Bytes of all ranks' files and the longest that one was held, once committed.

        Raises:
            Uncertain: where rank 0 didn't say, as when it is gone: it may have committed before.
            Exception: of the kind and text that all ranks get, where nothing was.
        """
        key, rank = f"{job.token}/{tier}/", self._identity.rank
        try:
            if not self._first:
                self._control.set(f"{key}{rank}", json.dumps(receipt))
                answer = from_json(self._control.get(f"{key}end"))
            else:
                answer = self._collect(job, tier, receipt)
                self._control.set(f"{key}end", json.dumps(answer))
        except Exception as error:
            raise Uncertain(f"rank 0 didn't say how it ended: {type(error).__name__}: {error}") from None
        if "failed" in answer:
            kind, text = answer["failed"]
            raise _KINDS[kind](text)
        return answer["bytes"], answer["held"]

    def _collect(self, job: _Job, tier: str, receipt: dict[str, Any]) -> dict[str, Any]:
        """On rank 0: all receipts, then the commit; what all ranks get."""
        try:
            receipts = [receipt]
            for rank in range(1, self._identity.world):
                receipts.append(from_json(self._control.get(f"{job.token}/{tier}/{rank}")))
                self._control.delete_key(f"{job.token}/{tier}/{rank}")
            held = max(float(one["held"]) for one in receipts)
            return {"bytes": self._commit(job, tier, receipts), "held": held}
        except Exception as error:
            kind, text = failure_of(error)
            if kind is not UserError:
                how = "may be saved or not" if kind is Uncertain else "was not saved"
                text = f"step {job.step} {how} to {self._root(tier) or 'memory'}: {text}"
            return {"failed": [kind.__name__, text]}

    def _commit(self, job: _Job, tier: str, receipts: list[dict[str, Any]]) -> int:
        def progressed(done: int) -> None:
            job.progress += 1 + done

        failed = [(rank, one["failed"]) for rank, one in enumerate(receipts) if "failed" in one]
        if failed:
            severe = next(
                (kind for _, (kind, _) in failed if kind != Incomplete.__name__), Incomplete.__name__
            )
            raise _KINDS[severe](by_rank([(rank, text) for rank, (_, text) in failed]))
        plans = [str(one["plan"]) for one in receipts]
        for rank, plan in enumerate(plans):
            if plan not in self._plans:
                self._plans[plan] = base64.b64decode(self._control.get(f"plan/{rank}/{plan}"))
                self._control.delete_key(f"plan/{rank}/{plan}")
        if self._known_by != self.writer_pid:  # a new writer knows nothing
            self._known_by, self._known = self.writer_pid, set()
        unknown = {plan: self._plans[plan] for plan in plans if plan not in self._known}
        request = CommitRequest(
            root=self._root(tier),
            step=job.step,
            token=job.token,
            identity=self._identity,
            records=tuple(ShardFile(*one["record"]) for one in receipts),
            plans=tuple(plans),
            unknown=unknown,
            facts=job.facts,
            retention=self._policy.retention,
        )
        try:
            job.commits = True
            size = int(self._writer.request(request, progressed))
        except Incomplete as error:
            if isinstance(self._writer, WriterProcess) and self.writer_pid is None:
                raise Uncertain(f"while it was being committed, {error}") from None
            raise
        finally:
            job.commits = False
        self._known.update(unknown)
        return size
