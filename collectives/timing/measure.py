"""One case, timed: warm up until it is steady, decide how many calls are enough, then time that many."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from collectives.ops.operations import Operation, bandwidths
from collectives.store.results import Timing
from collectives.timing import statistics
from collectives.timing.burst import Burst
from collectives.timing.clock import Call, Clock, Stamps, iteration_times
from collectives.timing.statistics import Array
from collectives.timing.team import Team
from configs.fabric import Average, CollectivesConfig

_LOG = logging.getLogger(__name__)
_LEAD_IN = 2
"""Untimed calls before each batch: the ranks reach it one after the other."""
_BATCH_SECONDS = 1.0
"""Between two signs of life."""
_OVERTIME = 3.0
"""Times `seconds_per_size` after which a size is cut short: calls have become much slower than in the warm-up."""
_FEWEST_BURSTS = 5
"""Bursts that an interval needs."""
_SINGLE = 200
"""Single calls timed by events, at most: their percentiles need no more."""
_LAUNCH_HIDDEN_US = 1000.0
"""Calls that take longer hide even Python's launch of the next one, so that they need no graph."""
_KEPT = 10_000
"""Times of single ranks that a row keeps: of 1,024 ranks the last 9 calls, 80 kB, though all count in its figures."""


@dataclass(frozen=True)
class MeasurementSetup:
    """What all cases of a measurement have in common."""

    team: Team
    clock: Clock
    settings: CollectivesConfig
    beat: Callable[[], None]
    """Called at least every few seconds, to show that the rank is alive."""

    def time(self, call: Call | None, group: dist.ProcessGroup | None, capturable: bool = True) -> Raw | None:
        """Time a call on all ranks at once; a rank without one takes part in the decisions alone.

        Args:
            call: queues or makes one call; None on a rank that is idle.
            group: ranks that the call is made on, which meet at barriers; None on a rank that is idle.
            capturable: a graph may hold it; False where it waits on the host or differs from call to call.

        Returns:
            On rank 0, the stamps of all ranks; None elsewhere.
        """
        made = call or _nothing
        before = self._barrier(group) if self.settings.sync == "barrier" else None
        first = self._batch(made, 1, None, 0)
        warm, pilot = self._warm_up(made, before)
        count = self.team.tree.broadcast_int(self._enough(pilot))
        bursts: NDArray[np.float64] | None = None
        graph, uncaptured = False, ""
        active = self.team.tree.gather(np.array([call is not None]))
        # On GPUs calls are launched ahead, so that a call alone isn't its share of many.
        if not self.clock.comparable:
            short = bool(len(pilot)) and float(np.median(pilot)) < _LAUNCH_HIDDEN_US
            wanted = self.settings.timer == "graph" or (self.settings.timer == "auto" and short)
            graph = bool(self.team.tree.broadcast_int(int(wanted and capturable)))
            burst = Burst(self.team.device, call, self._burst_size) if call is not None else None
            if graph and (uncaptured := self._capture(burst)):
                graph = False
            bursts = self._bursts(burst, group, count)
            count = min(count, max(_SINGLE, self.settings.min_iterations))
        stamps = self._each(made, count, before)
        if first is None or stamps is None or active is None:
            return None
        slowest = float(self._slowest([first])[0])
        return Raw(
            stamps,
            self.clock.comparable,
            slowest,
            warm,
            active[:, 0],
            bursts,
            self._burst_size,
            graph,
            uncaptured,
        )

    def _batch(self, call: Call, count: int, before: Call | None, lead_in: int) -> Stamps | None:
        self.beat()
        for _ in range(lead_in):
            call()
        return self.team.tree.gather(self.clock.run(call, count, before))

    def _warm_up(self, call: Call, before: Call | None) -> tuple[int, Array]:
        """Iterate until the medians of two windows agree: the number of untimed calls, and on rank 0 their last times."""
        least, most = self.settings.min_warmup, self.settings.max_warmup
        window, done, times, begun = max(3, least // 2), 0, np.zeros(0), time.monotonic()
        wanted = min(window, most)
        while wanted:
            stamps = self._batch(call, wanted, before, 0)
            after = 0
            if stamps is not None:
                times = np.concatenate([times, self._slowest([stamps])])
                late = time.monotonic() - begun > self.settings.seconds_per_size / 4
                enough = done + wanted >= least and (statistics.steady(times, window) or late)
                after = 0 if enough else min(window, most - done - wanted)
            done += wanted
            wanted = self.team.tree.broadcast_int(after)
        return done, times[-2 * window :]

    def _enough(self, pilot: Array) -> int:
        settings = self.settings
        return statistics.enough(
            pilot, settings.min_iterations, settings.max_iterations, settings.seconds_per_size,
            settings.precision, settings.confidence,
        )  # fmt: skip

    @property
    def _burst_size(self) -> int:
        """Calls in a burst: nccl-tests' `-n`, or fewer where the most that may be timed are few."""
        return max(1, min(self.settings.min_iterations, self.settings.max_iterations // _FEWEST_BURSTS))

    def _each(self, call: Call, count: int, before: Call | None) -> Stamps | None:
        """`count` calls, each timed, in batches between which the rank shows that it is alive."""
        gathered: list[Stamps] = []
        begun, left = time.monotonic(), count
        wanted = min(left, max(self.settings.min_iterations, 1))
        while wanted:
            stamps = self._batch(call, wanted, before, _LEAD_IN)
            left -= wanted
            after = 0
            if stamps is not None:
                gathered.append(stamps)
                spent = time.monotonic() - begun
                if spent < _OVERTIME * self.settings.seconds_per_size:
                    each = max(spent / (count - left), 1e-9)
                    after = min(left, max(1, int(_BATCH_SECONDS / each)))
            wanted = self.team.tree.broadcast_int(after)
        return np.concatenate(gathered, axis=1) if gathered else None

    def _bursts(
        self, burst: Burst | None, group: dist.ProcessGroup | None, count: int
    ) -> NDArray[np.float64] | None:
        """`count` calls in bursts: on rank 0 microseconds of a call [ranks, bursts].

        A burst for which a rank's host came late is made again, up to as many times as there are bursts.
        """
        size, align = self._burst_size, self._meeting(group)
        least, begun, made = max(_FEWEST_BURSTS, count // size), time.monotonic(), 0
        in_time, late, wanted = list[Array](), list[Array](), 1
        while wanted:
            self.beat()
            runs = [burst.run(align) if burst is not None else (0.0, False) for _ in range(wanted)]
            made += wanted
            after, gathered = 0, self.team.tree.gather(np.array(runs))
            if gathered is not None:
                for one in gathered.swapaxes(0, 1):
                    (late if one[:, 1].any() else in_time).append(one[:, 0])
                spent = time.monotonic() - begun
                over = spent > _OVERTIME * self.settings.seconds_per_size and made >= _FEWEST_BURSTS
                batch = max(1, int(_BATCH_SECONDS * made / max(spent, 1e-9)))
                after = 0 if over else min(least - len(in_time), 2 * least - made, batch)
            wanted = self.team.tree.broadcast_int(after)
        if gathered is None:
            return None
        if len(in_time) >= _FEWEST_BURSTS:
            return np.stack(in_time, axis=1)
        _LOG.warning("hosts came late to %d of %d bursts, whose times hold the wait", len(late), made)
        return np.stack(in_time + late, axis=1)

    def _barrier(self, group: dist.ProcessGroup | None) -> Call | None:
        """A wait for the ranks of a group, None without one; NCCL is given the device, which it guesses otherwise."""
        team = self.team
        if group is None:
            return None
        if team.device.type == "cuda" and team.backend == "nccl":
            return partial(dist.barrier, group=group, device_ids=[team.device.index])
        return partial(dist.barrier, group=group)

    def _meeting(self, group: dist.ProcessGroup | None) -> Call:
        """What ends on the ranks of a group at once, without a wait on the host as a barrier has it."""
        if group is None:
            return _nothing
        return partial(dist.all_reduce, torch.zeros(1, device=self.team.device), group=group)

    def _capture(self, burst: Burst | None) -> str:
        """Capture on every rank; why one can't, so that all launch their calls one by one, or empty."""
        failed = ""
        if burst is not None:
            try:
                burst.capture()
            except RuntimeError as error:
                failed = (str(error).splitlines() or [type(error).__name__])[0]
        failed = next((reason for reason in self.team.tree.all_gather(failed) if reason), "")
        if failed and burst is not None:
            burst.launch_singly()
            _LOG.warning("launched one by one, since a graph can't hold the call: %s", failed)
        return failed

    def _slowest(self, gathered: Sequence[Stamps]) -> Array:
        return iteration_times(np.concatenate(gathered, axis=1), self.clock.comparable)


@dataclass(frozen=True)
class Raw:
    """Stamps of a timed case, on rank 0."""

    stamps: Stamps
    """[ranks, calls, 2] in ns."""
    comparable: bool
    first_us: float
    warmup: int
    active: NDArray[np.bool_]
    """[ranks]: False for those that were idle."""
    bursts: NDArray[np.float64] | None = None
    """[ranks, bursts]: microseconds of a call, each the mean of a burst; None where calls were timed one by one alone."""
    burst_size: int = 1
    """Calls in a burst."""
    graph: bool = False
    """A burst was a replayed graph."""
    uncaptured: str = ""
    """Why none was, where one was to be."""

    def times(self) -> Array:
        """Microseconds of each call, of the slowest rank."""
        return iteration_times(self.stamps, self.comparable)

    def series(self, average: Average = "mean") -> Array:
        """Microseconds of a call as nccl-tests counts them: each rank's own time, over ranks by its `-a`.

        The mean of the series is the time; a value is one burst, or one call where each is waited for.
        """
        own = self.bursts if self.bursts is not None else np.diff(self.stamps, axis=2)[:, :, 0] / 1e3
        own = own[self.active]
        if average == "mean":
            return own.mean(axis=0)
        means = own.mean(axis=1)
        return own[{"rank0": 0, "min": int(means.argmin()), "max": int(means.argmax())}[average]]

    def timing(
        self, op: Operation, size: int, ranks: int, settings: CollectivesConfig, multicast: bool
    ) -> Timing:
        """The statistics of a case; `wrong` is filled in by the check."""
        series, times = self.series(settings.average), self.times()
        mean, ordered = float(series.mean()), np.sort(times)
        alg, bus = bandwidths(op, size, mean / 1e6, ranks)
        factor = op.wire_factor(ranks) if multicast else None
        own = np.diff(self.stamps, axis=2)[:, :, 0] / 1e3
        kept = own[:, -max(1, _KEPT // len(own)) :]
        return Timing(
            time_us=mean,
            ci_us=statistics.half_width(series, settings.confidence),
            p50_us=float(np.median(times)),
            p95_us=statistics.percentile(ordered, 95),
            p99_us=statistics.percentile(ordered, 99),
            min_us=float(ordered[0]),
            max_us=float(ordered[-1]),
            stdev_us=float(times.std()),
            first_us=self.first_us,
            alg_bw=alg,
            bus_bw=bus,
            wire_bw=None if factor is None else alg * factor,
            warmup=self.warmup,
            wrong=None,
            rank_times_us=tuple(tuple(round(float(t), 3) for t in row) for row in kept),
            times_us=tuple(round(float(t), 3) for t in times),
            call_us=float(times.mean()),
            burst=self.burst_size if self.bursts is not None else 0,
            graph=self.graph,
            uncaptured=self.uncaptured,
            calls=len(series) * (self.burst_size if self.bursts is not None else 1),
        )

    def slowest(self, groups: Sequence[Sequence[int]]) -> float:
        """Mean microseconds of a call by the slowest rank of its group, of ranks that don't wait for each other in it."""
        own = np.diff(self.stamps, axis=2)[:, :, 0] / 1e3
        return float(np.mean([own[list(ranks)].max(axis=0).mean() for ranks in groups]))

    def left_early(self, groups: Sequence[Sequence[int]]) -> int:
        """Of a barrier of each group: how often a rank left before the last one of its group entered."""
        own = [self.stamps[list(ranks)] for ranks in groups]
        return sum(int((one[:, :, 1] < one[:, :, 0].max(axis=0)).sum()) for one in own)


def _nothing() -> None:
    """An idle rank's call."""
