"""Snapshots in the memory of nodes: checkpoints whose files lie on each rank's node, and once more on another node.

    /dev/shm/megaray-1000/NODE/RUN/step-0000000200/RUN.a0002.r00005.1f3a9c07.safetensors

They survive the ranks, and the loss of a node, as its ranks' files have a copy elsewhere. A restart collects what all nodes
still have into one store that it reads like any other, and passes over what isn't whole. Nothing here outlives the
machines' power: durable checkpoints are the store's part.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError, from_json
from configs.paths import own_folder
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder, run_tag
from faulttol.checkpoint.load import Tier
from faulttol.checkpoint.manifest import Identity, Incomplete
from faulttol.checkpoint.peers import Peers, capture_failure, run_on_rank_zero
from faulttol.checkpoint.store import CheckpointStore, StoreLike
from faulttol.snapshots.partners import NAME as NAME
from faulttol.snapshots.partners import partners as partners
from faulttol.snapshots.partners import reason_to_skip_memory as reason_to_skip_memory
from faulttol.snapshots.remote_store import RemoteStore, local_address_for, serve
from faulttol.snapshots.union_store import UnionStore

_log = logging.getLogger("megaray.checkpoint")
_STEP = re.compile(r"step-(\d{10,})")
_CHUNK = 1 << 20
_ANSWER_SECONDS = 20.0
"""That a node may be silent before another's copy is read: a restart shouldn't wait long for a node that is going."""


# ---- where files lie ----


def folder(node: str, run: str) -> Path:
    """The folder of a run's snapshots on a node; made where it isn't there.

    It lies below `/dev/shm/megaray-<uid>`, or below `MEGARAY_MEMORY`, which should be on a tmpfs too.

    Args:
        node: any name that tells nodes apart, the same in the next attempt.
        run: id of the run.

    Raises:
        UserError: where it can't be made, or the folder it would lie in belongs to another user.
    """
    named = os.environ.get("MEGARAY_MEMORY")
    base = Path(named or f"/dev/shm/megaray-{os.getuid()}")
    how = "type checkpoint.memory_every=null, or set MEGARAY_MEMORY to a folder of your own on a tmpfs"
    try:
        if not own_folder(base):
            raise UserError(f"checkpoint.memory_every needs {base}, which isn't this user's folder: {how}")
        place = base / _folder_name(node) / _folder_name(run)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"checkpoint.memory_every needs {base}, which can't be made: {error.strerror}: {how}"
        ) from None
    return place


def _folder_name(name: str) -> str:
    word = run_tag(name)
    return f"%2E{word[1:]}" if word.startswith(".") else word


def purge_older(folder: Path, newest: CheckpointCommit) -> list[str]:
    """Remove from a node's folder what is older than a commit of the run, own files and copies, and tell their names.

    Called on every node once all ranks know of the commit, which may be in memory or in the store: so an earlier attempt's
    files stay until then. Several ranks of a node may call it at once.
    """
    gone = []
    for place, name, commit in _files(folder, newest.run):
        if (commit.attempt, commit.step) < (newest.attempt, newest.step):
            (place / name).unlink(missing_ok=True)
            gone.append(f"{place.name}/{name}")
    for place in folder.glob("step-*"):
        with suppress(OSError):  # not empty
            place.rmdir()
    return sorted([*gone, *_drop_buffers(folder, newest.run, newest.attempt)])


def _drop_buffers(folder: Path, run: str, attempt: int) -> Iterator[str]:
    """Remove the names of memory that ranks of earlier attempts filled: what a snapshot needs of it has another name."""
    for path in folder.glob(".*"):
        earlier = _attempt(path.name, run)
        if earlier is not None and earlier < attempt:
            path.unlink(missing_ok=True)
            yield path.name


def remove_run(folder: Path) -> None:
    """Remove a run's folder on a node, once its last checkpoint is in the store."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_idle_runs(folder: Path, idle: float = 86400.0) -> list[str]:
    """Remove what other runs have left on a node: memory that nobody else gives back. Their store has their checkpoints.

    Args:
        folder: of the run that continues; its neighbours are looked at.
        idle: seconds since a run's last file was written.

    Returns:
        Names of the folders that were removed.
    """
    gone = []
    for other in folder.parent.iterdir():
        if other != folder and _last_write(other) < time.time() - idle:
            remove_run(other)
            gone.append(other.name)
    return sorted(gone)


def _last_write(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:  # something in it was just removed
        return time.time()


def _attempt(name: str, run: str) -> int | None:
    """Which attempt of a run a file is of, finished or not; None where it is another run's."""
    match = re.fullmatch(rf"\.?{re.escape(run)}\.a(\d{{4,}})\..+", name)
    return int(match[1]) if match else None


def _files(folder: Path, run: str) -> Iterator[tuple[Path, str, CheckpointCommit]]:
    """Files of a run's commits, and what a writer that was killed left of one."""
    for place in folder.glob("step-*"):
        step = _STEP.fullmatch(place.name)
        names: list[str] = []
        with suppress(OSError):  # another rank of the node sweeps too
            names = [path.name for path in place.iterdir()]
        for name in names:
            attempt = _attempt(name, run)
            if step and attempt is not None:
                yield place, name, CheckpointCommit(attempt, int(step[1]), run)


# ---- writing ----


class ReplicatedStore:
    """One rank's files in the memory of its own node and, once more, of another: a `StoreLike` that writes both.

    Args:
        folder: on the own node, as `folder` gives it.
        partner: the other node's, as a `RemoteStore`; None: there is none.
    """

    def __init__(self, folder: Path, partner: StoreLike | None) -> None:
        self._folder, self._own, self._partner = folder, CheckpointStore(str(folder)), partner
        self.url = self._own.url

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> int:
        """Write a file here and then there; its size in bytes.

        Raises:
            OSError: where one of them can't be written; the other one may be there then.
        """
        size = self._own.write(name, chunks)
        self.push(name)
        return size

    def create(self, name: str, chunks: Iterable[bytes | memoryview]) -> int:
        """Write a small new file there and then here, so that what is seen here has its copy.

        Raises:
            FileExistsError: where it is here already, or there with other bytes.
            OSError: where one of them can't be written.
        """
        data = b"".join(chunks)
        if self._partner is not None:
            try:
                self._partner.create(name, [data])
            except FileExistsError:  # left by a commit that was broken off between there and here
                if self._partner.read(name) != data:
                    raise
        return self._own.create(name, [data])

    def push(self, name: str) -> int:
        """Send the other node a file that is whole here; bytes that were sent.

        Raises:
            OSError: where the other node doesn't take it.
        """
        return self._partner.write(name, _chunks(self._folder / name)) if self._partner is not None else 0

    def remove(self, name: str) -> None:
        """Remove a file or folder here and there."""
        self._own.remove(name)
        if self._partner is not None:
            self._partner.remove(name)

    def read(self, name: str) -> bytes:
        """A whole file of this node."""
        return self._own.read(name)

    def read_range(self, name: str, start: int, end: int) -> bytearray:
        """Bytes `[start, end)` of a file of this node."""
        return self._own.read_range(name, start, end)

    def read_into(self, name: str, start: int, into: memoryview) -> int:
        """Fill memory with the bytes of a file of this node from `start` on; how many there were."""
        return self._own.read_into(name, start, into)

    def names(self, folder: str = "") -> list[str]:
        """Names in a folder of this node."""
        return self._own.names(folder)


def _chunks(path: Path) -> Iterator[memoryview]:
    view = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(view):
            yield view[:count]


# ---- what a restart finds ----


@contextmanager
def tier(
    folder: Path, peers: Peers, identity: Identity, secret: bytes, rank_zero_address: str
) -> Iterator[Tier | None]:
    """What all nodes' memory still has of this run's whole snapshots, while the context lasts.

    All ranks enter and leave together; on the way out they wait for each other, but not after an exception. One rank of
    each node that has files serves them meanwhile. What a node can't show is left out with a line in the log, never an
    error: the store has older state.

    Args:
        folder: of this rank's node, as `folder` gives it.
        secret: one for all ranks, made anew for each attempt: `peers.broadcast(secrets.token_bytes(32))` on rank 0.
        rank_zero_address: address of rank 0's node, which tells by which of its addresses a node is reached.

    Yields:
        None where no snapshot is whole.
    """
    dropped = len(list(_drop_buffers(folder, run_tag(identity.run), identity.attempt)))
    _log.debug("%d buffers of earlier attempts were removed from %s", dropped, folder)
    with ExitStack() as ends:
        serving = _serving(folder, peers)
        if not serving:
            yield None
            return
        shown = None
        if identity.rank in serving:
            shown, failure = capture_failure(
                lambda: _serve_own(folder, identity, secret, rank_zero_address, ends)
            )
            if failure is not None:
                _log.warning("snapshots in %s are left out: %s", folder, failure[1])
        answers = peers.gather(shown)
        collected, failure = run_on_rank_zero(
            peers, identity.rank == 0, lambda: _collected(answers or [], secret, folder, identity)
        )
        if failure is not None:
            _log.warning("snapshots in memory are left out: %s", failure[1])
        union = _union(collected, secret, folder, identity.rank) if collected else None
        if union is not None:
            ends.callback(_close, union)
        yield Tier(NAME, union) if union is not None else None
        peers.gather(None)  # others may still read from here
        peers.broadcast(None)


@dataclass(frozen=True)
class _NodeFiles:
    """What one node has."""

    folder: str
    address: str
    files: tuple[str, ...]


def _serving(folder: Path, peers: Peers) -> frozenset[int]:
    """The first rank of each node that has files."""
    answers = peers.gather(str(folder) if any(folder.glob("step-*/*")) else None)
    first: dict[str, int] = {}
    for rank, where in enumerate(answers or ()):
        if where is not None:
            first.setdefault(where, rank)
    return frozenset(peers.broadcast(list(first.values())))


def _serve_own(
    folder: Path, identity: Identity, secret: bytes, rank_zero_address: str, ends: ExitStack
) -> _NodeFiles:
    files = tuple(sorted(f"{place.name}/{name}" for place, name, _ in _files(folder, run_tag(identity.run))))
    server = serve(folder, secret, local_address_for(rank_zero_address))
    ends.callback(server.close)
    return _NodeFiles(str(folder), server.address, files)


def _collected(
    answers: Sequence[_NodeFiles | None], secret: bytes, folder: Path, identity: Identity
) -> bytes | None:
    """Who has which files of the snapshots that are whole, as `_union` takes it; on rank 0 alone."""
    shown = [one for one in answers if one is not None]
    files: dict[str, list[int]] = {}
    for at, one in enumerate(shown):
        for name in one.files:
            files.setdefault(name, []).append(at)
    tree = {"folders": [one.folder for one in shown], "addresses": [one.address for one in shown]}
    union = _union(_packed(tree | {"files": files}), secret, folder, identity.rank)
    try:
        whole = tuple(_whole(union))
    finally:
        _close(union)
    kept = {name: holders for name, holders in files.items() if name.startswith(whole)}
    return _packed(tree | {"files": kept}) if whole and kept else None


def _whole(union: UnionStore) -> Iterator[str]:
    """Prefixes of the snapshots that have their manifest and all files."""
    snapshots = CheckpointFolder(union)
    for commit in snapshots.commits:
        try:
            snapshots.head(commit)
        except Incomplete as error:
            _log.warning("the snapshot of step %d in memory is left out: %s", commit.step, error)
        else:
            yield commit.prefix


def _packed(tree: dict[str, object]) -> bytes:
    return zlib.compress(json.dumps(tree, separators=(",", ":")).encode())


def _union(packed: bytes, secret: bytes, folder: Path, rank: int) -> UnionStore:
    tree = from_json(zlib.decompress(packed))
    own = tree["folders"].index(str(folder)) if str(folder) in tree["folders"] else None
    holders: list[StoreLike] = [
        CheckpointStore(str(folder)) if at == own else RemoteStore(address, secret, _ANSWER_SECONDS)
        for at, address in enumerate(tree["addresses"])
    ]
    return UnionStore(holders, tree["files"], own, rank)


def _close(union: UnionStore) -> None:
    for holder in union.holders:
        if isinstance(holder, RemoteStore):
            holder.close()
