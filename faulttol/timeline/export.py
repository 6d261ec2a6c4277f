"""The timeline as a file of trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

A process is a rank, its threads are its steps and phases, its waits, and what is in flight beside the computation. Times
are aligned between nodes; a send is joined to its receive by an arrow; a wait says who came last.
Format: "Trace Event Format" (the Chromium project's document), JSON object form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from faulttol.recorder import PhaseMark, RankPhase
from faulttol.timeline.clocks import BLOCKED_NS, Alignment, CollectiveEnd, align
from faulttol.timeline.sources import Activity
from faulttol.timeline.steps import BEFORE
from faulttol.timeline.trace import BATCHED, SYNCHRONIZING, Op, WaitLane

_STEPS, _PHASES, _WAITS, _AUTOGRAD, _BESIDE, _SENDS, _DEVICE = range(1, 8)
_THREADS = {
    _STEPS: "steps",
    _PHASES: "phases",
    _WAITS: "waits",
    _AUTOGRAD: "waits of the backward pass",
    _BESIDE: "waits beside the step",
    _SENDS: "sends",
    _DEVICE: "waits on the device",
}
_OF_LANE = {WaitLane.MAIN: _WAITS, WaitLane.AUTOGRAD: _AUTOGRAD, WaitLane.BESIDE: _BESIDE}

Event = dict[str, Any]


@dataclass(frozen=True)
class Overlap:
    """Of one kind of call: seconds from the calls to what they brought, and seconds of them that somebody waited."""

    calls: int
    flight: float
    waited: float

    @property
    def hidden(self) -> float:
        """Share that was hidden behind computation."""
        return 1 - self.waited / self.flight if self.flight else 0.0


@dataclass(frozen=True)
class Timeline:
    """Records of all ranks on one clock."""

    ranks: Mapping[int, Activity]
    alignment: Alignment
    begin: int
    """First instant, ns since the epoch."""
    end: int
    last: Mapping[tuple[int, int], tuple[int, int]]
    """By group and count: the rank that called a collective last, and when."""

    @classmethod
    def of(cls, ranks: Mapping[int, Activity]) -> Timeline:
        """Align the ranks' clocks; their times are changed in place."""
        nodes = list(dict.fromkeys(one.node for one in ranks.values()))
        alignment = align(nodes, list(_ends(ranks)))
        for one in ranks.values():
            one.shift(-alignment.offsets[one.node])
        firsts = [
            int(x[n].min())
            for one in ranks.values()
            for x, n in ((one.phases, "ns"), (one.calls, "issued"))
            if len(x)
        ]
        lasts = [
            int(x[n].max())
            for one in ranks.values()
            for x, n in ((one.phases, "ns"), (one.calls, "ended"))
            if len(x)
        ]
        last: dict[tuple[int, int], tuple[int, int]] = {}
        for one in ranks.values():
            for call in one.calls[_in(one.calls["op"], SYNCHRONIZING)].tolist():
                named = dict(zip(one.calls.dtype.names or (), call, strict=True))
                key = (named["group"], named["count"])
                last[key] = max(last.get(key, (0, 0)), (named["issued"], one.rank))
        return cls(
            ranks,
            alignment,
            min(firsts, default=0),
            max(lasts, default=0),
            {k: (r, t) for k, (t, r) in last.items()},
        )

    def overlap(self) -> dict[str, Overlap]:
        """By kind of call, over all ranks."""
        overlaps: dict[str, Overlap] = {}
        for op in Op:
            calls = flight = waited = 0
            for one in self.ranks.values():
                mine = one.calls[one.calls["op"] == op]
                device = mine["device_ended"] > 0
                end = np.where(device, mine["device_ended"], mine["ended"])
                begin = np.where(device, mine["device_began"], mine["began"])
                # What runs on the caller's own stream is in flight as long as it holds the stream up.
                issued = np.where(
                    device & (mine["issued"] == mine["began"]), begin, np.minimum(mine["issued"], begin)
                )
                flight += int((end - issued).sum())
                waited += int((end - begin)[mine["flags"] & BATCHED == 0].sum())
                calls += len(mine)
            if calls:
                overlaps[op.name.lower()] = Overlap(calls, flight / 1e9, waited / 1e9)
        return overlaps

    # ---- events ----

    def write(self, file: IO[str], about: Mapping[str, Any]) -> int:
        """Write the file; the number of events."""
        count = 0
        file.write(
            '{"displayTimeUnit": "ms", "otherData": '
            + json.dumps(self._about() | dict(about))
            + ', "traceEvents": [\n'
        )
        for event in self.events():
            file.write((",\n" if count else "") + json.dumps(event))
            count += 1
        file.write("\n]}\n")
        return count

    def _about(self) -> dict[str, Any]:
        apart = self.alignment
        return {
            "began_ns": self.begin,
            "clock_offsets_ns": dict(apart.offsets),
            "clock_residual_seconds": apart.residual if apart.shared else None,
            "clocks_not_compared": list(apart.apart),
        }

    def events(self) -> Iterator[Event]:
        """All events, rank by rank."""
        arrows = self._arrows()
        for rank, one in self.ranks.items():
            yield from _names(one)
            yield from self._phases(one)
            yield from self._calls(one, arrows)
            if one.waiting is not None:
                yield self._slice(
                    rank, _WAITS, f"{Op(one.waiting.op).name.lower()}: never ended", "wait", (one.waiting.began, self.end),
                    {"unfinished": True, "group": self._group(one, one.waiting.group), "count": one.waiting.count},
                )  # fmt: skip

    def _slice(
        self, rank: int, thread: int, name: str, kind: str, span: tuple[int, int], args: Mapping[str, Any]
    ) -> Event:
        begin, end = span
        return {
            "name": name, "cat": kind, "ph": "X", "pid": rank, "tid": thread, "ts": self._us(begin),
            "dur": max(0, end - begin) / 1e3, "args": dict(args),
        }  # fmt: skip

    def _us(self, ns: int) -> float:
        return (ns - self.begin) / 1e3

    def _phases(self, one: Activity) -> Iterator[Event]:
        """Steps and phases. A phase ends with its end, or where the next one begins."""
        began: tuple[RankPhase, int, int] | None = None
        step: tuple[int, int] | None = None
        before = 0
        for _, ns, mark, number, which in one.phases.tolist():
            phase = RankPhase(number)
            if mark == PhaseMark.STEP:
                continue
            if began is not None:
                name = began[0].name.lower()
                yield self._slice(one.rank, _PHASES, name, "phase", (began[1], ns), {"step": began[2]})
                began = None
            if mark == PhaseMark.BEGIN:
                began = (phase, ns, which)
                if phase in BEFORE:
                    step = None  # what is read of the data at the start belongs to no step
                if phase is RankPhase.DATA and (step is None or step[0] != which):
                    if step is not None:  # where not all steps are on record, it ends with its last one
                        span = (step[1], ns if which == step[0] + 1 else before)
                        yield self._slice(
                            one.rank, _STEPS, f"step {step[0]}", "step", span, {"step": step[0]}
                        )
                    step = (which, ns)
            before = ns
        if began is not None:
            args = {"step": began[2], "unfinished": True}
            yield self._slice(one.rank, _PHASES, began[0].name.lower(), "phase", (began[1], self.end), args)
        if step is not None:
            last = int(one.phases["ns"][-1]) if began is None else self.end
            yield self._slice(one.rank, _STEPS, f"step {step[0]}", "step", (step[1], last), {"step": step[0]})

    def _calls(self, one: Activity, arrows: Mapping[tuple[int, int], int]) -> Iterator[Event]:
        """Waits, what is in flight, sends, and the ends of arrows."""
        names = one.calls.dtype.names or ()
        sent = 0
        for row in one.calls.tolist():
            call = dict(zip(names, row, strict=True))
            op, rank = Op(call["op"]), one.rank
            args = {"group": self._group(one, call["group"]), "count": call["count"], "bytes": call["bytes"]}
            name = op.name.lower()
            if call["peer"] >= 0:
                args["peer"] = call["peer"]
                name += f" → {call['peer']}" if op is Op.SEND else f" ← {call['peer']}"
            late = self.last.get((call["group"], call["count"])) if op in SYNCHRONIZING else None
            if late is not None:
                args |= {"last": late[0], "last_after_us": (late[1] - call["issued"]) / 1e3}
            if not call["flags"] & BATCHED:
                span = (call["began"], call["ended"])
                yield self._slice(rank, _OF_LANE[WaitLane(call["lane"])], name, "wait", span, args)
            if call["device_ended"]:
                yield self._slice(
                    rank, _DEVICE, name, "wait", (call["device_began"], call["device_ended"]), args
                )
            arrow = arrows.get((rank, call["sequence"]))
            if op is Op.SEND:
                begin = max(sent, call["issued"])
                sent = begin + max(1000, min(call["began"], call["ended"]) - begin)
                yield self._slice(rank, _SENDS, name, "send", (begin, sent), args)
                if arrow is not None:
                    yield self._arrow("s", rank, _SENDS, begin, arrow)
            else:
                yield from self._flight(rank, name, call, args)
                if arrow is not None:
                    into = max(call["began"], call["ended"] - 500)
                    yield self._arrow("f", rank, _OF_LANE[WaitLane(call["lane"])], into, arrow)

    def _flight(
        self, rank: int, name: str, call: Mapping[str, int], args: Mapping[str, Any]
    ) -> Iterator[Event]:
        """A call from its issue to what it brought: these lie across each other, so they aren't slices of a thread."""
        common = {
            "name": name,
            "cat": "in flight",
            "pid": rank,
            "tid": _SENDS,
            "id": f"{rank}.{call['sequence']}",
        }
        yield common | {"ph": "b", "ts": self._us(call["issued"]), "args": dict(args)}
        yield common | {"ph": "e", "ts": self._us(max(call["issued"], call["ended"])), "args": {}}

    def _arrow(self, kind: str, rank: int, thread: int, ns: int, number: int) -> Event:
        common = {"name": "message", "cat": "message", "ph": kind, "pid": rank, "tid": thread, "id": number}
        return common | {"ts": self._us(ns)} | ({"bp": "e"} if kind == "f" else {})

    def _arrows(self) -> dict[tuple[int, int], int]:
        """Numbers of arrows by rank and sequence number of the call at either end. Both ends must be there."""
        ends: dict[tuple[int, int, int, int], dict[Op, tuple[int, int]]] = {}
        for one in self.ranks.values():
            mine = one.calls[_in(one.calls["op"], (Op.SEND, Op.RECEIVE)) & (one.calls["peer"] >= 0)]
            for op, peer, group, count, sequence in mine[
                ["op", "peer", "group", "count", "sequence"]
            ].tolist():
                way = (one.rank, peer) if op == Op.SEND else (peer, one.rank)
                ends.setdefault((group, count, *way), {})[Op(op)] = (one.rank, sequence)
        numbers: dict[tuple[int, int], int] = {}
        for number, both in enumerate((both for both in ends.values() if len(both) == 2), 1):
            numbers |= dict.fromkeys(both.values(), number)
        return numbers

    @staticmethod
    def _group(one: Activity, number: int) -> str:
        group = one.groups.get(number)
        return f"{group.name} of {len(group.ranks)}" if group is not None else f"group {number:08x}"


def _in(values: Any, ops: tuple[Op, ...]) -> Any:
    matches = values == ops[0]
    for op in ops[1:]:
        matches = matches | (values == op)
    return matches


def _names(one: Activity) -> Iterator[Event]:
    common: Event = {"ph": "M", "pid": one.rank, "tid": 0, "ts": 0}
    where = f" on {one.node}" if one.node else ""
    yield common | {"name": "process_name", "args": {"name": f"rank {one.rank}{where}"}}
    yield common | {"name": "process_sort_index", "args": {"sort_index": one.rank}}
    for thread, name in _THREADS.items():
        yield common | {"tid": thread, "name": "thread_name", "args": {"name": name}}
        yield common | {"tid": thread, "name": "thread_sort_index", "args": {"sort_index": thread}}


def _ends(ranks: Mapping[int, Activity]) -> Iterator[CollectiveEnd]:
    for one in ranks.values():
        calls = one.calls[
            _in(one.calls["op"], SYNCHRONIZING) & (one.calls["ended"] - one.calls["began"] >= BLOCKED_NS)
        ]
        device = calls["device_ended"] > 0
        calls = calls[~device]  # the host's clock there is only estimated
        for group, count, ended in calls[["group", "count", "ended"]].tolist():
            yield CollectiveEnd((group, count), one.node, ended)
