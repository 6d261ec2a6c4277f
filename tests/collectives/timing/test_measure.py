"""How a case is timed on a GPU that isn't there: when a graph is replayed, what all ranks agree on, what is waited for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch

from collectives.ops.operations import OPERATIONS
from collectives.studies.program import _disable_graph_registration, _is_network_error
from collectives.timing import burst, clock, measure, team
from collectives.timing.clock import EventClock, HostClock
from collectives.timing.measure import MeasurementSetup, Raw
from collectives.timing.team import address_of
from configs.compose import compose

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


class FakeDevice:
    """Counts launches, waits and replays; capturing can be made to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capturable: bool = True) -> None:
        self.log: list[str] = []
        self.ns, self.capturing, self.late = 0, False, False
        self.streams: list[str] = []
        self.aside: list[bool] = []
        """Of each call: whether it was launched on the burst's own stream."""
        device = self

        class Graph:
            size = 0

            def replay(self) -> None:
                assert device.streams == ["its own"], (
                    "on the default stream each kernel waits for all other streams"
                )
                device.log.append(f"replay {self.size}")
                device.ns += 1000 * self.size

        class Capture:
            def __init__(self, graph: Graph, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                self.graph = graph

            def __enter__(self) -> None:
                device.capturing, self.before = True, len(device.log)

            def __exit__(self, *_: object) -> None:
                device.capturing = False
                if not capturable:
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")
                self.graph.size = len(device.log) - self.before
                del device.log[self.before :]

        @contextmanager
        def stream(one: str) -> Iterator[None]:
            device.streams.append(one)
            yield
            device.streams.remove(one)

        monkeypatch.setattr(torch.cuda, "Stream", lambda _: "its own")
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: self.log.append("wait"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(clock.time, "perf_counter_ns", lambda: self.ns)
        monkeypatch.setattr(torch.cuda, "_sleep", self.pause)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                assert device.streams == ["its own"]
                self.ns = device.ns

            def query(self) -> bool:
                device.log.append("reached?")
                return device.late

            def elapsed_time(self, end: Any) -> float:
                assert device.log[-1] == "wait"
                return (end.ns - self.ns) / 1e6

        monkeypatch.setattr(torch.cuda, "Event", Event)

    def pause(self, cycles: int) -> None:
        """Longer than hosts differ, even at 2 GHz, and nothing that a person would wait for."""
        assert 1e6 < cycles < 1e7
        self.log.append("pause")
        self.ns += 1_300_000

    def call(self) -> None:
        self.log.append("call")
        self.aside.append(self.streams == ["its own"])
        if not self.capturing:
            self.ns += 5000


def test_a_burst_is_launched_in_a_row_and_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    one = burst.Burst(torch.device("cuda"), device.call, 3)
    assert one.run(lambda: device.log.append("align")) == (5.0, False)
    assert device.log == ["wait", "pause", "align", "call", "reached?", "call", "call", "wait"] and all(
        device.aside
    )
    device.late = True
    assert one.run(lambda: None) == (5.0, True)


def test_a_captured_burst_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    one = burst.Burst(torch.device("cuda"), device.call, 3)
    one.capture()
    assert device.log == ["wait", "replay 3", "wait"]  # the first replay, of which nothing is timed
    device.log.clear()
    assert one.run(lambda: None) == (1.0, False)
    assert device.log == ["wait", "pause", "replay 3", "reached?", "wait"]
    device.late = True
    assert one.run(lambda: None) == (1.0, True)
    one.launch_singly()
    assert one.run(lambda: None)[0] == 5.0


class TwoRanks:
    """This rank and another, which says `other` where both are asked; a tree of its own."""

    device, backend = torch.device("cuda", 1), "nccl"

    def __init__(self, other: str = "") -> None:
        self.other = other

    @property
    def tree(self) -> Any:
        return self

    def gather(self, array: np.ndarray) -> np.ndarray:
        return np.stack([array, array])

    def broadcast_int(self, number: int) -> int:
        return number

    def all_gather(self, item: Any) -> list[Any]:
        return [item, self.other]


class DrawnClock:
    """Single calls of one length, on clocks that can't be compared, as events'."""

    comparable = False
    name = "drawn"

    def __init__(self, micros: float) -> None:
        self.micros, self.counts = micros, list[int]()

    def run(self, call: Any, count: int, before: Any) -> np.ndarray:
        self.counts.append(count)
        stamps = np.zeros((count, 2), dtype=np.int64)
        stamps[:, 1] = self.micros * 1e3
        return stamps


def timed(
    monkeypatch: pytest.MonkeyPatch,
    micros: float,
    *words: str,
    capturable: bool = True,
    works: bool = True,
    other: str = "",
) -> tuple[Raw, FakeDevice, DrawnClock]:
    """A case timed by this rank of two."""
    device, ticks = FakeDevice(monkeypatch, works), DrawnClock(micros)
    monkeypatch.setattr(measure.dist, "barrier", lambda **_: None)
    typed = ["workload=collectives", "hardware=h100", *(f"collectives.{word}" for word in words)]
    settings = compose(typed).collectives
    setup = MeasurementSetup(cast(Any, TwoRanks(other)), cast(Any, ticks), settings, lambda: None)
    raw = setup.time(device.call, cast(Any, None), capturable)
    assert raw is not None and raw.bursts is not None
    return raw, device, ticks


@pytest.mark.parametrize(
    ("micros", "words", "capturable", "graph"),
    [
        (50.0, (), True, True),
        (5000.0, (), True, False),  # long calls hide their launches
        (50.0, (), False, False),  # a barrier, which waits on the host
        (5000.0, ("timer=graph",), True, True),
        (50.0, ("timer=events",), True, False),
    ],
)
def test_a_graph_is_replayed_where_launches_would_show(
    micros: float, words: tuple[str, ...], capturable: bool, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, device, ticks = timed(monkeypatch, micros, *words, capturable=capturable)
    assert (raw.graph, raw.uncaptured) == (graph, "")
    assert ("replay 20" in device.log) is graph
    assert float(raw.series().mean()) == (1.0 if graph else 5.0)
    calls = 1000 if micros == 50 else 200  # within a second
    assert (raw.bursts.shape, raw.burst_size) == ((2, calls // 20), 20)  # type: ignore[union-attr]
    assert raw.stamps.shape == (2, 200, 2)  # single calls beside them, no more than their percentiles need
    assert sum(ticks.counts) == 1 + raw.warmup + 200


@pytest.mark.parametrize(("works", "other"), [(False, ""), (True, "out of memory")])
def test_where_one_rank_cannot_capture_all_launch_one_by_one(
    works: bool, other: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raw, device, _ = timed(monkeypatch, 50.0, works=works, other=other)
    reason = other or "operation not permitted when stream is capturing"
    assert (raw.graph, raw.uncaptured) == (False, reason)
    settings = compose(["workload=collectives"]).collectives
    row = raw.timing(OPERATIONS["all_reduce"], 8, 2, settings, multicast=False)
    assert (row.graph, row.uncaptured) == (False, reason)
    assert "since a graph can't hold the call: " in caplog.text
    assert device.log.count("replay 20") == works  # its own, before the other's answer
    assert float(raw.series().mean()) == 5.0


@pytest.mark.parametrize(
    ("words", "size", "count"),
    [
        ((), 20, 50),
        (("max_iterations=20",), 4, 5),  # an interval needs five
        (("min_iterations=5", "max_iterations=5"), 1, 5),
        (("min_iterations=1", "max_iterations=1"), 1, 5),
        (("min_iterations=100",), 100, 10),
    ],
)
def test_how_many_calls_are_in_a_burst(
    words: tuple[str, ...], size: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, _, _ = timed(monkeypatch, 50.0, *words)
    assert (raw.burst_size, raw.bursts.shape) == (size, (2, count))  # type: ignore[union-attr]


def test_a_barrier_names_the_device_to_nccl_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(measure.dist, "barrier", lambda **words: seen.append(words))
    settings = compose(["workload=collectives"]).collectives
    for backend in ("nccl", "gloo"):
        team = TwoRanks()
        monkeypatch.setattr(team, "backend", backend, raising=False)
        setup = MeasurementSetup(cast(Any, team), cast(Any, None), settings, lambda: None)
        barrier = setup._barrier(cast(Any, f"{backend}'s group"))
        assert barrier is not None
        barrier()
        assert setup._barrier(None) is None, "an idle rank has nobody to wait for"
    assert seen == [{"group": "nccl's group", "device_ids": [1]}, {"group": "gloo's group"}]


def test_ranks_of_a_burst_meet_on_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier waits on the host, from which ranks come back one after the other."""
    seen: list[tuple[int, str, Any]] = []
    monkeypatch.setattr(
        measure.dist, "all_reduce", lambda one, group: seen.append((one.numel(), one.device.type, group))
    )
    monkeypatch.setattr(measure.dist, "barrier", lambda **_: seen.append((0, "host", None)))
    team = TwoRanks()
    monkeypatch.setattr(team, "device", torch.device("meta"), raising=False)
    setup = MeasurementSetup(
        cast(Any, team), cast(Any, None), compose(["workload=collectives"]).collectives, lambda: None
    )
    setup._meeting(None)()
    assert not seen

    class Met:
        def run(self, align: Callable[[], object]) -> tuple[float, bool]:
            align()
            return 2.0, False

    bursts = setup._bursts(cast(Any, Met()), cast(Any, "a group"), 100)
    assert bursts is not None and bursts.tolist() == [[2.0] * 5] * 2
    assert seen == [(1, "meta", "a group")] * 5


class LateHosts:
    """Bursts of 1, 2, 3 … us a call; `late` tells to which hosts come late."""

    def __init__(self, late: Callable[[int], bool]) -> None:
        self.made, self.late = 0, late

    def run(self, _align: Callable[[], object]) -> tuple[float, bool]:
        self.made += 1
        return float(self.made), self.late(self.made)


@pytest.mark.parametrize(
    ("late", "kept", "made"),
    [
        (lambda _: False, [1, 2, 3, 4, 5], 5),
        (lambda number: number in (1, 3), [2, 4, 5, 6, 7], 7),
        (lambda number: number > 5, [1, 2, 3, 4, 5], 5),
        (lambda number: number % 2 == 1, [2, 4, 6, 8, 10], 10),
        # On a host that is never in time all count, and no more are made than twice as many.
        (lambda number: number > 2, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 10),
    ],
)
def test_a_burst_to_which_a_host_came_late_is_made_again(
    late: Callable[[int], bool], kept: list[int], made: int, caplog: pytest.LogCaptureFixture
) -> None:
    class OtherIsLate(TwoRanks):
        """The other rank takes twice as long, and it alone has the late host."""

        def gather(self, array: np.ndarray) -> np.ndarray:
            return np.stack([array * [1.0, 0.0], array * [2.0, 1.0]])

    hosts, beats = LateHosts(late), list[int]()
    settings = compose(["workload=collectives"]).collectives
    setup = MeasurementSetup(
        cast(Any, OtherIsLate()), cast(Any, None), settings, lambda: beats.append(hosts.made)
    )
    bursts = setup._bursts(cast(Any, hosts), None, 100)
    assert bursts is not None and bursts.tolist() == [kept, [2 * one for one in kept]]
    assert hosts.made == made and beats[:2] == [0, 1]
    assert ("hosts came late to 8 of 10 bursts" in caplog.text) == (made == len(kept) == 10)


def test_no_warm_up_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, _, ticks = timed(monkeypatch, 50.0, "min_warmup=0", "max_warmup=0")
    assert raw.warmup == 0
    assert ticks.counts[0] == 1 and sum(ticks.counts[1:]) == 20


# ---- clocks ----


def test_each_call_is_waited_for_where_that_is_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch)
    HostClock(0, torch.device("cuda")).run(device.call, 2, lambda: device.log.append("barrier"))
    assert device.log == ["barrier", "call", "wait", "barrier", "call", "wait"]
    device.log.clear()
    HostClock(0, torch.device("cpu")).run(device.call, 2, None)
    assert device.log == ["call", "call"]


@pytest.mark.parametrize(
    ("timer", "device", "kind"),
    [("auto", "cpu", HostClock), ("graph", "cpu", HostClock), ("auto", "cuda", EventClock), ("graph", "cuda", EventClock),
     ("events", "cuda", EventClock), ("host", "cuda", HostClock)],
)  # fmt: skip
def test_which_clock_is_used(timer: Any, device: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "host_offset", lambda _: 0)
    assert type(clock.make_clock(timer, torch.device(device), cast(Any, lambda: None))) is kind


@pytest.mark.parametrize(
    ("timer", "was", "now"), [("auto", None, "0"), ("auto", "1", "1"), ("graph", None, None)]
)
def test_graphs_move_as_plain_launches_do_unless_they_are_what_is_measured(
    timer: str, was: str | None, now: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {} if was is None else {"NCCL_GRAPH_REGISTER": was})
    _disable_graph_registration(
        compose(["workload=collectives", "hardware=h100", f"collectives.timer={timer}"])
    )
    assert os.environ.get("NCCL_GRAPH_REGISTER") == now


# ---- where a host is ----


def interfaces(**addresses: str) -> Callable[[], dict[str, list[Any]]]:
    return lambda: {
        name: [SimpleNamespace(family=socket.AF_INET, address=a)] for name, a in addresses.items()
    }


def test_a_host_has_the_address_from_which_it_reaches_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first by name is docker0's, which only this host's containers see."""
    routes = {"10.0.0.1": "10.0.0.7", "localhost": "127.0.0.1"}

    class Probe:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: object) -> None: ...
        def connect(self, target: tuple[str, int]) -> None:
            if target[0] not in routes:
                raise OSError("no route")
            self.target = target[0]

        def getsockname(self) -> tuple[str, int]:
            return routes[self.target], 1

    monkeypatch.setattr(team.socket, "socket", Probe)
    monkeypatch.setattr(
        psutil, "net_if_addrs", interfaces(docker0="172.17.0.1", eth0="10.0.0.7", lo="127.0.0.1")
    )
    assert [address_of(master) for master in ("10.0.0.1", "localhost", "nowhere")] == ["10.0.0.7"] * 3
    monkeypatch.setattr(psutil, "net_if_addrs", interfaces(docker0="172.17.0.1", lo="127.0.0.1"))
    assert address_of("nowhere") == "127.0.0.1"


def test_a_route_that_there_is_is_taken() -> None:
    assert address_of("127.0.0.1").count(".") == 3
    assert not address_of("127.0.0.1").startswith("172.17.")


# ---- what a lost peer looks like ----


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40771",
            True,
        ),
        (
            "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation to complete",
            True,
        ),
        ("Socket Timeout", True),
        ("Invalid scalar type for gloo", False),
        ("ProcessGroupGloo::allreduce: reduction of Float8 is not supported", False),
        ("NCCL does not support this type", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_a_lost_peer_is_told_from_what_a_library_cannot_do(text: str, lost: bool) -> None:
    assert _is_network_error(RuntimeError(text)) is lost
