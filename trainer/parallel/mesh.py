"""Who a rank is in the layout, and the process groups that follow from it.

Ranks are numbered with pp outermost, then dp, cp, tp. The ranks of a pipeline stage are seen twice: as (dp, cp, tp) by the
dense part of a model, and as (edp, ep, etp) by its experts. So expert groups are neighbouring ranks and stay inside a
node, and ep may be larger than dp (parallel folding, arXiv 2504.14960).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from collectives.timing.team import init_process_group
from configs.library_environment import Applied
from configs.rank import RankContext
from configs.schema import ParallelConfig, RunConfig
from faulttol.checkpoint.peers import exchange
from trainer.sizing.search.legal import AXES

_FIRST_BYTES = 1 << 20
"""Of a rank in a communicator's first use: few ones would go another way than training's do."""


@dataclass(frozen=True)
class Axis:
    """A group of ranks along one or several axes, as one of its members sees it."""

    group: dist.ProcessGroup | None
    """None where the group is this rank alone and nothing needs a communicator."""
    ranks: tuple[int, ...]
    """Global ranks in the order of the axis."""
    index: int
    """This rank's place among them."""

    @property
    def size(self) -> int:
        """Ranks."""
        return len(self.ranks)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The group, where there is one."""
        assert self.group is not None, "a group of one rank has no communicator"
        return self.group


def dense_groups(parallel: ParallelConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """Global ranks that share a group with `rank`, by name: the axes of both views, and products of them. Pure.

    `dp_cp`: ranks that hold the same dense shard and see other tokens; `sample`: ranks that share samples (cp, tp);
    `stage`: all of a pipeline stage; `ends`: first and last stage of a pipeline, which share the embedding.
    """
    pp, dp, cp, tp = (parallel.size(axis) for axis in ("pp", "dp", "cp", "tp"))
    ep, etp = parallel.size("ep"), parallel.size("etp")
    width = dp * cp * tp
    stage, inside = divmod(rank, width)
    d, c, t = inside // (cp * tp), inside // tp % cp, inside % tp
    x, e, f = inside // (ep * etp), inside // etp % ep, inside % etp
    base, edp = stage * width, width // (ep * etp)

    def dense(ds: Sequence[int], cs: Sequence[int], ts: Sequence[int]) -> tuple[int, ...]:
        return tuple(base + (i * cp + j) * tp + k for i, j, k in product(ds, cs, ts))

    def sparse(xs: Sequence[int], es: Sequence[int], fs: Sequence[int]) -> tuple[int, ...]:
        return tuple(base + (i * ep + j) * etp + k for i, j, k in product(xs, es, fs))

    return {
        "pp": tuple(s * width + inside for s in range(pp)),
        "dp": dense(range(dp), [c], [t]),
        "cp": dense([d], range(cp), [t]),
        "tp": dense([d], [c], range(tp)),
        "dp_cp": dense(range(dp), range(cp), [t]),
        "sample": dense([d], range(cp), range(tp)),
        "stage": tuple(range(base, base + width)),
        "edp": sparse(range(edp), [e], [f]),
        "ep": sparse([x], range(ep), [f]),
        "etp": sparse([x], [e], range(etp)),
    }


class CommunicatorSetup:
    """Makes the devices' communicators in a thread while the model is built and loaded: each takes a second or more, and
    torch would make it within the first collective.

    That must wait for it: two threads of a rank that ask for one group's communicator make two, and ranks that take them in
    different orders wait for each other forever.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """By the first axis that uses it."""
        self._error: BaseException | None = None
        self._made: dict[dist.ProcessGroup, threading.Event] = {}

    def begin(self, axes: dict[str, Axis], device: torch.device) -> None:
        """Begin to make those of some axes.

        Args:
            axes: those that the first step uses, in the same order on all ranks. What isn't used would take device memory
                all the same.
            device: of this rank; one that isn't a GPU needs none.
        """
        groups: dict[dist.ProcessGroup, str] = {}
        for name, axis in axes.items():
            if axis.group is not None and axis.size > 1 and device.type == "cuda":
                groups.setdefault(axis.group, name)
        self._made = {group: threading.Event() for group in groups}
        threading.Thread(target=self._work, args=(groups, device), name="connect", daemon=True).start()

    def _work(self, groups: dict[dist.ProcessGroup, str], device: torch.device) -> None:
        try:
            for group, name in groups.items():
                began = time.monotonic()
                backend = group._get_backend(device)
                backend.eager_connect_single_device(device)
                _use(backend, group.size(), device)
                self.seconds[name] = round(time.monotonic() - began, 3)
                self._made[group].set()
        except BaseException as error:
            self._error = error
        finally:
            for made in self._made.values():
                made.set()

    def wait(self, *axes: Axis) -> None:
        """Return once the communicators of `axes` are made, without any once all are that were begun; called before each
        collective that may be the first of its group.

        Raises:
            dist.DistError: where one can't be made.
        """
        for group in [axis.group for axis in axes] or list(self._made):
            if group in self._made:
                self._made[group].wait()
        if self._error is not None:
            raise self._error


def _use(backend: Any, size: int, device: torch.device) -> None:
    """Use a communicator once: only then does NCCL connect the ranks, which takes as long as to make it.

    Past torch's own functions, since nobody is to take this for one of training's collectives; and on a stream of its own,
    since the build and the load continue.
    """
    with torch.cuda.stream(torch.cuda.Stream(device)):
        own = torch.zeros(_FIRST_BYTES, dtype=torch.uint8, device=device)
        backend._allgather_base(own.new_empty(size * _FIRST_BYTES), own).wait()


@dataclass(frozen=True)
class Mesh:
    """Groups of one rank. Every rank must build its mesh at the same point of its program."""

    rank: int
    world: int
    layout: dict[str, int]
    """Size by axis: pp, dp, cp, ep, etp, tp."""
    device: torch.device
    axes: dict[str, Axis]
    """By the names of `dense_groups`; and `ep_wide`: the ranks of `ep`, whose tokens travel beside all other traffic."""
    control_group: dist.ProcessGroup
    """All ranks over gloo, for objects and small numbers on the host."""
    network: Applied
    """What became of the network preset's variables."""
    node: int = 1
    """Neighbouring ranks that share a node."""
    communicators: CommunicatorSetup = field(default_factory=CommunicatorSetup)

    def __getitem__(self, name: str) -> Axis:
        """The group along an axis."""
        return self.axes[name]

    def gather(self, item: Any) -> list[Any] | None:
        """All ranks' items on rank 0, in rank order; None elsewhere."""
        items = [None] * self.world if self.rank == 0 else None
        dist.gather_object(item, items, dst=0, group=self.control_group)
        return items

    def broadcast(self, item: Any) -> Any:
        """Rank 0's item on all ranks."""
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]

    def exchange(self, out: Sequence[tuple[int, memoryview]], into: Sequence[tuple[int, memoryview]]) -> None:
        """Send bytes to ranks and fill buffers with what they send, over gloo; called by the ranks that are named.

        Two ranks name the same sizes for each other, in the same order.

        Args:
            out: by receiver, what is sent.
            into: by sender, what is filled.
        """
        exchange(out, into, self.control_group)

    def reduce(self, numbers: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        """`numbers` reduced over all ranks, on the host, equal everywhere."""
        host = numbers.detach().to("cpu", copy=True)
        dist.all_reduce(host, op=op, group=self.control_group)
        return host


def join(config: RunConfig, rank: RankContext, device: torch.device) -> Mesh:
    """Join the process group and build the mesh."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    network, _ = init_process_group(config, rank, backend)
    control = dist.new_group(backend="gloo", timeout=collective_timeout(config), group_desc="control")
    # Of rank 0 for all: ranks that thought otherwise would lend otherwise.
    node = torch.tensor([rank.local_world])
    dist.broadcast(node, 0, group=control)
    return assemble(config, rank.rank, rank.world, device, control, network, int(node))


def collective_timeout(config: RunConfig) -> timedelta:
    """What every group is made with: how long a collective may take, which torch has its own idea of for each group."""
    return timedelta(seconds=config.resilience.timeouts.seconds("collective"))


def assemble(
    config: RunConfig,
    rank: int,
    world: int,
    device: torch.device,
    control: dist.ProcessGroup,
    network: Applied,
    node: int | None = None,
) -> Mesh:
    """The mesh of a rank whose process group exists already.

    Args:
        node: neighbouring ranks that share a node; None: all do.
    """
    limit = collective_timeout(config)
    axes = make_groups(dense_groups(config.parallel, rank), rank, world, limit)
    axes["ep_wide"] = _own_communicator(axes["ep"], device, limit)
    layout = {axis: config.parallel.size(axis) for axis in AXES}
    return Mesh(rank, world, layout, device, axes, control, network, node or world)


def make_groups(
    members: dict[str, tuple[int, ...]], rank: int, world: int, limit: timedelta
) -> dict[str, Axis]:
    """Communicators of the groups that `rank` is in, each made once, by its members alone.

    Nobody waits for ranks that aren't in the group: no barrier of all ranks, whose cost grows with the square of their
    number (MegaScale section 3.5). All ranks make groups in the same order and number, which torch's names rely on.

    Args:
        limit: how long a collective of theirs may take.
    """
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    axes = {}
    for name, ranks in members.items():
        group: dist.ProcessGroup | None = None
        if len(ranks) == world:
            group = dist.group.WORLD
        elif len(ranks) > 1 or name in ("dp_cp", "edp"):  # FSDP wants a communicator for one rank too
            if ranks not in made:
                made[ranks] = dist.new_group(
                    list(ranks), timeout=limit, use_local_synchronization=True, group_desc=name
                )
            group = made[ranks]
        axes[name] = Axis(group, ranks, ranks.index(rank))
    return axes


def _own_communicator(axis: Axis, device: torch.device, limit: timedelta) -> Axis:
    """The same ranks with a communicator of their own on a GPU, where collectives of one communicator run one by one."""
    if axis.size == 1 or device.type != "cuda":
        return axis
    options = dist.ProcessGroupNCCL.Options()
    # Its kernels go in front of those that wait for a place on the device: all ranks wait for the slowest.
    options.is_high_priority_stream = True
    options._timeout = limit  # torch warns where it differs from the other
    group = dist.new_group(
        list(axis.ranks),
        timeout=limit,
        backend="nccl",
        pg_options=options,
        use_local_synchronization=True,
        group_desc="ep_wide",
    )
    return Axis(group, axis.ranks, axis.index)
