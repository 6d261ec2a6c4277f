"""What of this machine a local Ray may use: processors and GPUs, as the process is allowed to see them."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
from pathlib import Path

from faulttol.proc import run_bounded

_CGROUPS = Path("/sys/fs/cgroup")
_KFD = Path("/sys/class/kfd/kfd/topology/nodes")
_ASK_SECONDS = 20.0
_VISIBLE = {
    "cuda": ("CUDA_VISIBLE_DEVICES",),
    "rocm": ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
}
"""Variables that hide GPUs from a process, by runtime."""


def processors() -> int:
    """Processors that this process may use: its affinity, and the quota of its control groups; at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(math.floor(quota) for quota in _quotas())]))


def _quotas() -> list[float]:
    """Processors that each control group around this process allows."""
    quotas = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            quotas += _up(_CGROUPS, place, _quota_v2)
        elif "cpu" in controllers.split(","):
            quotas += _up(_CGROUPS / "cpu", place, _quota_v1)
    return quotas


def _up(root: Path, place: str, quota: object) -> list[float]:
    """Quotas from a group up to the root. In a container the path may begin above what is mounted; the root holds then."""
    assert callable(quota)
    folder = root / place.strip("/")
    folders = [folder, *(p for p in folder.parents if p.is_relative_to(root))]
    return [value for one in folders if (value := quota(one)) is not None]


def _quota_v2(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        most, period = (folder / "cpu.max").read_text().split()
        return int(most) / int(period) if most != "max" else None
    return None


def _quota_v1(folder: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        most = int((folder / "cpu.cfs_quota_us").read_text())
        return most / int((folder / "cpu.cfs_period_us").read_text()) if most > 0 else None
    return None


def gpus(runtime: str = "") -> int:
    """GPUs that this process may use.

    Args:
        runtime: `cuda` or `rocm`; empty counts those of whichever is there.
    """
    if not runtime:
        return gpus("cuda") or gpus("rocm")
    return _visible(_nvidia() if runtime == "cuda" else _amd(), _VISIBLE[runtime])


def _nvidia() -> int:
    """NVIDIA's GPUs, as its own tool counts them, else by their device files."""
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = run_bounded(command, _ASK_SECONDS)
        if done.returncode == 0:
            return sum(line.strip().isdigit() for line in done.stdout.splitlines())
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").glob("nvidia*"))


def _amd() -> int:
    """AMD's GPUs in the kernel's table of compute nodes; processors are in it too, and have no SIMD units."""
    count = 0
    for properties in _KFD.glob("*/properties"):
        with contextlib.suppress(OSError):  # a GPU that isn't ours can't be read
            units = re.search(r"^simd_count (\d+)$", properties.read_text(), re.MULTILINE)
            count += bool(units and int(units[1]))
    return count


def _visible(gpus: int, variables: tuple[str, ...]) -> int:
    """Of `gpus` GPUs those that no variable hides."""
    for name in variables:
        if (given := os.environ.get(name)) is not None:
            listed = [word.strip() for word in given.split(",")]
            # The runtimes read up to the first entry that isn't one, such as -1.
            ends = next((i for i, word in enumerate(listed) if word in ("", "-1", "NoDevFiles")), len(listed))
            gpus = min(gpus, ends)
    return gpus
