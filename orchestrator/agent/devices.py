"""How much memory of a node's devices is in use, without torch: `nvidia-smi`, `rocm-smi`, or the kernel's files."""

from __future__ import annotations

import logging
import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import from_json
from faulttol.proc import run_bounded

log = logging.getLogger("megaray.agent")

TOLERANCE = 512 << 20
"""Bytes that a device may hold more than before: drivers keep contexts for a moment, monitors come and go."""
WAIT_SECONDS = 60.0
"""After which memory that isn't free is the node's fault."""
_SECONDS = 10.0
_NVIDIA, _AMD = ("CUDA_VISIBLE_DEVICES",), ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@dataclass(frozen=True)
class DeviceUsage:
    """Memory in use."""

    used: dict[str, int] = field(default_factory=dict)
    """Bytes by device, as the variable names it."""
    unknown: str = ""
    """Why it is unknown; empty where it is known."""


_newest: dict[frozenset[tuple[str, str]], tuple[float, DeviceUsage]] = {}
"""By variables: when they were last asked about, and the answer."""


def memory_in_use(variables: Mapping[str, str], age: float = 0.0) -> DeviceUsage:
    """Memory in use on the devices that `variables` name, such as `{"CUDA_VISIBLE_DEVICES": "0,1"}`.

    Args:
        age: seconds that the answer may be old: the tools take up to a second.
    """
    key = frozenset(variables.items())
    at, usage = _newest.get(key, (-math.inf, DeviceUsage()))
    if time.monotonic() - at > age:
        at, usage = time.monotonic(), _query(variables)
        _newest[key] = at, usage
    return usage


def _query(variables: Mapping[str, str]) -> DeviceUsage:
    for names, tool in ((_NVIDIA, _nvidia), (_AMD, _amd)):
        chosen = next((variables[name] for name in names if variables.get(name)), "")
        if chosen:
            return tool(chosen.split(","))
    return DeviceUsage(unknown="no variable says which devices the ranks had")


def wait_until_free(variables: Mapping[str, str], before: Mapping[str, int], over: Callable[[], bool]) -> str:
    """Wait until the devices hold no more than `before` and `TOLERANCE`, for at most a minute; what they hold then, as a
    sentence, empty where they are free.

    Args:
        over: whether nobody needs to know any more.
    """
    until, wait, said = time.monotonic() + WAIT_SECONDS, 0.05, ""
    while not over():
        now = memory_in_use(variables)
        if now.unknown and now.unknown != said:
            said = now.unknown
            log.warning("whether the memory of %s is free is unknown: %s", dict(variables), said)
        sentence = describe_excess(now, before)
        if not sentence or time.monotonic() > until:
            return sentence
        time.sleep(wait)
        wait = min(2.0, wait * 2)
    return ""


def describe_excess(now: DeviceUsage, before: Mapping[str, int]) -> str:
    """Which devices hold more than `before` and `TOLERANCE`, as a sentence; empty where none does, or none can be asked."""
    over = {
        device: count - before.get(device, 0) for device, count in now.used.items()
        if count - before.get(device, 0) > TOLERANCE
    }  # fmt: skip
    if not over:
        return ""
    parts = ", ".join(
        f"device {device} still holds {count / 2**30:.1f} GiB" for device, count in over.items()
    )
    return f"{parts} after all processes have ended"


def _run(*words: str) -> str | None:
    """Output of a tool; None where it isn't there, fails or hangs."""
    if shutil.which(words[0]) is None:
        return None
    try:
        done = run_bounded(words, _SECONDS)
    except (subprocess.TimeoutExpired, OSError):
        return None
    return None if done.returncode else done.stdout


def _nvidia(chosen: list[str]) -> DeviceUsage:
    text = _run("nvidia-smi", "--query-gpu=index,uuid,memory.used", "--format=csv,noheader,nounits")
    if text is None:
        return DeviceUsage(unknown="nvidia-smi isn't there or doesn't answer")
    used = {}
    # A device that has a fault, or is cut into parts, has words in place of the number: [N/A], [GPU requires reset].
    for index, uuid, mib in re.findall(r"^ *(\d+) *, *([^ ,]+) *, *(\d+)(?:\.\d*)? *$", text, re.M):
        for device in chosen:
            if device == index or (device and uuid.startswith(device)):
                used[device] = int(mib) << 20
    missing = ", ".join(device for device in chosen if device not in used)
    return DeviceUsage(used, f"nvidia-smi gives no memory in use of device {missing}" if missing else "")


def _amd(chosen: list[str]) -> DeviceUsage:
    text = _run("rocm-smi", "--showmeminfo", "vram", "--json")
    if text is not None:
        try:
            cards = from_json(text)
            used = {
                device: int(cards[f"card{device}"]["VRAM Total Used Memory (B)"])
                for device in chosen
                if f"card{device}" in cards
            }
            return DeviceUsage(used, "" if len(used) == len(chosen) else "rocm-smi doesn't list all devices")
        except (ValueError, KeyError, TypeError):
            pass
    return _amd_files(chosen)


def _amd_files(chosen: list[str], root: Path = Path("/sys/class/drm")) -> DeviceUsage:
    """From the kernel's own files; cards in the order of their numbers, as HIP counts them."""
    try:
        files = sorted(root.glob("card*/device/mem_info_vram_used"), key=lambda p: int(p.parts[-3][4:]))
        used = {device: int(files[int(device)].read_text()) for device in chosen if int(device) < len(files)}
    except (OSError, ValueError):
        used = {}
    if len(used) == len(chosen):
        return DeviceUsage(used)
    return DeviceUsage(used, "neither rocm-smi nor the kernel's files tell of all devices")
