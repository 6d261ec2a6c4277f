"""Snapshots in the memory of nodes: what is written where, and what is left after nodes are gone."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from faulttol.checkpoint import save as saving
from faulttol.checkpoint.folder import CheckpointCommit
from faulttol.checkpoint.load import Restored, Tier, restore, stored
from faulttol.snapshots import memory, remote_store
from faulttol.snapshots.memory import ReplicatedStore, partners
from faulttol.snapshots.remote_store import RemoteStore
from faulttol.snapshots.union_store import UnionStore
from tests.faulttol.ranks import identity, pieces, save_all, together
from tests.faulttol.snapshots.memory_nodes import Nodes

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]
SECRET = b"of this attempt"
RUN = "run-1"


# ---- a node's folder ----


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `memory.folder` makes folders."""
    monkeypatch.setenv("MEGARAY_MEMORY", str(tmp_path / "memory"))
    return tmp_path / "memory"


def test_folders_are_apart_and_private(base: Path) -> None:
    found = {memory.folder(node, run) for node in ("a", "a/b", "..", "%2E.") for run in (RUN, "run/2", ".")}
    assert len(found) == 12
    assert all(
        path.is_dir() and path.parent.parent == base and path.stat().st_mode & 0o777 == 0o700
        for path in found
    )
    assert memory.folder("a", RUN) == base / "a" / RUN
    assert base.stat().st_mode & 0o777 == 0o700


def test_without_a_variable_it_is_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGARAY_MEMORY", raising=False)
    node = f"test-{secrets.token_hex(4)}"
    found = memory.folder(node, RUN)
    try:
        assert found == Path(f"/dev/shm/megaray-{os.getuid()}/{node}/{RUN}")
    finally:
        memory.remove_run(found)
        found.parent.rmdir()


def test_another_users_folder_is_refused(base: Path, tmp_path: Path) -> None:
    told = f"checkpoint.memory_every needs {base}, which isn't this user's folder: type checkpoint.memory_every=null"
    (tmp_path / "elsewhere").mkdir()
    base.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=told):
        memory.folder("a", RUN)
    base.unlink()
    if os.geteuid() == 0:
        base.mkdir()
        os.chown(base, 65534, 65534)
        with pytest.raises(UserError, match=told):
            memory.folder("a", RUN)
        base.rmdir()
    base.write_text("")
    with pytest.raises(
        UserError, match=f"checkpoint.memory_every needs {base}, which can't be made: .*exists"
    ):
        memory.folder("a", RUN)


def _lay(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_what_is_older_than_a_commit_goes(tmp_path: Path) -> None:
    old = [
        "step-0000000010/run-1.a0001.manifest.json",
        "step-0000000010/run-1.a0001.r00000.aa.safetensors",
        "step-0000000010/.run-1.a0001.r00003.aa.safetensors.12ab.tmp",
        "step-0000000050/run-1.a0001.r00001.bb.safetensors",
        "step-0000000020/run-1.a0002.manifest.json",
        ".run-1.a0001.r00000.0",
    ]
    kept = [
        ".run-1.a0002.r00000.0",
        ".run-2.a0001.r00000.0",
        "step-0000000030/run-1.a0002.manifest.json",
        "step-0000000030/run-1.a0002.r00000.cc.safetensors",
        "step-0000000040/run-1.a0002.r00000.dd.safetensors",
        "step-0000000010/run-1.a0003.r00000.ee.safetensors",
        "step-0000000010/run-1.2.a0001.r00000.ff.safetensors",
        "step-0000000020/notes",
    ]
    _lay(tmp_path, *old, *kept)
    assert memory.purge_older(tmp_path, CheckpointCommit(2, 30, RUN)) == sorted(old)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == sorted(kept[:-1])
    assert not (tmp_path / "step-0000000050").exists() and (tmp_path / "step-0000000020/notes").exists()
    assert (
        memory.purge_older(tmp_path, CheckpointCommit(2, 30, RUN))
        == []
        == memory.purge_older(tmp_path / "no", CheckpointCommit(2, 30, RUN))
    )


def test_what_other_runs_left_goes_when_it_is_idle(base: Path) -> None:
    mine, busy, idle = (memory.folder("a", run) for run in (RUN, "busy", "idle"))
    for folder in (mine, busy, idle):
        _lay(folder, "step-0000000010/x")
        for path in (folder / "step-0000000010/x", folder / "step-0000000010", folder):
            os.utime(path, (1e9, 1e9))
    os.utime(busy / "step-0000000010/x")
    assert memory.remove_idle_runs(mine) == ["idle"]
    assert mine.exists() and busy.exists() and not idle.exists()
    memory.remove_run(mine)
    memory.remove_run(mine)
    assert not mine.exists()


# ---- both copies ----


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[ReplicatedStore, Path, Path]]:
    """Copies of a rank, with its node's folder and the partner's."""
    here, there = tmp_path / "here", tmp_path / "there"
    server = remote_store.serve(there, SECRET)
    yield ReplicatedStore(here, RemoteStore(server.address, SECRET)), here, there
    server.close()


def _all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_here_and_there(pair: tuple[ReplicatedStore, Path, Path]) -> None:
    copies, here, there = pair
    data = secrets.token_bytes(3_000_001)
    assert copies.write("a/b", iter([data[:5], memoryview(data)[5:]])) == len(data)
    assert copies.create("a/c", [b"one", b"two"]) == 6
    assert _all(here) == _all(there) == {"a/b": data, "a/c": b"onetwo"}
    with pytest.raises(FileExistsError):
        copies.create("a/c", [b"three"])
    assert _all(here) == _all(there) and copies.read("a/c") == b"onetwo"
    assert copies.names("a") == ["b", "c"] and copies.read_range("a/b", 3, 9) == data[3:9]
    copies.remove("a/b")
    assert _all(here) == _all(there) == {"a/c": b"onetwo"}


def test_a_manifest_that_is_there_already(pair: tuple[ReplicatedStore, Path, Path]) -> None:
    """It was broken off between there and here: the same one completes it, another one doesn't."""
    copies, here, there = pair
    _lay(there, "m")
    assert copies.create("m", [b"x"]) == 1 and _all(here) == {"m": b"x"}
    _lay(there, "n")
    with pytest.raises(FileExistsError):
        copies.create("n", [b"y"])
    assert _all(here) == {"m": b"x"} and _all(there) == {"m": b"x", "n": b"x"}


def test_a_file_that_lies_here_is_pushed(pair: tuple[ReplicatedStore, Path, Path]) -> None:
    copies, here, there = pair
    data = secrets.token_bytes(3_000_001)
    (here / "a").mkdir(parents=True)
    (here / "a/b").write_bytes(data)
    _lay(here, "mine")
    assert copies.push("a/b") == len(data) and _all(there) == {"a/b": data}


def test_without_another_node_there_is_one_copy(tmp_path: Path) -> None:
    copies = ReplicatedStore(tmp_path, None)
    assert copies.write("a", [b"x"]) == 1 and copies.push("a") == 0 and copies.create("b", [b"y"]) == 1
    assert _all(tmp_path) == {"a": b"x", "b": b"y"} and copies.url == str(tmp_path)
    copies.remove("b")
    assert _all(tmp_path) == {"a": b"x"}


# ---- a restart, with ranks that are threads and nodes that are folders ----

WORLD = 4


def _snapshot(root: Path, step: int, attempt: int = 1, commits: bool = True) -> None:
    """Save `ranks.values` on four nodes of one rank: to their own folder and their partner's."""
    folders = [root / str(node) for node in range(WORLD)]
    with ExitStack() as ends:
        servers = [remote_store.serve(folder, SECRET) for folder in folders]
        for server in servers:
            ends.callback(server.close)
        keepers = partners([str(node) for node in range(WORLD)])

        def one(rank: int, peers: Any) -> None:
            who = identity(rank, WORLD, attempt=attempt)
            keeper = keepers[rank]
            assert keeper is not None
            copies = ReplicatedStore(folders[rank], RemoteStore(servers[keeper].address, SECRET))
            token = peers.broadcast(saving.new_token())
            answers = peers.gather((saving.write(copies, step, token, who, pieces(rank, WORLD, step)), None))
            if answers is not None and commits:
                saving.commit(copies, step, token, who, saving.collect_receipts(answers), {"step": step})

        answers = together(WORLD, one)
        assert answers == [None] * WORLD, answers


def _restart(
    root: Path, nodes: list[str], store: Path | None = None, attempt: int = 2
) -> list[Restored | None]:
    """Restore on these nodes; every rank must have loaded the same, and rightly."""
    tensors = pytest.importorskip("tests.faulttol.tensors")
    world = len(nodes)
    parts = tensors.blank(tensors.flat_bytes(WORLD, 0, world))

    def one(rank: int, peers: Any) -> Restored | None:
        wanted = [tensors.LoadTarget.from_slice(p.name, p.tensor, p.box) for p in parts[rank]]
        who = identity(rank, world, attempt=attempt)
        with memory.tier(root / nodes[rank], peers, who, SECRET, "127.0.0.1") as found:
            tiers = ([found] if found else []) + (stored(str(store)) if store else [])
            return restore(tiers, wanted, peers, who) if tiers else None

    before = set(threading.enumerate())
    answers = together(world, one)
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name == "file-server"], "all servers are closed"
    raised = [answer for answer in answers if isinstance(answer, Exception)]
    if raised:
        raise raised[0]
    found = [answer for answer in answers if not isinstance(answer, Exception)]
    assert len({(a.step, a.tier, a.passed) if a else None for a in found}) == 1
    if found[0] is not None:
        whole = tensors.flat_bytes(WORLD, found[0].step, world)
        assert tensors.equal(parts, whole)
    return found


def _lose(root: Path, *nodes: int) -> None:
    for node in nodes:
        memory.remove_run(root / str(node))


def test_any_node_may_be_lost(tmp_path: Path) -> None:
    for lost in range(WORLD):
        root = tmp_path / str(lost)
        _snapshot(root, 20)
        _lose(root, lost)
        nodes = [str(node) for node in range(WORLD) if node != lost]
        for now in (nodes, [*nodes, "new"], [*reversed(nodes), "new", "new"]):
            found = _restart(root, now)
            assert found[0] is not None and (found[0].step, found[0].tier) == (20, "memory")
            assert found[0].path == "memory://all/step-0000000020" and found[0].passed == ()


def test_two_nodes_that_keep_each_others_copies_are_too_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nodes 0 and 2 aren't; with 0 and 1 the store's older step is what is left."""
    store = tmp_path / "store"
    save_all(store, 10, WORLD)
    _snapshot(tmp_path / "a", 20)
    _lose(tmp_path / "a", 0, 2)
    assert _restart(tmp_path / "a", ["1", "3", "1"], store)[0].step == 20  # type: ignore[union-attr]
    _snapshot(tmp_path / "b", 20)
    _lose(tmp_path / "b", 2, 3)
    found = _restart(tmp_path / "b", ["0", "1"], store)[0]
    assert found is not None and (found.step, found.tier) == (10, "store")
    assert "the snapshot of step 20 in memory is left out: " in caplog.text
    assert "r00002." in caplog.text and "is missing, of 2 files" in caplog.text
    assert _restart(tmp_path / "b", ["0", "1"]) == [None, None]


def test_the_newest_of_both_tiers_is_taken(tmp_path: Path) -> None:
    store = tmp_path / "store"
    _snapshot(tmp_path, 20)
    for step, tier in ((10, "memory"), (20, "memory"), (30, "store")):
        save_all(store, step, WORLD)
        found = _restart(tmp_path, ["0", "1", "2", "3"], store)[0]
        assert found is not None and (found.step, found.tier) == (max(step, 20), tier)


def test_a_snapshot_that_was_not_committed_is_left_out(tmp_path: Path) -> None:
    _snapshot(tmp_path, 20)
    _snapshot(tmp_path, 30, commits=False)
    _snapshot(tmp_path, 10, attempt=2, commits=False)
    found = _restart(tmp_path, ["0", "1", "2", "3"], attempt=3)[0]
    assert found is not None and found.step == 20
    files = sorted(str(path) for path in (tmp_path / "0").rglob("*"))
    memory.purge_older(tmp_path / "0", CheckpointCommit(1, 20, RUN))
    assert files == sorted(str(path) for path in (tmp_path / "0").rglob("*")), "a later one may be on its way"


def test_a_newer_snapshot_that_lost_a_file_is_left_out(tmp_path: Path) -> None:
    _snapshot(tmp_path, 10)
    _snapshot(tmp_path, 20)
    for path in tmp_path.rglob("step-0000000020/*.r00002.*"):
        path.unlink()
    found = _restart(tmp_path, ["0", "1", "2", "3"])[0]
    assert found is not None and (found.step, found.passed) == (10, ())


def test_nothing_is_in_memory_at_the_first_start(tmp_path: Path) -> None:
    assert _restart(tmp_path, ["0", "1"], attempt=1) == [None, None]
    _snapshot(tmp_path, 20)
    assert _restart(tmp_path, ["new", "newer"]) == [None, None], "the old nodes are all gone"


def test_a_changed_byte_is_found_and_the_store_is_read(tmp_path: Path) -> None:
    _snapshot(tmp_path, 20)
    save_all(tmp_path / "store", 10, WORLD)
    _lose(tmp_path, 1)
    (copy,) = (tmp_path / "0").rglob("*.r00001.*.safetensors")
    data = bytearray(copy.read_bytes())
    data[4100] ^= 1
    copy.write_bytes(data)
    found = _restart(tmp_path, ["0", "2", "3"], tmp_path / "store")[0]
    assert found is not None and (found.step, found.tier) == (10, "store")
    assert "step 20 in memory: " in found.passed[0] and "differs from what was saved in " in found.passed[0]


def test_buffers_of_earlier_attempts_go_at_the_start(tmp_path: Path) -> None:
    """What is a snapshot's has a name of its own as well, and stays."""
    _snapshot(tmp_path, 20)
    for path in list(tmp_path.rglob("*.safetensors")):
        os.link(path, path.parents[1] / f".{path.name}")
    _lay(tmp_path / "0", f".{RUN}.a0002.r00000.0")
    found = _restart(tmp_path, ["0", "1", "2", "3"])[0]
    assert found is not None and found.step == 20
    assert [path.name for path in tmp_path.glob("*/.*")] == [f".{RUN}.a0002.r00000.0"]


def test_another_runs_files_are_not_looked_at(tmp_path: Path) -> None:
    _snapshot(tmp_path, 20)
    for node in range(WORLD):
        save_all(tmp_path / str(node), 90, 1, run="run-2")
    found = _restart(tmp_path, ["0", "1", "2", "3"])[0]
    assert found is not None and found.step == 20


def test_a_node_that_cannot_serve_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its files have copies; without a server anywhere there is no tier, and no error."""
    plain = memory.serve

    def serve(folder: Path, secret: bytes, host: str) -> remote_store.FileServer:
        if folder.name in refusing:
            raise OSError(98, "Address already in use")
        return plain(folder, secret, host)

    monkeypatch.setattr(memory, "serve", serve)
    _snapshot(tmp_path, 20)
    refusing = {"0", "2"}
    found = _restart(tmp_path, ["0", "1", "2", "3"])[0]
    assert found is not None and found.step == 20
    assert f"snapshots in {tmp_path}/0 are left out: OSError: [Errno 98]" in caplog.text
    refusing = {"0", "1", "2"}
    assert _restart(tmp_path, ["0", "1", "2", "3"]) == [None] * 4


def test_one_rank_of_a_node_serves_and_all_read_their_own_node_directly(tmp_path: Path) -> None:
    _snapshot(tmp_path, 20)

    def one(rank: int, peers: Any) -> list[str]:
        node = tmp_path / str(rank // 2)
        with memory.tier(node, peers, identity(rank, 8), SECRET, "127.0.0.1") as found:
            assert isinstance(found, Tier) and isinstance(found.store, UnionStore) and found.owner
            return [holder.url for holder in found.store.holders]

    for rank, urls in enumerate(together(8, one)):
        assert isinstance(urls, list) and len(urls) == 4
        assert urls.pop(rank // 2) == str(tmp_path / str(rank // 2))
        assert all(url.startswith("memory://127.0.0.1:") for url in urls)


def test_servers_stay_until_the_last_rank_has_read(tmp_path: Path) -> None:
    """Rank 0 is on its way out when rank 1 reads what only rank 0's node has."""
    _snapshot(tmp_path, 20)
    leaving = threading.Event()
    stores: list[Any] = []

    def one(rank: int, peers: Any) -> bytes:
        with memory.tier(tmp_path / str(2 * rank), peers, identity(rank, 2), SECRET, "127.0.0.1") as found:
            assert found is not None
            if rank == 0:
                gather = peers.gather
                peers.gather = lambda item: leaving.set() or gather(item)
                return b""
            stores.append(found.store)
            assert leaving.wait(20)
            (name,) = [n for n in found.store.names("step-0000000020") if ".r00000." in n]
            return found.store.read(f"step-0000000020/{name}")[8:20]

    assert together(2, one) == [b"", b'{"__metadata']
    remote = [holder for holder in stores[0].holders if isinstance(holder, RemoteStore)]
    assert len(remote) == 1 and not remote[0]._idle, "connections are closed as well"


def test_an_error_inside_closes_the_servers_at_once(tmp_path: Path) -> None:
    _snapshot(tmp_path, 20)

    def one(rank: int, peers: Any) -> None:
        with memory.tier(tmp_path / str(rank), peers, identity(rank, WORLD), SECRET, "127.0.0.1"):
            raise RuntimeError("no place for the tensors")

    before = set(threading.enumerate())
    assert [str(answer) for answer in together(WORLD, one)] == ["no place for the tensors"] * WORLD
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "file-server"]


# ---- real processes ----


def test_ranks_and_a_node_are_killed(tmp_path: Path) -> None:
    """Three nodes save, all ranks are killed and a node's memory is gone; four ranks on other nodes continue."""
    with Nodes(tmp_path) as nodes:
        nodes.run(["0", "1", "2"], store=f"{tmp_path}/store", to_memory=[10, 20], to_store=[5], begun=[30])
        nodes.kill()
        nodes.lose("1")
        job: dict[str, Any] = {"store": f"{tmp_path}/store", "attempt": 2, "saved": 3}
        answers = nodes.run(["2", "0", "0", "3"], **job, tiers=["all", "store", "memory"])
        for told in answers:
            assert [(one["step"], one["tier"], one["right"], one["passed"]) for one in told] == [
                (20, "memory", True, []),
                (5, "store", True, []),
                (20, "memory", True, []),
            ]
        assert len(list(nodes.memory("0").rglob("*a0001*"))) > 0, "kept until the next commit"
