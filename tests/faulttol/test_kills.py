"""Whatever is killed while it saves, what is left loads; and the harness that says so finds what is wrong."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from faulttol.checkpoint import save as saving
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder
from faulttol.checkpoint.manifest import Identity, Incomplete, Uncertain
from faulttol.checkpoint.peers import SoloPeers
from faulttol.checkpoint.pieces import owned
from faulttol.checkpoint.retention import Retention
from faulttol.checkpoint.save import save
from faulttol.checkpoint.shards import layout, ordered
from faulttol.checkpoint.store import CheckpointStore
from faulttol.staged.saver import SavePolicy, Saver
from faulttol.staged.writer import CommitRequest, RequestHandler, SealRequest, WriterProcess
from tests.faulttol.kills import Killer, KillGang, KillPlace, Wrong
from tests.faulttol.staged import kill_ranks
from tests.faulttol.staged.kill_orders import Judged
from tests.faulttol.staged.s3_faults import KINDS, FaultyS3
from tests.source_tree import ROOT
from trainer.state import Slice

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
_ROWS = 64


def test_eight_kills_leave_nothing_wrong() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faulttol.kills", "--quick"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "8 kills, 0 wrong", done.stdout + done.stderr[-3000:]
    assert done.returncode == 0


# ---- what killed attempts left ----


def _leave(root: Path, attempt: int, step: int) -> Path:
    """A rank's file without a manifest."""
    path = root / CheckpointCommit(attempt, step, "killed").shard(0, "dead")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x" * 100)
    return path


def test_a_save_that_fails_gives_back_the_room_of_earlier_attempts(tmp_path: Path) -> None:
    """They may be what fills the storage, and only a commit would remove them otherwise."""
    _save(tmp_path, 1, 4)
    old, other = _leave(tmp_path, 1, 9), _leave(tmp_path, 3, 8)
    identity = Identity("killed", 3, {}, 0, 1)
    parts = [Slice("w", torch.zeros(8), Box.full((8,)))]
    with pytest.raises(Incomplete, match="TypeError"):
        save(str(tmp_path), 5, owned(parts), identity, {"no JSON": {1}}, SoloPeers(), Retention(2))
    assert not old.exists() and other.exists(), "its own attempt's may be another rank's, still being written"
    assert [commit.step for commit in CheckpointFolder(CheckpointStore(str(tmp_path))).commits] == [4]


def test_a_commit_removes_what_earlier_attempts_left_at_later_steps(tmp_path: Path) -> None:
    _save(tmp_path, 1, 4)
    old = _leave(tmp_path, 1, 9)
    _save(tmp_path, 2, 5)
    assert not old.exists()


# ---- a commit that nobody is told of ----


class _Lossy(CheckpointStore):
    """A store whose answer to the manifest is lost, after or before it is written."""

    written, readable, error = True, True, ConnectionError("reset by peer")

    def create(self, name: str, chunks: Iterable[bytes | memoryview]) -> int:
        if self.written:
            super().create(name, chunks)
        raise self.error

    def read(self, name: str) -> bytes:
        if not self.readable:
            raise ConnectionError("unreachable")
        return super().read(name)


def _commit(root: Path, written: bool = True, readable: bool = True, error: Exception | None = None) -> int:
    store, who = _Lossy(str(root)), Identity("killed", 1, {}, 0, 1)
    store.written, store.readable = written, readable
    store.error = error or store.error  # type: ignore[assignment]
    parts = owned([Slice("w", torch.ones(8), Box.full((8,)))])
    return saving.commit(store, 1, "word", who, [saving.write(store, 1, "word", who, parts)], {})


def test_a_lost_answer_to_the_manifest_is_looked_up(tmp_path: Path) -> None:
    assert _commit(tmp_path) > 32
    assert len(CheckpointFolder(CheckpointStore(str(tmp_path))).commits) == 1


@pytest.mark.parametrize(("written", "readable"), [(True, False), (False, True), (False, False)])
def test_what_cannot_be_looked_up_is_uncertain(tmp_path: Path, written: bool, readable: bool) -> None:
    """A store may carry a request out after its connection broke."""
    with pytest.raises(Uncertain, match="may be written or not: ConnectionError: reset by peer"):
        _commit(tmp_path, written, readable)


def test_another_manifest_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / CheckpointCommit(1, 1, "killed").manifest
    path.parent.mkdir()
    path.write_bytes(b"{}")
    with pytest.raises(ConnectionError):
        _commit(tmp_path, False)


def test_a_disk_that_refuses_is_certain(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        _commit(tmp_path, False, error=OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.parametrize("uncertain", [True, False])
def test_files_of_what_may_be_committed_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncertain: bool
) -> None:
    """Else the newest checkpoint could be one without its files, and the one before be retired already."""

    def fail(*_: object) -> int:
        raise (Uncertain if uncertain else Incomplete)("no answer")

    monkeypatch.setattr(saving, "commit", fail)
    with pytest.raises(Incomplete, match=f"step 4 {'may be saved or not' if uncertain else 'was not saved'}"):
        _save(tmp_path, 1, 4)
    assert bool(list(tmp_path.rglob("*.safetensors"))) == uncertain


class _Gone:
    """A key-value store whose server has died."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("rank 0 is gone")


class _Second:
    """`Peers` of a rank that isn't the first, as far as making a saver goes."""

    def gather(self, item: Any) -> None: ...

    def broadcast(self, item: Any) -> str:
        return "word"


def test_a_rank_that_rank_0_does_not_answer_keeps_its_file(tmp_path: Path) -> None:
    """Rank 0 may have died right after it committed."""
    identity, policy = (
        Identity("killed", 1, {}, 1, 2),
        SavePolicy(str(tmp_path), Retention(1), background=False),
    )
    saver = Saver(policy, identity, _Second(), _Gone(), torch.device("cpu"))  # type: ignore[arg-type]
    saver.stage(4, owned([Slice("w", torch.ones(8), Box.full((8,)))]), {})
    (outcome,) = saver.poll()
    assert isinstance(outcome.error, Uncertain) and "rank 0 didn't say how it ended" in str(outcome.error)
    assert len(list(tmp_path.rglob("*.r00001.*.safetensors"))) == 1


def test_a_writer_that_is_killed_while_it_commits_leaves_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = Identity("killed", 1, {}, 0, 1)
    saver = Saver(
        SavePolicy(str(tmp_path), Retention(1)), identity, SoloPeers(), dist.HashStore(), torch.device("cpu")
    )
    request = WriterProcess.request

    def killed(self: WriterProcess, order: Any, progress: Any) -> Any:
        if isinstance(order, CommitRequest):
            os.kill(self.pid or 0, signal.SIGKILL)
        return request(self, order, progress)

    monkeypatch.setattr(WriterProcess, "request", killed)
    saver.stage(4, owned([Slice("w", torch.ones(8), Box.full((8,)))]), {})
    saver.finish()
    (outcome,) = saver.poll()
    saver.close()
    assert isinstance(outcome.error, Uncertain) and "was killed by SIGKILL" in str(outcome.error)
    assert len(list(tmp_path.rglob("*.r00000.*.safetensors"))) == 1


# ---- what the writer tells ----


def test_a_writer_tells_what_the_disk_said(tmp_path: Path) -> None:
    """A write that fails halfway, as on a full disk, has parts of the buffer in its hands."""
    pieces = ordered(owned([Slice("w", torch.ones(1 << 20), Box.full((1 << 20,)))]))
    plan = layout(1, Identity("killed", 1, {}, 0, 1), pieces)
    buffer = tmp_path / "buffer"
    buffer.write_bytes(bytes(plan.size))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, most))
    try:
        with pytest.raises(OSError, match="File too large"):
            RequestHandler().handle(
                SealRequest(str(buffer), plan, "word", str(tmp_path / "there")), lambda _: None
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert not [path for path in (tmp_path / "there").rglob("*") if path.is_file()]


# ---- the judge ----


def _save(root: Path, attempt: int, step: int, wrong_step: int | None = None) -> None:
    """Save what a step holds, or in part what another does."""
    parts = []
    for name, shape in kill_ranks.whole_shapes(_ROWS).items():
        box = Box.full(shape)
        held = wrong_step if wrong_step is not None and name.endswith("bias") else step
        parts.append(Slice(name, kill_ranks.value(name, box, attempt, held), box))
    identity = Identity("killed", attempt, {}, 0, 1)
    save(str(root), step, owned(parts), identity, {"attempt": attempt}, SoloPeers(), Retention(2))


class _Pipe:
    def __init__(self) -> None:
        self.sent: list[Judged] = []

    def send(self, item: Judged) -> None:
        self.sent.append(item)


def _judge(root: Path, attempt: int = 9) -> Judged:
    pipe = _Pipe()
    kill_ranks.judge(str(root), _ROWS, attempt, {}, pipe)  # type: ignore[arg-type]
    return pipe.sent[0]


def _damage(root: Path, commit: CheckpointCommit) -> None:
    (path,) = root.glob(f"{commit.prefix}r*.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_judge_finds_right_what_is(tmp_path: Path) -> None:
    assert _judge(tmp_path) == Judged(None, "", 0, 0)
    _save(tmp_path, 1, 4)
    _save(tmp_path, 2, 5)
    assert _judge(tmp_path) == Judged((2, 5), "", 2, 0)


def test_the_judge_finds_values_of_two_steps(tmp_path: Path) -> None:
    _save(tmp_path, 1, 4, wrong_step=3)
    assert "blocks.0.bias: 97 of 97 elements aren't of attempt 1, step 4" in _judge(tmp_path).problem


@pytest.mark.parametrize("which", [0, 1])
def test_the_judge_finds_a_commit_that_does_not_load(tmp_path: Path, which: int) -> None:
    """The newest, which a restore would pass over, and the one before, which it wouldn't look at."""
    _save(tmp_path, 1, 4)
    _save(tmp_path, 1, 5)
    _damage(tmp_path, CheckpointFolder(CheckpointStore(str(tmp_path))).commits[which])
    assert ("is the newest" if which else "step 4") in _judge(tmp_path).problem


def test_the_judge_finds_the_older_one_wrong(tmp_path: Path) -> None:
    _save(tmp_path, 1, 4, wrong_step=3)
    _save(tmp_path, 1, 5)
    assert "aren't of attempt 1, step 4" in _judge(tmp_path).problem


def test_values_tell_place_attempt_and_step() -> None:
    box = Box.full((4, 5))
    seen = {
        tuple(kill_ranks.value("w", box, attempt, step).view(-1).tolist())
        for attempt in (1, 2)
        for step in (1, 2)
    }
    assert len(seen) == 4
    inner = Box((4, 5), (1, 2), (2, 3))
    assert torch.equal(
        kill_ranks.value("w", inner, 1, 1), kill_ranks.value("w", box, 1, 1)[inner.slices_within(box)]
    )


# ---- what the killer refuses ----


class _Told(Killer):
    """A killer whose judge has found something."""

    def __init__(self, scratch: Path, found: Judged) -> None:
        super().__init__(True, 0, scratch)
        self._found = found

    def _ask(self, act: str, *arguments: object) -> Judged:
        return self._found


def test_a_step_that_was_told_to_be_saved_must_be_there(tmp_path: Path) -> None:
    place = KillPlace("disk", str(tmp_path))
    killer = _Told(tmp_path, Judged((1, 4), "", 1, 0))
    killer._judge(place, [("saved", 1, 4, 0, ""), ("begin", 1, 5, 0, "")])
    assert place.newest == (1, 4) and place.begun == 5
    with pytest.raises(Wrong, match=r"\(1, 4\) is the newest, and \(1, 5\) was told to be saved"):
        killer._judge(place, [("saved", 1, 5, 0, "")])


def test_what_ranks_load_must_be_what_was_judged(tmp_path: Path) -> None:
    place = KillPlace("disk", str(tmp_path), newest=(1, 4))
    killer, gang = _Told(tmp_path, Judged(None, "", 0, 0)), KillGang([], str(tmp_path / "log"))
    for rank in range(2):
        (tmp_path / f"log.{rank}").write_text(f"loaded 1 {4 - rank} 0 \n")
    with pytest.raises(Wrong, match="rank 1 loaded"):
        killer._check_loaded(place, gang)


# ---- the faults of S3 ----


@pytest.fixture(scope="module")
def faulty() -> Iterator[FaultyS3]:
    with FaultyS3() as server:
        yield server


_SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
}


def _put(server: FaultyS3, name: str, data: bytes) -> int | None:
    """Status of the answer; None where the connection broke."""
    host = server.endpoint.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=20)
    with contextlib.closing(connection):
        try:
            connection.request("PUT", f"/runs/{name}", data, _SIGNED)
            return connection.getresponse().status
        except (ConnectionError, http.client.RemoteDisconnected):
            return None


def _get(server: FaultyS3, name: str) -> bytes | None:
    connection = http.client.HTTPConnection(server.endpoint.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", f"/runs/{name}", headers=_SIGNED)
        answer = connection.getresponse()
        data = answer.read()
        return data if answer.status == 200 else None


@pytest.mark.parametrize(
    ("kind", "status", "there"),
    [
        ("error", 500, False),
        ("busy", 503, False),
        ("slow", 200, True),
        ("torn", None, False),
        ("cut", None, False),
        ("lost", None, True),
    ],
)
def test_each_fault_is_what_it_says(faulty: FaultyS3, kind: str, status: int | None, there: bool) -> None:
    data = bytes(range(256)) * 2048
    faulty.met.clear()
    faulty.kinds, faulty.rate = (kind,), 1.0
    assert _put(faulty, kind, data) == status
    faulty.rate = 0.0
    assert faulty.met == {kind: 1}
    assert _get(faulty, kind) == (data if there else None)


def test_all_kinds_are_met_and_the_rest_passes(faulty: FaultyS3) -> None:
    faulty.met.clear()
    faulty.kinds, faulty.rate = KINDS, 0.5
    for number in range(80):
        _put(faulty, f"{number}", b"x" * 100)
    faulty.rate = 0.0
    assert set(faulty.met) == {"", *KINDS}
    assert 20 <= faulty.met[""] <= 60
