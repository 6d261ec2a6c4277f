"""Traces what a rank calls of torch.distributed: puts itself around the methods of `ProcessGroup`, and around `Work.wait`.

All of torch's functions, FSDP, pipelines and DeepSpeed go through these two classes, so nothing of a trainer has to be
changed. On a GPU a wait is a matter of its streams, which the host doesn't stand still for: there it is timed by events,
read when the device has passed them. What is captured in a graph or compiled into one isn't seen.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic_ns
from typing import Any

import torch
import torch.distributed as dist

from configs.rank import RankFiles
from faulttol.timeline.trace import (
    BATCHED,
    CollectiveCall,
    Op,
    TracedGroup,
    TraceWriter,
    WaitLane,
    table_of,
    trace_of,
    write_groups,
)

_OPS = {
    "allreduce": Op.ALL_REDUCE,
    "allreduce_coalesced": Op.ALL_REDUCE,
    "allgather": Op.ALL_GATHER,
    "allgather_coalesced": Op.ALL_GATHER,
    "allgather_into_tensor_coalesced": Op.ALL_GATHER,
    "all_gather_single": Op.ALL_GATHER,
    "all_gather_single_coalesced": Op.ALL_GATHER,
    "_allgather_base": Op.ALL_GATHER,
    "reduce_scatter": Op.REDUCE_SCATTER,
    "reduce_scatter_single": Op.REDUCE_SCATTER,
    "reduce_scatter_single_coalesced": Op.REDUCE_SCATTER,
    "reduce_scatter_tensor_coalesced": Op.REDUCE_SCATTER,
    "_reduce_scatter_base": Op.REDUCE_SCATTER,
    "alltoall": Op.ALL_TO_ALL,
    "alltoall_base": Op.ALL_TO_ALL,
    "all_to_all_single": Op.ALL_TO_ALL,
    "broadcast": Op.BROADCAST,
    "reduce": Op.REDUCE,
    "gather": Op.GATHER,
    "scatter": Op.SCATTER,
    "barrier": Op.BARRIER,
    "send": Op.SEND,
    "recv": Op.RECEIVE,
    "recv_anysource": Op.RECEIVE,
}
"""By the names of both torch 2.11 and 2.13."""
_FORGOTTEN = 4096
"""Calls that are remembered without being waited for."""
_EVENTS = 1024
"""Waits whose device times may be outstanding; more are recorded without them."""
_FAR = 10_000.0
"""Milliseconds between an event and its anchor; torch gives them as a float of 24 bits."""


class Tracing:
    """Traces this process from `start` to `stop`; the thread that starts it is the one whose waits hold a step up."""

    def __init__(self, files: RankFiles) -> None:
        self._trace = TraceWriter(trace_of(files), files.rank)
        self._table = table_of(files)
        self._groups: dict[int, TracedGroup] = {}
        self._numbers: dict[Any, int] = {}
        self._counts: dict[tuple[int, int, int], int] = {}
        self._calls: dict[int, list[CollectiveCall]] = {}
        """By identity of the work that is to be waited for."""
        self._batches: dict[int, list[CollectiveCall]] = {}
        """By group: calls between the begin and the end of a batch."""
        self._lanes = {threading.get_ident(): WaitLane.MAIN}
        self._device: _Device | None = None
        self._undo: list[tuple[type, str, Any]] = []

    @classmethod
    def start(cls, files: RankFiles) -> Tracing:
        """Begin to trace this process into `files`; call it before the first process group is made.

        Raises:
            OSError: where the files can't be made.
        """
        tracing = cls(files)
        table_of(files).unlink(missing_ok=True)
        from torch._C._distributed_c10d import ProcessGroup, Work

        for name, op in _OPS.items():
            if hasattr(ProcessGroup, name):
                tracing._around(ProcessGroup, name, partial(tracing._called, op))
        tracing._around(ProcessGroup, "_start_coalescing", tracing._batch_begins)
        tracing._around(ProcessGroup, "_end_coalescing", tracing._batch_ends)
        tracing._around(Work, "wait", tracing._waited)
        return tracing

    def stop(self) -> None:
        """Leave torch as it was."""
        for owner, name, inner in reversed(self._undo):
            if inner is None:
                delattr(owner, name)
            else:
                setattr(owner, name, inner)
        self._undo.clear()
        if self._device is not None:
            self._device.drain()
        self._trace.close()

    def _around(self, owner: type, name: str, make: Callable[[Any], Any]) -> None:
        self._undo.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, make(getattr(owner, name)))

    # ---- what is put around torch's methods ----

    def _called(self, op: Op, inner: Any) -> Any:
        number, to_peer = int(op), op in (Op.SEND, Op.RECEIVE)

        def call(group: Any, *args: Any, **options: Any) -> Any:
            about = self._about(group, number, to_peer, args)
            if about is None:
                return inner(group, *args, **options)
            device = self._device_of(args)
            event = device.event() if device is not None else None
            work = inner(group, *args, **options)
            batch = self._batches.get(about.group) if self._batches else None
            if batch is not None:
                batch.append(about)
            elif work is not None:
                self._remember(work, [about])
            else:  # it runs on the caller's stream, which waits for it by itself
                self._record([about], about.issued, monotonic_ns(), device, event)
            return work

        return call

    def _batch_begins(self, inner: Any) -> Any:
        def begin(group: Any, *args: Any) -> Any:
            number = self._number(group)
            if number is not None:
                self._batches[number] = []
            return inner(group, *args)

        return begin

    def _batch_ends(self, inner: Any) -> Any:
        def end(group: Any, *args: Any) -> Any:
            number = self._number(group)
            calls = self._batches.pop(number, []) if number is not None else []
            work = inner(group, *args)
            if work is not None and calls:
                self._remember(work, calls)
            return work

        return end

    def _waited(self, inner: Any) -> Any:
        def wait(work: Any, *args: Any, **options: Any) -> Any:
            calls = self._calls.pop(id(work), None)
            if calls is None:
                return inner(work, *args, **options)
            device = self._device
            event = device.event() if device is not None else None
            began = monotonic_ns()
            self._trace.begin_wait(calls[0], began)
            try:
                return inner(work, *args, **options)
            finally:
                ended = monotonic_ns()
                self._trace.end_wait()
                self._record(calls, began, ended, device, event)

        return wait

    # ---- what they need ----

    def _remember(self, work: Any, calls: list[CollectiveCall]) -> None:
        if len(self._calls) > _FORGOTTEN:
            self._calls.clear()  # nobody waits for these
        self._calls[id(work)] = calls

    def _record(
        self, calls: list[CollectiveCall], began: int, ended: int, device: _Device | None, event: Any
    ) -> None:
        lane = self._lane()
        if device is not None:
            device.drain()
            if event is not None and device.wait(calls, began, ended, lane, event):
                return
        write(self._trace, calls, began, ended, lane)

    def _lane(self) -> int:
        me = threading.get_ident()
        lane = self._lanes.get(me)
        if lane is None:
            own = threading._active.get(me)  # type: ignore[attr-defined]  # current_thread() would add a dummy
            known = own is not None and not isinstance(own, threading._DummyThread)
            lane = self._lanes[me] = WaitLane.BESIDE if known else WaitLane.AUTOGRAD
        return lane

    def _device_of(self, args: tuple[Any, ...]) -> _Device | None:
        first = args[0] if args else None
        while isinstance(first, list | tuple) and first:
            first = first[0]
        if not getattr(first, "is_cuda", False):
            return None
        if self._device is None:
            self._device = _Device(self._trace)
        return self._device

    def _number(self, group: Any) -> int | None:
        """The group's number; None where torch doesn't know the group (yet)."""
        number = self._numbers.get(group)
        if number is None:
            try:
                name, ranks = str(group.group_name), list(dist.get_process_group_ranks(group))
            except (RuntimeError, ValueError, KeyError):
                return None
            number = zlib.crc32(name.encode())
            about = getattr(group, "group_desc", "")
            self._groups[number] = TracedGroup(
                "world" if about in ("undefined", "default_pg", "") else about, ranks
            )
            self._numbers[group] = number
            # Where the node's memory is full, groups lack their names until the next new one: training continues.
            with contextlib.suppress(OSError):
                write_groups(self._table, self._groups)
        return number

    def _about(self, group: Any, op: int, to_peer: bool, args: tuple[Any, ...]) -> CollectiveCall | None:
        number = self._numbers.get(group) or self._number(group)
        if number is None:
            return None
        peer, kind = -1, 0
        if to_peer:
            kind = op
            place = args[1] if len(args) > 2 else -1  # from anybody there is no place
            ranks = self._groups[number].ranks
            peer = ranks[place] if 0 <= place < len(ranks) else -1
        key = (number, kind, peer)
        count = self._counts[key] = self._counts.get(key, -1) + 1
        size = 0
        for part in args[:2]:
            if isinstance(part, torch.Tensor):
                size = max(size, part.nbytes)
            elif isinstance(part, list | tuple):
                size = max(size, _bytes(part))
        return CollectiveCall(op, monotonic_ns(), number, count, peer, size)


def write(
    trace: TraceWriter,
    calls: list[CollectiveCall],
    began: int,
    ended: int,
    lane: int,
    device: tuple[int, int] = (0, 0),
) -> None:
    """Record calls that were waited for as one."""
    for place, call in enumerate(calls):
        trace.write(call, began, ended, lane, BATCHED if place else 0, device)


def _bytes(part: Any) -> int:
    if isinstance(part, list | tuple):
        return sum(map(_bytes, part))
    size = getattr(part, "nbytes", None)
    return size if isinstance(size, int) else 0


class _Device:
    """Times of waits on a device's streams, on the host's clock."""

    def __init__(self, trace: TraceWriter) -> None:
        self._cuda = torch.cuda
        self._index = torch.cuda.current_device()
        self._trace = trace
        self._free: list[Any] = []
        self._open: deque[tuple[list[CollectiveCall], int, int, int, Any, Any]] = deque()
        self._lock = threading.Lock()
        self._anchor = torch.cuda.Event(enable_timing=True)
        self._anchor.record()
        self._anchor.synchronize()  # once, at the first call of the job
        self._anchor_ns = monotonic_ns()

    def event(self) -> Any:
        """An event at this place of the current stream; None where a graph is being captured."""
        if self._cuda.is_current_stream_capturing():
            return None
        try:
            event = self._free.pop()
        except IndexError:
            event = self._cuda.Event(enable_timing=True)
        # The stream by its device: without one, torch asks at every wait whether there is any.
        event.record(self._cuda.current_stream(self._index))
        return event

    def wait(self, calls: list[CollectiveCall], began: int, ended: int, lane: int, event: Any) -> bool:
        """Record this wait as soon as the device has passed it; False where too many are outstanding."""
        if len(self._open) >= _EVENTS:
            return False
        after = self.event()
        if after is None:
            return False
        with self._lock:
            self._open.append((calls, began, ended, lane, event, after))
            self._trace.mark_pending(self._open[0][1])
        return True

    def drain(self) -> None:
        """Record what the device has passed."""
        if not self._lock.acquire(blocking=False):
            return  # another thread does it
        try:
            while self._open and self._open[0][5].query():
                calls, began, ended, lane, first, last = self._open.popleft()
                start, stop = self._time(first), self._time(last)
                self._trace.mark_pending(self._open[0][1] if self._open else 0)
                write(self._trace, calls, began, ended, lane, (start, max(start, stop)))
                if (stop - self._anchor_ns) / 1e6 > _FAR:
                    self._anchor, self._anchor_ns = last, stop
                    self._free.append(first)
                else:
                    self._free += (first, last)
                # Nothing is over before it is: the clocks have drifted apart.
                self._anchor_ns -= max(0, stop - monotonic_ns())
        finally:
            self._lock.release()

    def _time(self, event: Any) -> int:
        return self._anchor_ns + round(self._anchor.elapsed_time(event) * 1e6)
