"""What a device is, and what its driver's tool (nvidia-smi, amd-smi) tells of its clocks, power and temperature."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from configs.errors import from_json

_NVIDIA = (
    "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu",
)  # fmt: skip
_PATIENCE = 20.0
"""Seconds that a tool may take."""


def describe(device: torch.device) -> dict[str, Any]:
    """Device, host and software, as a profile's conditions tell them."""
    about: dict[str, Any] = {
        "device": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        about |= {
            "device": facts.name,
            "device_memory_bytes": facts.total_memory,
            "multiprocessors": facts.multi_processor_count,
            "cache_bytes": getattr(facts, "L2_cache_size", None),
        }
    return about


def read_sensors(device: torch.device, load: Callable[[], None], wait: Callable[[], None]) -> dict[str, Any]:
    """What the tool tells of a device that `load` keeps at work; empty where there is no tool, or it has no answer."""
    command = _command(device) if device.type == "cuda" else []
    if not command or shutil.which(command[0]) is None:
        return {}
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    until = time.monotonic() + _PATIENCE
    try:
        while tool.poll() is None and time.monotonic() < until:
            load()
            wait()
    finally:
        tool.kill()
    return parse(command[0], tool.communicate()[0])


def _command(device: torch.device) -> list[str]:
    facts: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the PCI address
    if torch.version.hip is None:
        # A UUID, since the tool counts devices that CUDA_VISIBLE_DEVICES hides.
        which = f"--id=GPU-{getattr(facts, 'uuid', device.index)}"
        return ["nvidia-smi", which, f"--query-gpu={','.join(_NVIDIA)}", "--format=csv,noheader"]
    address = f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0"
    return ["amd-smi", "metric", f"--gpu={address}", "--clock", "--power", "--temperature", "--json"]


def parse(tool: str, text: str) -> dict[str, Any]:
    """A tool's answer; empty where it isn't one."""
    if tool == "nvidia-smi":
        values = [value.strip() for value in text.strip().split(",")]
        return dict(zip(_NVIDIA, values, strict=True)) if len(values) == len(_NVIDIA) else {}
    try:
        return {"amd-smi": from_json(text)}
    except json.JSONDecodeError:
        return {}
