"""What only a GPU shows of the clocks: events and graphs time the device and not the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


def test_events_and_graphs_agree_on_work_and_graphs_hide_the_launch() -> None:
    import torch  # only here: collecting the tests must not load it

    from collectives.timing.clock import EventClock, GraphClock, iteration_times

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    device = torch.device("cuda", 0)
    a = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)
    out, small = torch.empty_like(a), torch.zeros(16, device=device)

    def large() -> None:
        torch.matmul(a, a, out=out)

    def tiny() -> None:
        small.add_(1)

    def median(clock: EventClock | GraphClock, call: Callable[[], None], count: int) -> float:
        for _ in range(20):
            large()
        stamps = clock.run(call, count, None)
        return float(np.median(iteration_times(stamps[None], clock.comparable)))

    events, graph = EventClock(device), GraphClock(device)
    assert median(graph, large, 200) == pytest.approx(median(events, large, 200), rel=0.1)
    assert median(graph, tiny, 200) < median(events, tiny, 200)
    assert small[0] > 0 and torch.allclose(out.float(), (a @ a).float())
