"""What only a GPU shows: bursts and graphs time the device and not the host, and both time the same work."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


def test_bursts_and_events_agree_on_work_and_graphs_hide_the_launch() -> None:
    import torch  # only here: collecting the tests must not load it

    from collectives.timing.burst import Burst
    from collectives.timing.clock import EventClock

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    device = torch.device("cuda", 0)
    a = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)
    out, small = torch.empty_like(a), torch.zeros(16, device=device)

    def large() -> None:
        torch.matmul(a, a, out=out)

    def tiny() -> None:
        small.add_(1)

    def burst(call: Callable[[], None], graph: bool) -> float:
        for _ in range(20):
            large()
        one = Burst(device, call, 100)
        if graph:
            one.capture()
        return float(np.median([one.run(lambda: None)[0] for _ in range(10)]))

    stamps = EventClock(device).run(large, 200, None)
    single = float(np.median(stamps[:, 1] - stamps[:, 0])) / 1e3
    assert burst(large, False) == pytest.approx(single, rel=0.1)
    assert burst(large, True) == pytest.approx(single, rel=0.1)
    assert burst(tiny, True) < burst(tiny, False)
    assert small[0] > 0 and torch.allclose(out.float(), (a @ a).float())


def test_what_the_library_moves_itself_arrives_right() -> None:
    import torch

    from collectives.ops.transfers import BY_LIBRARY
    from collectives.store.results import ResultStore
    from configs.paths import RunPaths

    if torch.cuda.device_count() < 2:
        pytest.skip(f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs, and this needs two")
    with tempfile.TemporaryDirectory() as folder:
        words = [
            *(sys.executable, "-m", "collectives", "run", "--ranks", "2", "--ops", ",".join(BY_LIBRARY)),
            *("-b", "8", "-e", "8M", "-f", "32", "-c", "1", "--out", folder),
        ]  # fmt: skip
        subprocess.run(words, check=True, timeout=100)
        store = ResultStore(RunPaths(Path(folder)).measurement)
        rows = list(store.finished())
        assert {row.op for row in rows} == set(BY_LIBRARY)
        assert all(timing.wrong == 0 for row in rows for timing in row.timings)
        assert any(timing.graph for row in rows for timing in row.timings)
        assert "broadcast the library's own" in store.read_metadata()[0].method["calls"]
