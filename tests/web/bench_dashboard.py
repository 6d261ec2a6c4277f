"""`python -m tests.web.bench_dashboard`: what the server takes for 12,288 ranks, 100,000 steps and 200 queued runs.

Prints seconds until it listens and until the first view is there, seconds of each question cold and warm, and its memory.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from configs.paths import HomePaths
from faulttol.detect.snapshot import GroupStatus, RankObservation
from faulttol.recorder import PhaseMark, RankPhase, Record
from orchestrator.record import rank_status
from tests.web import simulated
from tests.web.made import MadeRun, queue_file
from tests.web.test_resilience import start

WARM = 7


def make(home: HomePaths, ranks: int, steps: int) -> str:
    """The home; the id of the large run."""
    home.ensure()
    made = simulated.write(home.home, ranks, steps)
    waiting = []
    for i in range(200):
        run = MadeRun(home, f"queued-{i:03d}", now=time.time() - i).submit()
        waiting.append({"run": run.run_id, "position": i + 1, "reason": "needs 2 GPU slots, none is free"})
    queue_file(home, time.time(), waiting=waiting)
    folder, now = made.run.attempt(1).seen, time.time()
    width = ranks // 8
    for node in range(ranks // 8):
        looks = []
        for rank in range(node * 8, node * 8 + 8):
            groups = (
                GroupStatus("pp", range(rank % width, ranks, width), 900, 900),
                GroupStatus("tp", range(rank // 8 * 8, rank // 8 * 8 + 8), 4000, 4000),
                GroupStatus(
                    "dp",
                    range(rank // width * width + rank % 8, (rank // width + 1) * width, 8),
                    40,
                    39 if rank != 777 else 40,
                ),
            )
            looks.append(
                RankObservation(
                    rank,
                    1000 + rank,
                    newest=Record(1, now, PhaseMark.BEGIN, RankPhase.BACKWARD, steps),
                    groups=groups,
                )
            )
        rank_status.write_statuses(folder, f"node-{node}", looks, now)
    return made.run.run_id


class DashboardClient:
    """Asks over one kept connection, as a browser does."""

    def __init__(self, told: dict[str, object]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", int(str(told["port"])), timeout=120)
        self._token = str(told["url"]).partition("token=")[2]

    def __call__(self, path: str) -> tuple[float, int, bytes]:
        began = time.perf_counter()
        headers = {"Authorization": f"Bearer {self._token}", "Accept-Encoding": "gzip"}
        self._connection.request("GET", path, headers=headers)
        answer = self._connection.getresponse()
        body = answer.read()
        assert answer.status == 200, (path, body[:300])
        return time.perf_counter() - began, len(body), body

    def plain(self, path: str) -> dict[str, object]:
        self._connection.request("GET", path, headers={"Authorization": f"Bearer {self._token}"})
        return dict(json.loads(self._connection.getresponse().read()))


def spent(pid: int) -> float:
    """Seconds of processor time of all its threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def memory(pid: int) -> tuple[float, float]:
    """Resident MB now and at most."""
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(rows["VmRSS"].split()[0]) / 1024, int(rows["VmHWM"].split()[0]) / 1024


def measure(home: HomePaths, run: str) -> None:
    began = time.perf_counter()
    child, told = start(home)
    try:
        ask = DashboardClient(told)
        print(f"listens after              {time.perf_counter() - began:8.2f} s")
        first = time.perf_counter()
        while not ask.plain("/api/runs")["runs"]:
            time.sleep(0.02)
        print(f"first runs after           {time.perf_counter() - first:8.2f} s")
        first = time.perf_counter()
        for path in (f"/api/run/{run}", f"/api/run/{run}/series?points=500&names=loss,tokens_per_second"):
            ask(path)
        seconds, read = time.perf_counter() - first, ask.plain(f"/api/run/{run}")["indexed"]
        print(f"first view of the run      {seconds:8.2f} s, of {read:.0%} of it")
        while ask.plain(f"/api/run/{run}")["indexed"] != 1.0:
            time.sleep(0.05)
        print(f"all lines read after       {time.perf_counter() - first:8.2f} s")
        paths = {
            "runs": "/api/runs", "queue": "/api/queue", "nodes": "/api/nodes", "run": f"/api/run/{run}",
            "series, all names": f"/api/run/{run}/series?points=500",
            "series, zoomed": f"/api/run/{run}/series?points=1000&names=loss,grad_norm&from=40000&to=44000",
            "experts, all": f"/api/run/{run}/experts", "experts, one layer": f"/api/run/{run}/experts?layer=1",
            "attempts": f"/api/run/{run}/attempts", "ledger": f"/api/run/{run}/ledger",
            "forecast": f"/api/run/{run}/forecast",
            "checkpoints": f"/api/run/{run}/checkpoints", "incidents": f"/api/run/{run}/incidents",
            "heat, ranks": f"/api/run/{run}/heat",
            "heat, deviation by node": f"/api/run/{run}/heat?mode=deviation&group=node",
            "heat, zoomed": f"/api/run/{run}/heat?from=99000&to=99200", "layout": f"/api/run/{run}/layout",
            "metrics": "/metrics",
        }  # fmt: skip
        print(f"load of the machine        {os.getloadavg()[0]:8.0f}")
        print(f"{'question':26} {'cold ms':>9} {'warm ms':>9} {'worst':>9} {'CPU ms':>9} {'kB':>8}")
        for name, path in paths.items():
            cold, size, _ = ask(path)
            before = spent(child.pid)
            warm = [ask(path)[0] for _ in range(WARM)]
            used = (spent(child.pid) - before) / WARM
            print(
                f"{name:26} {cold * 1e3:9.1f} {statistics.median(warm) * 1e3:9.1f} {max(warm) * 1e3:9.1f} "
                f"{used * 1e3:9.1f} {size / 1e3:8.1f}",
                flush=True,
            )
        now, most = memory(child.pid)
        before = spent(child.pid)
        time.sleep(10.0)
        idle = (spent(child.pid) - before) * 100
        print(f"memory                     {now:8.0f} MB now, {most:.0f} MB at most (bar 200)")
        print(f"processor while nobody asks {idle / 10:7.1f} % of one")
    finally:
        child.kill()
        child.wait(20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, help="a folder that is made once and used again")
    parser.add_argument("--ranks", type=int, default=12_288)
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = HomePaths(options.home or Path(folder))
        known = home.runs / "simulated"
        run = known.name if known.exists() else make(home, options.ranks, options.steps)
        measure(home, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
