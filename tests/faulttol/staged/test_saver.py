"""Saves beside training: what is committed is the state of the moment, a failure is told and never the end."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from configs.errors import UserError  # noqa: E402
from faulttol.checkpoint import save as saving  # noqa: E402
from faulttol.checkpoint.folder import CheckpointCommit  # noqa: E402
from faulttol.checkpoint.manifest import Incomplete, SaveSuperseded  # noqa: E402
from faulttol.checkpoint.retention import Retention  # noqa: E402
from faulttol.checkpoint.save import owned  # noqa: E402
from faulttol.checkpoint.shards import ALIGNMENT, ordered  # noqa: E402
from faulttol.checkpoint.shards import layout as plan_of  # noqa: E402
from faulttol.checkpoint.store import CheckpointStore  # noqa: E402
from faulttol.staged.buffers import Buffer, Buffers, StagedCopy  # noqa: E402
from faulttol.staged.saver import SaveCallbacks, SaveOutcome, SavePolicy, Saver, SnapshotLocation  # noqa: E402
from faulttol.staged.writer import InlineWriter, PurgeRequest, WriterProcess  # noqa: E402
from tests.faulttol.ranks import ThreadPeers, identity, save_all, together  # noqa: E402
from tests.faulttol.tensors import blank, equal, layout, restore_layout, state  # noqa: E402
from trainer.state import Slice  # noqa: E402

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

CPU = torch.device("cpu")
Act = Callable[[int, Saver], Any]


def _policy(root: object, **changes: Any) -> SavePolicy:
    return SavePolicy(str(root), Retention(2), **changes)


def _with_savers(
    world: int, act: Act, root: object, callbacks: SaveCallbacks | None = None, **changes: Any
) -> list[Any]:
    """What `act(rank, saver)` gives on each of several ranks."""
    control = dist.HashStore()

    def one(rank: int, peers: ThreadPeers) -> Any:
        saver = Saver(_policy(root, **changes), identity(rank, world), peers, control, CPU, callbacks)
        try:
            return act(rank, saver)
        finally:
            saver.close()

    answers = together(world, one)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def _scramble(parts: list[Slice]) -> None:
    for part in parts:
        part.tensor.copy_(~part.tensor if part.tensor.dtype == torch.bool else part.tensor + 1)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("world", [1, 3])
def test_the_state_of_the_moment_is_committed(tmp_path: Path, world: int, background: bool) -> None:
    """Every save has the values that were staged, though training continues as soon as it may."""
    tensors = state(5)
    live = layout(tensors, world, 1, "boxes")
    seen = [layout({n: t.clone() for n, t in tensors.items()}, world, 1, "boxes")]

    def train(rank: int, saver: Saver) -> list[SaveOutcome]:
        saver.prepare(owned(live[rank]))
        ended = []
        for step in (1, 2, 3):
            saver.stage(step, owned(live[rank]), {"step": step})
            saver.settle()
            if step < 3:
                _scramble(live[rank])
            ended += saver.poll()
        saver.finish()
        return ended + saver.poll()

    for outcomes in _with_savers(world, train, tmp_path, background=background):
        assert [(o.step, o.error, o.skipped) for o in outcomes] == [(n, None, False) for n in (1, 2, 3)]
        assert all(o.bytes > 0 and o.held >= 0 for o in outcomes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000000002", "step-0000000003"], (
        "two are kept"
    )
    for parts in seen[0]:
        _scramble(parts)
        _scramble(parts)
    back = blank(live)
    assert [a.step for a in restore_layout(tmp_path, back) if not isinstance(a, Exception) and a] == [
        3
    ] * world
    assert equal(back, live) and equal(back, seen[0])


def test_training_waits_for_the_copy() -> None:
    """`settle` returns only when nothing live is read any more, and what changes then isn't saved."""
    live = layout({"weight": torch.zeros(1 << 20)}, 1, 0, "rows")[0]
    kept = ordered(owned(live))
    plan = plan_of(1, identity(0, 1), kept)
    buffer = Buffer(plan.size)
    copy = StagedCopy(buffer, plan, kept, CPU)
    late = threading.Timer(0.3, copy.run)
    late.start()
    copy.settle()
    live[0].tensor.fill_(1)
    late.join()
    assert not bool(buffer.tensor(plan.offsets[0], kept[0]).any())
    buffer.close()


def test_what_was_copied_is_not_copied_again(tmp_path: Path) -> None:
    """Memory fails behind the copy; the store still gets the state of the moment, not what training made of it."""
    live = layout({"weight": torch.zeros(1000)}, 1, 0, "rows")
    requests: list[str] = []

    def train(_: int, saver: Saver) -> list[SaveOutcome]:
        request = saver._writer.request

        def refuse(order: Any, progress: Any) -> Any:
            requests.append(type(order).__name__)
            if requests == ["SealRequest"]:
                live[0][0].tensor.fill_(1)
                raise Incomplete("refused once")
            return request(order, progress)

        saver._writer.request = refuse  # type: ignore[method-assign]
        saver.stage(1, owned(live[0]), {}, ("memory", "store"))
        saver.finish()
        return saver.poll()

    ((memory, store),) = _with_savers(1, train, tmp_path, background=False)
    assert memory.tier == "memory" and "refused once" in str(memory.error) and store.error is None
    back = blank(live)
    restore_layout(tmp_path, back)
    assert not bool(back[0][0].tensor.any())


def _snapshot_savers(tmp_path: Path, act: Act, attempt: int = 1, world: int = 1) -> list[Any]:
    control = dist.HashStore()

    def one(rank: int, peers: ThreadPeers) -> Any:
        folder = tmp_path / "memory" / f"node{rank}"
        who, where = identity(rank, world, attempt=attempt), SnapshotLocation(folder, "127.0.0.1")
        saver = Saver(_policy(tmp_path / "store"), who, peers, control, CPU, memory=where)
        try:
            return act(rank, saver)
        finally:
            saver.close()

    return together(world, one)


def test_a_snapshot_is_a_whole_file(tmp_path: Path) -> None:
    """On its node, on another node and in the store: the same bytes."""
    live = layout(state(4), 2, 1, "rows")

    def train(rank: int, saver: Saver) -> list[SaveOutcome]:
        saver.stage(1, owned(live[rank]), {}, ("memory", "store"))
        saver.settle()
        saver.finish()
        return saver.poll()

    for memory, store in _snapshot_savers(tmp_path, train, world=2):
        assert (memory.tier, memory.error, store.tier, store.error) == ("memory", None, "store", None)
    for path in tmp_path.rglob("step-*/*.safetensors"):
        size = int.from_bytes(path.read_bytes()[:8], "little")
        assert size and json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["step"] == "1"
    files: dict[str, list[bytes]] = {}
    for path in tmp_path.rglob("step-*/*.safetensors"):
        files.setdefault(path.name, []).append(path.read_bytes())
    assert len(files) == 2
    assert all(len(copies) == 3 and len(set(copies)) == 1 for copies in files.values())
    back = blank(live)
    found = restore_layout(tmp_path / "memory" / "node0", back)
    assert not [one for one in found if isinstance(one, Exception)] and equal(back, live)


def test_the_newest_snapshot_stays_whole_while_the_next_is_made(tmp_path: Path) -> None:
    live = layout(state(4), 1, 1, "rows")

    def train(_: int, saver: Saver) -> list[str]:
        seen = []
        for step in (1, 2, 3):
            saver.stage(step, owned(live[0]), {"step": step}, ("memory",))
            saver.settle()
            _scramble(live[0])
            saver.finish()
            assert [outcome.error for outcome in saver.poll()] == [None]
            folder = tmp_path / "memory" / "node0"
            seen += sorted(path.name for path in folder.glob("step-*"))
            _whole(folder, step)
        pid = saver.writer_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            saver.stage(4, owned(live[0]), {}, ("memory",))
            saver.settle()
            _whole(tmp_path / "memory" / "node0", 3)
        finally:
            os.kill(pid, signal.SIGKILL)
        saver.finish()
        _whole(tmp_path / "memory" / "node0", 3)
        return seen

    (seen,) = _snapshot_savers(tmp_path, train)
    assert not isinstance(seen, Exception), seen
    assert seen == ["step-0000000001", "step-0000000002", "step-0000000003"], "older ones go"

    def again(_: int, saver: Saver) -> None:
        saver.prepare(owned(live[0]))
        _whole(tmp_path / "memory" / "node0", 3)

    assert _snapshot_savers(tmp_path, again, attempt=2) == [None]


def _whole(folder: Path, step: int) -> None:
    """Every block of a snapshot is as its digests say."""
    parts = blank(layout(state(4), 1, 1, "rows"))
    (found,) = restore_layout(folder, parts)
    assert not isinstance(found, Exception) and found is not None and found.step == step


@pytest.mark.parametrize("folder", [False, True])
def test_the_file_of_a_later_step_fits_into_the_same_memory(tmp_path: Path, folder: bool) -> None:
    """To get memory anew takes seconds, and a step's number grows."""
    pieces = ordered(owned(layout(state(4), 1, 1, "rows")[0]))
    sizes = [plan_of(step, identity(0, 1), pieces).size for step in (0, 9, 10, 123_456_789)]
    buffers = Buffers(CPU, tmp_path if folder else None, "w")
    first = buffers.acquire(sizes[0])
    assert all(buffers.acquire(size) is first for size in sizes)
    buffers.close()


def test_values_lie_at_pages(tmp_path: Path) -> None:
    plan = plan_of(123456, identity(0, 1), ordered(owned(layout(state(4), 1, 1, "rows")[0])))
    assert len(plan.header) % ALIGNMENT == 0 and plan.offsets[0] == len(plan.header)


def test_the_file_is_what_a_blocking_save_writes(tmp_path: Path) -> None:
    """Byte for byte, the words of the save aside: the same readers read both."""
    sizes = []
    for name, background in (("a", True), ("b", False)):
        root = tmp_path / name

        def save(_: int, saver: Saver) -> None:
            saver.stage(7, owned(layout(state(3), 1, 0, "rows")[0]), {})
            saver.settle()
            saver.finish()

        _with_savers(1, save, root, background=background)
        (file,) = (root / "step-0000000007").glob("*.safetensors")
        sizes.append(file.read_bytes())
    assert sizes[0] == sizes[1]


def test_a_rank_that_cannot_write_is_named_and_the_next_save_commits(tmp_path: Path) -> None:
    live = layout(state(1), 2, 1, "rows")

    def train(rank: int, saver: Saver) -> list[SaveOutcome]:
        pieces = list(owned(live[rank]))
        if rank == 1:
            pieces.append(max(pieces, key=lambda piece: piece.box.elements))  # there twice
        for step, given in ((1, pieces), (2, list(owned(live[rank])))):
            saver.stage(step, given, {})
            saver.finish()
            if step == 1:
                left[rank] = [path.name for path in tmp_path.rglob(f"*.r{rank:05d}.*")]
        return saver.poll()

    left: dict[int, list[str]] = {}
    for first, second in _with_savers(2, train, tmp_path):
        assert isinstance(first.error, Incomplete) and first.bytes == 0
        assert "step 1 was not saved" in str(first.error) and "rank 1: " in str(first.error)
        assert second.error is None and second.bytes > 0
    assert left == {0: [], 1: []}, "nothing is left of it"


def _big(rows: int = 64) -> dict[str, Tensor]:
    return {"weight": torch.randn(rows, 1 << 18)}


def test_a_writer_that_is_killed_fails_one_save(tmp_path: Path) -> None:
    live = layout(_big(), 1, 0, "rows")[0]
    (tmp_path / "pipe").mkdir()

    def train(_: int, saver: Saver) -> tuple[int, list[SaveOutcome]]:
        saver.prepare(owned(live))
        assert saver.writer_pid is not None
        os.kill(saver.writer_pid, signal.SIGSTOP)
        saver.stage(1, owned(live), {})
        saver.settle()
        os.kill(saver.writer_pid, signal.SIGKILL)
        saver.finish()
        old = saver.writer_pid
        saver.stage(2, owned(live), {})
        saver.finish()
        assert saver.writer_pid not in (None, old)
        return 0, saver.poll()

    ((_, (first, second)),) = _with_savers(1, train, tmp_path)
    assert "the writer process" in str(first.error) and "SIGKILL" in str(first.error)
    assert second.error is None


def test_nothing_is_prepared_beside_a_save_that_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads would fill one buffer."""
    live, prepared = layout(state(4), 1, 0, "rows")[0], list[int]()
    monkeypatch.setattr(Buffers, "prepare", lambda _, size: prepared.append(size))

    def train(_: int, saver: Saver) -> list[SaveOutcome]:
        saver.stage(1, owned(live), {})
        saver.prepare(owned(live))
        saver.finish()
        return saver.poll()

    assert [outcome.error for outcome in _with_savers(1, train, tmp_path)[0]] == [None] and not prepared
    _with_savers(1, lambda _, saver: saver.prepare(owned(live)), tmp_path / "other")
    assert len(prepared) == 1


def test_a_writer_ends_with_its_rank(tmp_path: Path) -> None:
    """Also where the rank is killed: nobody else would end it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # the rank
        try:
            writer = WriterProcess()
            writer.ready()
            with suppress(Incomplete):  # an answer says that it is up
                writer.request(PurgeRequest(CheckpointCommit(1, 1, "run")), lambda _: None)
            os.write(write, f"{writer.pid}\n".encode())
            time.sleep(600)
        finally:
            os._exit(1)
    pid = int(os.read(read, 32))
    os.kill(pid, signal.SIGSTOP)  # as if it were in the middle of a write that takes long
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the writer lives on"
        time.sleep(0.05)


@pytest.mark.parametrize("busy", ["wait", "skip"])
def test_a_save_while_one_is_being_written(tmp_path: Path, busy: str) -> None:
    live = layout(_big(), 2, 0, "rows")
    calls: list[str] = []

    def train(rank: int, saver: Saver) -> list[SaveOutcome]:
        saver.prepare(owned(live[rank]))
        pid = saver.writer_pid
        assert pid is not None
        if rank == 1:
            os.kill(pid, signal.SIGSTOP)
        saver.stage(1, owned(live[rank]), {})
        saver.settle()
        if rank == 1:
            release = threading.Timer(0.5, os.kill, (pid, signal.SIGCONT))
            release.start()
        saver.stage(2, owned(live[rank]), {})
        saver.settle()
        saver.finish()
        return saver.poll()

    shown = SaveCallbacks(
        lambda: calls.append("alive"), lambda: calls.append("waiting"), lambda: calls.append("working")
    )
    for outcomes in _with_savers(2, train, tmp_path, callbacks=shown, busy=busy):
        told = [(o.step, o.skipped) for o in sorted(outcomes, key=lambda o: o.step)]
        assert told == [(1, False), (2, busy == "skip")]
        left_out = next(o for o in outcomes if o.step == 2)
        assert (left_out.error is None) is (busy == "wait")
        assert busy == "wait" or "still being written (checkpoint.busy=skip)" in str(left_out.error)
    assert "waiting" in calls, "the rank whose part was done says that it waits"


def test_rank_0_works_again_while_it_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has waited for the other rank's part; from then on all wait for it."""
    order: list[str] = []
    waited, worked = threading.Event(), threading.Event()
    write, commit = Saver._write, saving.commit

    def held(self: Saver, *args: Any) -> Any:
        assert self._identity.rank == 0 or waited.wait(30)
        return write(self, *args)

    def slow(*args: Any) -> int:
        assert worked.wait(30)
        return commit(*args)

    monkeypatch.setattr(Saver, "_write", held)
    monkeypatch.setattr(saving, "commit", slow)

    def train(rank: int, saver: Saver) -> list[SaveOutcome]:
        saver._writer = InlineWriter()  # in this process, where the commit can be held up
        if rank == 0:
            saver._callbacks = SaveCallbacks(
                waiting=lambda: (order.append("waiting"), waited.set()),  # type: ignore[arg-type, return-value]
                working=lambda: (order.append("working"), worked.set()),  # type: ignore[arg-type, return-value]
            )
        saver.stage(1, owned(layout(state(3), 2, 0, "rows")[rank]), {})
        saver.settle()
        saver.finish()
        return saver.poll()

    for (outcome,) in _with_savers(2, train, tmp_path):
        assert outcome.error is None
    assert order[:2] == ["waiting", "working"]


def test_another_runs_folder_and_a_newer_attempt_are_told_as_what_they_are(tmp_path: Path) -> None:
    def save(_: int, saver: Saver) -> list[SaveOutcome]:
        saver.stage(3, owned(layout(state(3), 1, 0, "rows")[0]), {})
        saver.finish()
        return saver.poll()

    save_all(tmp_path / "other", 1, run="other")
    ((outcome,),) = _with_savers(1, save, tmp_path / "other")
    assert isinstance(outcome.error, UserError) and "belongs to run other" in str(outcome.error)
    save_all(tmp_path / "newer", 1, attempt=2)
    ((outcome,),) = _with_savers(1, save, tmp_path / "newer")
    assert isinstance(outcome.error, SaveSuperseded)


def test_a_changed_plan_is_checked_anew(tmp_path: Path) -> None:
    """What rank 0 knows of a rank's plan must not hide that the next one misses a tensor."""
    live = layout(state(2), 2, 1, "rows")

    def train(rank: int, saver: Saver) -> list[SaveOutcome]:
        for step in (1, 2, 3):
            pieces = list(owned(live[rank]))
            if rank and step == 2:
                pieces.remove(max(pieces, key=lambda piece: piece.box.elements))
            saver.stage(step, pieces, {})
            saver.settle()
        saver.finish()
        return saver.poll()

    for first, second, third in _with_savers(2, train, tmp_path):
        assert first.error is None and third.error is None
        assert isinstance(second.error, Incomplete) and "has no source" in str(second.error)


def test_a_new_writer_is_told_all_plans(tmp_path: Path) -> None:
    """It may be killed while it is idle: the next save commits."""
    live = layout(state(2), 2, 1, "rows")

    def train(rank: int, saver: Saver) -> list[SaveOutcome]:
        for step in (1, 2):
            saver.stage(step, list(owned(live[rank])), {})
            saver.finish()
            pid = saver.writer_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            while saver.writer_pid is not None:
                time.sleep(0.01)
        return saver.poll()

    for outcomes in _with_savers(2, train, tmp_path):
        assert [outcome.error for outcome in outcomes] == [None, None]


def test_storage_that_refuses_is_told_and_training_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.write_text("a file where the folder should be")
    live = layout(state(2), 1, 1, "rows")[0]

    def train(_: int, saver: Saver) -> list[SaveOutcome]:
        saver.stage(1, owned(live), {})
        saver.finish()
        root.unlink()
        saver.stage(2, owned(live), {})
        saver.finish()
        return saver.poll()

    ((first, second),) = _with_savers(1, train, root)
    assert isinstance(first.error, Incomplete) and "rank 0: " in str(first.error)
    assert second.error is None and CheckpointStore(str(root)).names()
