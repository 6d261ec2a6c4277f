"""What a rank reports while it runs: the collectives it has entered in each communicator, and the call it waits in.

A thread of the rank writes one small file a second into the node's memory, replaced whole. It reads counters that torch
keeps anyway, so the step pays nothing; a process that is stopped leaves its last report.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from configs.errors import from_json
from faulttol.detect.snapshot import GroupStatus

INTERVAL = 1.0
"""Seconds between two reports."""
_DEPTH = 12
"""Frames of the stack that are inspected, innermost first."""
_WRAPPER_FILES = ("/torch/_ops.py", "/torch/utils/_contextlib.py", "/torch/_compile.py")
"""Files whose frames only wrap another call."""
_DISTRIBUTED_FILES = ("/torch/distributed/", "/faulttol/checkpoint/peers.py")
"""Files whose functions wait for peers and for little else."""
_DEVICE_FILES = ("/torch/cuda/__init__.py", "/torch/cuda/streams.py")
DEVICE = "device"
"""Reported in place of a call by a rank that waits for its device, which may itself wait for peers."""


@dataclass(frozen=True)
class ProgressReport:
    """The newest report of a rank."""

    monotonic_ns: int
    """When, by the node's clock."""
    waits: str
    """Distributed call that its main thread is in, or `DEVICE`; empty where it waits in neither."""
    remote: bool
    """It may wait for an object store."""
    groups: tuple[GroupStatus, ...]
    thread: int = 0
    """Kernel's id of the reporting thread, which wakes up once a second, whatever the rank does."""


class ProgressReporter:
    """Reports the progress of this process until it ends.

    Args:
        path: `RankFiles.signs`.
        remote: whether this rank may wait for an object store.
    """

    def __init__(self, path: Path, remote: bool = False) -> None:
        self._path, self._remote = path, remote
        self._main = threading.main_thread().ident
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="megaray-signs", daemon=True)

    def start(self) -> None:
        """Start the reporting thread."""
        self._path.unlink(missing_ok=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop reporting; the file stays."""
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ends.wait(INTERVAL):
            with contextlib.suppress(Exception):  # an observer's fault never stops training
                self.write()

    def write(self) -> None:
        """Write one report."""
        frame = sys._current_frames().get(self._main or 0)
        waits, group = _current_call(frame)
        tree = {
            "time_ns": time.monotonic_ns(),
            "waits": waits,
            "remote": self._remote,
            "thread": threading.get_native_id(),
            "groups": _groups(group if waits else None),
        }
        own = self._path.with_suffix(".new")
        own.write_text(json.dumps(tree), encoding="utf-8")
        own.replace(self._path)


def read(path: Path) -> ProgressReport | None:
    """A rank's newest report; None where there is none."""
    try:
        tree = from_json(path.read_bytes())
        groups = tuple(
            GroupStatus(name, range(*ranks[1:]) if ranks[0] == "range" else tuple(ranks[1:]), entered, left)
            for name, ranks, entered, left in tree["groups"]
        )
        thread = int(tree.get("thread", 0))
        return ProgressReport(int(tree["time_ns"]), str(tree["waits"]), bool(tree["remote"]), groups, thread)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def _current_call(frame: FrameType | None) -> tuple[str, Any]:
    """The distributed call that a thread is in, and its group where the frame has one; empty and None outside of any."""
    while frame is not None and frame.f_code.co_filename.endswith(_WRAPPER_FILES):
        frame = frame.f_back
    if frame is None:
        return "", None
    if frame.f_code.co_name == "synchronize" and frame.f_code.co_filename.endswith(_DEVICE_FILES):
        return DEVICE, None
    if not _in_distributed_code(frame):
        return "", None
    name, group, depth = "", None, 0
    while frame is not None and _in_distributed_code(frame) and depth < _DEPTH:
        name = frame.f_code.co_name if frame.f_code.co_name not in ("wrapper", "__exit__") else name
        group = group if group is not None else frame.f_locals.get("group")
        frame, depth = frame.f_back, depth + 1
    return name, group


def _in_distributed_code(frame: FrameType) -> bool:
    return any(part in frame.f_code.co_filename for part in _DISTRIBUTED_FILES)


def _groups(inside: Any) -> list[tuple[str, list[Any], int, int]]:
    """Name, ranks, entered and left of each communicator.

    Args:
        inside: the one that a call is under way in, where it is known.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return []
    world = dist.distributed_c10d._world
    groups = []
    for group in list(world.pg_map):
        entered = _entered(group)
        if entered is None:
            continue
        ranks = sorted(world.pg_group_ranks[group])
        about = getattr(group, "group_desc", "")
        tag = str(group.group_name)[:8]
        name = f"{about} ({tag})" if about and about not in ("undefined", "default_pg") else f"group {tag}"
        groups.append((name, _compact(ranks), entered, entered - (group is inside and entered > 0)))
    return groups


def _entered(group: Any) -> int | None:
    """Collectives that this rank has entered in a group, over its backends; None where one of them doesn't count."""
    backends = {id(one): one for one in map(group._get_backend, group._device_types)}
    try:
        return sum(int(one._get_sequence_number_for_group()) for one in backends.values())
    except RuntimeError:
        return None


def _compact(ranks: Sequence[int]) -> list[Any]:
    """Ranks as start, stop and step where they are evenly spaced."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    even = range(ranks[0], ranks[-1] + 1, step)
    return ["range", even.start, even.stop, even.step] if list(even) == list(ranks) else ["list", *ranks]


def is_remote(*places: str | None) -> bool:
    """Whether one of some paths or URLs isn't a file of this host."""
    return any("://" in place and not place.startswith("file://") for place in map(str, filter(None, places)))
