"""System metrics of all nodes of a run: read from Ray's own endpoint on each node, kept in a file, reported as rows.

The file is beside the tracker's cursor: what a tracker that is away hasn't got waits there, as the run's own lines do.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from configs.errors import from_json

SAMPLE_SECONDS = 15.0
"""Seconds between two samples; of many nodes longer."""
MAX_NODE_SERIES = 64
"""Nodes that have series of their own; of more only the least, the mean and the largest are logged."""
_PER_SECOND = 20
"""Nodes that are asked in a second, at most."""
_AT_ONCE = 8
_TIMEOUT = 5.0
_LONGEST = 16 << 20
_FILE = 256 << 20
"""Bytes of the file, beyond which nothing is added."""
_LINE = re.compile(r"^(ray_node_\w+)(?:\{.*\})? (\S+)$", re.MULTILINE)
_MB = 1e6

Sample = dict[str, dict[str, float]]
"""Node -> metric -> value."""


def parse(text: str) -> dict[str, float]:
    """A node's metrics of an exposition of Ray's; of several devices of a node their mean, sum or hottest."""
    values: dict[str, list[float]] = {}
    for name, value in _LINE.findall(text):
        try:
            number = float(value)
        except ValueError:
            continue
        if math.isfinite(number):
            values.setdefault(name.removeprefix("ray_node_"), []).append(number)
    made: dict[str, float] = {}
    for name, take in _TAKEN.items():
        value = take(values)
        if value is not None:
            made[name] = value
    return made


def _one(
    name: str, scale: float = 1.0, of: Callable[[list[float]], float] = sum
) -> Callable[[Mapping[str, list[float]]], Any]:
    return lambda values: of(values[name]) * scale if name in values else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _share(used: str, total: str) -> Callable[[Mapping[str, list[float]]], Any]:
    return lambda values: (
        100 * sum(values[used]) / whole if used in values and (whole := sum(values.get(total, ()))) else None
    )


_TAKEN: dict[str, Callable[[Mapping[str, list[float]]], Any]] = {
    "cpu_percent": _one("cpu_utilization"), "memory_percent": _share("mem_used", "mem_total"),
    "gpu_percent": _one("gpus_utilization", of=_mean), "gpu_memory_gib": _one("gram_used", 1 / 1024),
    "gpu_celsius": _one("gpu_temperature_celsius", of=max), "gpu_watts": _one("gpu_power_milliwatts", 1e-3),
    "sent_mb_per_second": _one("network_send_speed", 1 / _MB),
    "received_mb_per_second": _one("network_receive_speed", 1 / _MB),
    "written_mb_per_second": _one("disk_io_write_speed", 1 / _MB),
    "read_mb_per_second": _one("disk_io_read_speed", 1 / _MB),
}  # fmt: skip


def fetch(url: str) -> dict[str, float]:
    """One node's metrics; empty where it doesn't answer."""
    try:
        # Nodes are asked directly, whatever proxies this machine has.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=_TIMEOUT) as answer:
            return parse(answer.read(_LONGEST).decode(errors="replace"))
    except (OSError, ValueError):
        return {}


class NodeSampler:
    """Samples nodes by a thread of its own, into a file.

    Args:
        path: of the file.
        nodes: addresses of the run's nodes now.
        endpoints: where nodes of the cluster serve their metrics, by address; asked once a sample.
    """

    def __init__(
        self, path: Path, nodes: Callable[[], list[str]], endpoints: Callable[[], dict[str, str]]
    ) -> None:
        self._path, self._nodes, self._endpoints = path, nodes, endpoints
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._work, name="nodes", daemon=True)
        self.fetch: Callable[[str], dict[str, float]] = fetch

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Sample no more."""
        self._ends.set()

    def _work(self) -> None:
        wait = SAMPLE_SECONDS
        while not self._ends.wait(wait):
            try:
                count = self.sample(time.time())
            except Exception:  # Ray that is gone, a full disk: whatever it is, the next sample may do
                count = 0
            wait = max(SAMPLE_SECONDS, count / _PER_SECOND)

    def sample(self, now: float) -> int:
        """Ask all nodes of the run, and keep what they answered; how many were asked.

        Raises:
            OSError: where it can't be kept.
        """
        known = self._endpoints()
        nodes = [node for node in self._nodes() if node in known]
        if not nodes:
            return 0
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            answers = list(pool.map(lambda node: self.fetch(known[node]), nodes))
        answered = {node: answer for node, answer in zip(nodes, answers, strict=True) if answer}
        if answered and (not self._path.exists() or self._path.stat().st_size < _FILE):
            line = json.dumps({"time": now, "nodes": answered}) + "\n"
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(fd, line.encode())
            finally:
                os.close(fd)
        return len(nodes)


def read_from(path: Path, offset: int, limit: int = 1 << 20) -> tuple[list[tuple[float, Sample]], int]:
    """Samples from byte `offset` on, and the offset after them. What is torn is stepped over."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(limit)
            while data and b"\n" not in data and (more := file.read(limit)):
                data += more
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    return list(_samples(data[:end].splitlines())), offset + end


def _samples(lines: Iterable[bytes]) -> Iterable[tuple[float, Sample]]:
    for line in lines:
        try:
            tree = from_json(line)
            yield float(tree["time"]), {str(node): dict(values) for node, values in tree["nodes"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue


def row(at: float, sample: Sample) -> dict[str, float]:
    """A sample as a row: `nodes/*` over all, `node/ADDRESS/*` of each. `at` in seconds."""
    made: dict[str, float] = {"node/seconds": at}
    for name in _TAKEN:
        values = [one[name] for one in sample.values() if name in one]
        if values:
            made |= {
                f"nodes/{name}/mean": _mean(values),
                f"nodes/{name}/least": min(values),
                f"nodes/{name}/most": max(values),
            }
    if len(sample) <= MAX_NODE_SERIES:
        # A dot in a name would be taken for a field of it.
        made |= {
            f"node/{_key(node)}/{name}": value
            for node, values in sample.items()
            for name, value in values.items()
        }
    return made


def _key(node: str) -> str:
    return re.sub(r"[^\w-]", "-", node)
