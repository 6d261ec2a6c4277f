"""One case, timed: warm up until it is steady, then iterate until the mean is known as well as was asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from collectives.ops.operations import Operation, bandwidths
from collectives.store.results import Timing
from collectives.timing import statistics
from collectives.timing.clock import Call, Clock, Stamps, iteration_times
from collectives.timing.statistics import Array
from collectives.timing.team import Team
from configs.fabric import CollectivesConfig

_LEAD_IN = 2
"""Untimed calls before each batch: the ranks come to it one after the other."""
_BATCH_SECONDS = 1.0


@dataclass(frozen=True)
class Bench:
    """What all cases of a measurement have in common."""

    team: Team
    clock: Clock
    settings: CollectivesConfig
    beat: Callable[[], None]
    """Called now and then, to show that the rank is alive."""

    def time(self, call: Call | None, barrier: dist.ProcessGroup) -> Raw | None:
        """Time a call on all ranks at once; a rank without one takes part in the decisions alone.

        Returns:
            On rank 0, the stamps of all ranks; None elsewhere.
        """
        call = call or _nothing
        before = (lambda: dist.barrier(group=barrier)) if self.settings.sync == "barrier" else None
        first = self._batch(call, 1, None, 0)
        warm = self._warm_up(call, before)
        gathered: list[Stamps] = []
        count, begun = self.settings.min_iterations, time.monotonic()
        while count:
            stamps = self._batch(call, count, before, _LEAD_IN)
            if stamps is not None:
                gathered.append(stamps)
                count = self._more(gathered, time.monotonic() - begun)
            count = self.team.decide(count)
        if first is None:
            return None
        return Raw(
            np.concatenate(gathered, axis=1), self.clock.comparable, float(self._slowest([first])[0]), warm
        )

    def _batch(self, call: Call, count: int, before: Call | None, lead_in: int) -> Stamps | None:
        self.beat()
        for _ in range(lead_in):
            call()
        return self.team.gather(self.clock.run(call, count, before))

    def _warm_up(self, call: Call, before: Call | None) -> int:
        """Iterate until the medians of two windows agree; the number of untimed iterations."""
        least, most = self.settings.min_warmup, self.settings.max_warmup
        window, done, times, begun = max(3, least // 2), 0, np.zeros(0), time.monotonic()
        wanted = window if most else 0
        while wanted:
            stamps = self._batch(call, wanted, before, 0)
            if stamps is not None:
                times = np.concatenate([times, self._slowest([stamps])])
                late = time.monotonic() - begun > self.settings.seconds_per_size / 4
                enough = done + wanted >= least and (statistics.steady(times, window) or late)
                left = most - done - wanted
                after = 0 if enough else min(window, left)
            else:
                after = 0
            done += wanted
            wanted = self.team.decide(after)
        return done

    def _more(self, gathered: Sequence[Stamps], seconds: float) -> int:
        """Iterations that are still wanted; rank 0 decides."""
        settings = self.settings
        times = self._slowest(gathered)
        done, left = len(times), settings.max_iterations - len(times)
        spent = seconds > settings.seconds_per_size
        width = statistics.half_width(times, settings.confidence) / times.mean()
        if left <= 0 or spent or width <= settings.precision:
            return 0
        # A mean is known better by the square root of the number.
        wanted = done * (width / settings.precision) ** 2 - done if math.isfinite(width) else done
        affordable = _BATCH_SECONDS * 1e6 / times.mean()
        return max(settings.min_iterations // 2, int(min(wanted, affordable, left)))

    def _slowest(self, gathered: Sequence[Stamps]) -> Array:
        return iteration_times(np.concatenate(gathered, axis=1), self.clock.comparable)


@dataclass(frozen=True)
class Raw:
    """Stamps of a timed case, on rank 0."""

    stamps: Stamps
    """[ranks, iterations, 2] in ns."""
    comparable: bool
    first_us: float
    warmup: int

    def times(self) -> Array:
        """Microseconds of each iteration, of the slowest rank."""
        return iteration_times(self.stamps, self.comparable)

    def timing(self, op: Operation, size: int, ranks: int, confidence: float, multicast: bool) -> Timing:
        """The statistics of a case; `wrong` is filled in by the check."""
        times = self.times()
        mean, ordered = float(times.mean()), np.sort(times)
        alg, bus = bandwidths(op, size, mean / 1e6, ranks)
        factor = op.wire_factor(ranks) if multicast else None
        own = np.diff(self.stamps, axis=2)[:, :, 0] / 1e3
        return Timing(
            time_us=mean,
            ci_us=statistics.half_width(times, confidence),
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
            rank_times_us=tuple(tuple(round(float(t), 3) for t in row) for row in own),
            times_us=tuple(round(float(t), 3) for t in times),
        )

    def left_early(self) -> int:
        """Of a barrier: times that a rank was out before the last one was in."""
        return int((self.stamps[:, :, 1] < self.stamps[:, :, 0].max(axis=0)).sum())


def _nothing() -> None:
    """An idle rank's call."""
