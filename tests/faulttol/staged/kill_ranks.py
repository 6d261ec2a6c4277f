"""What the ranks of `tests.faulttol.kills` do until they are killed, and how what is left is judged."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import fsspec
import torch
import torch.distributed as dist

from configs.library_environment import Applied
from faulttol.checkpoint import load as loading
from faulttol.checkpoint import save as saving
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.folder import CheckpointFolder
from faulttol.checkpoint.load import Restored
from faulttol.checkpoint.manifest import Identity, Incomplete
from faulttol.checkpoint.peers import Peers, SoloPeers
from faulttol.checkpoint.pieces import LoadTarget, owned
from faulttol.checkpoint.retention import Retention
from faulttol.checkpoint.store import CheckpointStore
from faulttol.staged.saver import SaveOutcome, SavePolicy, Saver
from tests.faulttol.staged.kill_orders import KEEP, WORLD, Judged, Order
from trainer.parallel.mesh import Mesh
from trainer.state import Slice

_RUN = "killed"
_COLUMNS = 1024
_PATIENCE = timedelta(seconds=60)


def whole_shapes(rows: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the state, by name."""
    return {"blocks.0.weight": (rows, _COLUMNS), "blocks.0.bias": (97,), "steps": ()}


def value(name: str, box: Box, attempt: int, step: int) -> torch.Tensor:
    """What a box must hold: each element tells its place, the attempt and the step."""
    strides = [int(torch.tensor(box.whole[d + 1 :]).prod()) for d in range(len(box.whole))]
    places = torch.zeros(box.shape, dtype=torch.int64)
    for d, (at, size, stride) in enumerate(zip(box.start, box.shape, strides, strict=True)):
        shape = [1] * len(box.shape)
        shape[d] = size
        places = places + (torch.arange(at, at + size) * stride).view(shape)
    return (places * 31 + attempt * 1_000_003 + step * 7_919 + len(name)).to(torch.int32)


def parts(rank: int, rows: int, attempt: int) -> list[Slice]:
    """A rank's share of the state, cut elsewhere in each attempt."""
    middle = rows // 3 + attempt * 37 % (rows // 3)
    found = []
    for name, shape in whole_shapes(rows).items():
        whole = Box.full(shape)
        if len(shape) == 2:
            box, replica, replicas = whole.cut(0, *((0, middle), (middle, rows))[rank]), 0, 1
        else:
            box, replica, replicas = whole, rank, WORLD
        found.append(Slice(name, torch.zeros(box.shape, dtype=torch.int32), box, replica, replicas))
    return found


def restored(
    root: str, mine: list[Slice], peers: Peers, identity: Identity, step: int | None = None
) -> Restored | None:
    """Fill the slices from the newest checkpoint, or from that of a step."""
    wanted = [LoadTarget.from_slice(part.name, part.tensor, part.box) for part in mine]
    return loading.restore([loading.Tier("store", CheckpointStore(root), step=step)], wanted, peers, identity)


def wrong(mine: list[Slice], attempt: int, step: int) -> str:
    """What isn't as that attempt has saved it; empty where all is."""
    for part in mine:
        differ = part.tensor != value(part.name, part.box, attempt, step)
        if differ.any():
            return f"{part.name}: {int(differ.sum())} of {differ.numel()} elements aren't of attempt {attempt}, step {step}"
    return ""


def use(variables: Mapping[str, str]) -> None:
    """Take over variables in a process that has loaded fsspec already."""
    os.environ.update(variables)
    fsspec.config.set_conf_env(fsspec.config.conf)


class _Log:
    """Lines that outlive a kill: `WORD ATTEMPT STEP NANOSECONDS TEXT`, each written at once."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, word: str, attempt: int, step: int, text: str = "") -> None:
        line = f"{word} {attempt} {step} {time.monotonic_ns()} {text}".replace("\n", " ")
        os.write(self._fd, f"{line}\n".encode())


def run_rank(rank: int, order: Order) -> None:
    """Load, then save again and again."""
    log = _Log(f"{order.log}.{rank}")
    # What is injected is complained of.
    os.dup2(os.open(f"{order.log}.{rank}.errors", os.O_WRONLY | os.O_CREAT), 2)
    try:
        use(order.variables)
        torch.set_num_threads(1)
        _save_on(rank, order, log)
    except Exception as error:
        log("died", order.attempt, 0, f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def _save_on(rank: int, order: Order, log: _Log) -> None:
    store = dist.FileStore(f"{order.log}.store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=_PATIENCE)
    layout = {"dp": WORLD}
    group: Any = dist.group.WORLD
    mesh = Mesh(rank, WORLD, layout, torch.device("cpu"), {}, group, Applied())
    identity = Identity(_RUN, order.attempt, layout, rank, WORLD)
    mine = parts(rank, order.rows, order.attempt)
    found = restored(order.root, mine, mesh, identity)
    step = 0
    if found is not None:
        step = found.step
        came_from = int(found.facts["attempt"])
        why = wrong(mine, came_from, step) or "; ".join(found.passed)
        if why:
            raise AssertionError(f"what was loaded is wrong: {why}")
        log("loaded", came_from, step)
    save = (
        _Background(mesh, identity, order, _served(rank, store), log)
        if order.background
        else _Blocking(mesh, identity, order, log)
    )
    targets = [(part, value(part.name, part.box, order.attempt, 0)) for part in mine]
    parent, last = multiprocessing.parent_process(), step + (order.most or 1 << 40)
    while step < last and (parent is None or parent.is_alive()):
        step += 1
        save.settle()
        for part, base in targets:
            torch.add(base, step * 7_919, out=part.tensor)
        log("begin", order.attempt, step)
        save.begin(step, mine)
        if save.pid:
            log("writer", order.attempt, save.pid)
    save.close()


def _served(rank: int, store: dist.Store) -> dist.Store:
    """The store that rank 0 serves, as long as it lives."""
    if rank:
        return dist.TCPStore("127.0.0.1", int(store.get("port")), is_master=False, timeout=_PATIENCE)
    served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
    store.set("port", str(served.port))
    return served


class _Blocking:
    """Saves that return when they are committed."""

    pid: int | None = None

    def __init__(self, mesh: Mesh, identity: Identity, order: Order, log: _Log) -> None:
        self._mesh, self._identity, self._order, self._log = mesh, identity, order, log

    def settle(self) -> None:
        """Nothing is read any more."""

    def begin(self, step: int, mine: list[Slice]) -> None:
        """Save, and say how it went."""
        facts = {"attempt": self._order.attempt}
        try:
            saving.save(
                self._order.root, step, owned(mine), self._identity, facts, self._mesh, Retention(KEEP)
            )
        except Incomplete as error:
            self._log("failed", self._order.attempt, step, str(error))
        else:
            self._log("saved", self._order.attempt, step)

    def close(self) -> None:
        """Nothing is under way."""


class _Background:
    """Saves that a writer process makes while the rank continues."""

    def __init__(self, mesh: Mesh, identity: Identity, order: Order, store: dist.Store, log: _Log) -> None:
        policy = SavePolicy(order.root, Retention(KEEP))
        self._saver = Saver(policy, identity, mesh, store, torch.device("cpu"))
        self._order, self._log = order, log

    @property
    def pid(self) -> int | None:
        """Process id of the writer."""
        return self._saver.writer_pid

    def settle(self) -> None:
        """Wait until the slices may change."""
        self._saver.settle()
        self._tell(self._saver.poll())

    def begin(self, step: int, mine: list[Slice]) -> None:
        """Begin to save; the one before is waited for."""
        self._saver.stage(step, owned(mine), {"attempt": self._order.attempt})

    def _tell(self, ended: list[SaveOutcome]) -> None:
        for one in ended:
            self._log("failed" if one.error else "saved", self._order.attempt, one.step, str(one.error or ""))

    def close(self) -> None:
        """Wait for the last one."""
        self._saver.finish()
        self._tell(self._saver.poll())
        self._saver.close()


# ---- afterwards ----


def judge(root: str, rows: int, attempt: int, variables: Mapping[str, str], pipe: Connection) -> None:
    """Load what is there into one rank, and tell whether it is right."""
    use(variables)
    torch.set_num_threads(1)
    try:
        pipe.send(_judged(root, rows, attempt))
    except Exception as error:
        pipe.send(Judged(None, f"{type(error).__name__}: {error}", 0, 0))


def _judged(root: str, rows: int, attempt: int) -> Judged:
    folder = CheckpointFolder(CheckpointStore(root))
    shapes = whole_shapes(rows).items()
    state = [Slice(n, torch.zeros(s, dtype=torch.int32), Box.full(s)) for n, s in shapes]
    found = restored(root, state, SoloPeers(), Identity(_RUN, attempt, {}, 0, 1))
    counts = len(folder.commits), len(folder.begun)
    if found is None:
        return Judged(None, "", *counts)
    newest = folder.commits[-1]
    came_from = int(found.facts["attempt"])
    problem = wrong(state, came_from, found.step)
    if (came_from, found.step) != (newest.attempt, newest.step):
        problem = (
            f"attempt {came_from}, step {found.step} was loaded, and {newest} is the newest: {found.passed}"
        )
    for commit in folder.commits[:-1]:
        problem = problem or _older(root, state, attempt, commit.step)
    return Judged((came_from, found.step), problem, *counts)


def _older(root: str, state: list[Slice], attempt: int, step: int) -> str:
    """What is wrong with another committed step: those that are kept must load too."""
    found = restored(root, state, SoloPeers(), Identity(_RUN, attempt, {}, 0, 1), step)
    if found is None or found.passed:
        return f"step {step} is committed and doesn't load: {found and found.passed}"
    return wrong(state, int(found.facts["attempt"]), step)


def strangers(root: str, variables: Mapping[str, str], pipe: Connection) -> None:
    """Tell the files that belong to no kept commit."""
    use(variables)
    fs, path = fsspec.core.url_to_fs(root)
    kept = [commit.prefix for commit in CheckpointFolder(CheckpointStore(root)).commits[-KEEP:]]
    names = [str(name).removeprefix(f"{path}/") for name in fs.find(path)]
    pipe.send([name for name in names if not name.startswith(tuple(kept))])
