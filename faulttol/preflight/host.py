"""What can be said of a node without torch, in a moment: it is looked at before each gang starts."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from faulttol.preflight.result import Check, CheckOutcome
from faulttol.proc import run_bounded

LEAST_MEMORY = 512 << 20
"""Bytes of host memory without which a rank can't even start."""
LEAST_SHARED = 16 << 20
"""Bytes of `/dev/shm`: a rank's ring takes 128 KiB, and a full one ends it by a signal."""
_TOOL_SECONDS = 20.0
_DIAL_SECONDS = 2.0
_LOOPBACK_BYTES = 8 << 20
_GREETING = b"megaray\n"

CheckFunction = Callable[[], tuple[CheckOutcome, str]]


def run_check(name: str, look: CheckFunction) -> Check:
    """Look, and say how long it took. A look that fails by itself can't tell."""
    began = time.monotonic()
    try:
        outcome, text = look()
    except Exception as error:  # the instrument's fault, not the node's
        outcome, text = CheckOutcome.UNKNOWN, f"{type(error).__name__}: {error}"
    return Check(name, outcome, text, time.monotonic() - began)


def quick_checks(shared: Path = Path("/dev/shm")) -> list[Check]:  # noqa: S108  (node memory is what is looked at)
    """Host memory and shared memory: some microseconds."""
    return [run_check("host memory", host_memory), run_check("shared memory", lambda: shared_memory(shared))]


def host_memory() -> tuple[CheckOutcome, str]:
    """Whether a rank could start."""
    memory = psutil.virtual_memory()
    text = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available"
    return (CheckOutcome.GOOD if memory.available >= LEAST_MEMORY else CheckOutcome.BAD), text


def shared_memory(path: Path) -> tuple[CheckOutcome, str]:
    """Whether rings fit; pages must be there when they are written."""
    free = shutil.disk_usage(path).free
    text = f"{free / 2**20:.0f} MiB free in {path}"
    return (CheckOutcome.GOOD if free >= LEAST_SHARED else CheckOutcome.BAD), text


def versions() -> dict[str, str]:
    """Versions that must be alike on all nodes of a gang."""
    installed = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("torch", "deepspeed"):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "none"
    return installed


def versions_check() -> tuple[CheckOutcome, str]:
    """The same as a check."""
    return CheckOutcome.GOOD, ", ".join(f"{name} {value}" for name, value in versions().items())


def device_tool_name() -> str | None:
    """The tool that tells of this node's devices; None where there are none, or none that tells."""
    return next((name for name in ("nvidia-smi", "rocm-smi") if shutil.which(name)), None)


def device_tool(tool: str | None = None) -> tuple[CheckOutcome, str]:
    """Whether the devices' own tool answers. A driver that hangs is the commonest way for a device to be lost."""
    tool = tool or device_tool_name()
    if tool is None:
        return CheckOutcome.GOOD, "no devices, or no tool that lists them"
    try:
        done = run_bounded([tool], _TOOL_SECONDS)
    except subprocess.TimeoutExpired:
        return CheckOutcome.BAD, f"{tool} doesn't answer in {_TOOL_SECONDS:.0f} s: the driver hangs"
    if done.returncode:
        first = (done.stdout + done.stderr).strip().splitlines()
        return (
            CheckOutcome.BAD,
            f"{tool} fails with exit code {done.returncode}: {first[0] if first else 'no text'}",
        )
    return CheckOutcome.GOOD, f"{tool} answers"


def loopback() -> tuple[CheckOutcome, str]:
    """Bytes through the node's own network stack arrive as they were sent."""
    data = os.urandom(1 << 16)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        server.settimeout(_DIAL_SECONDS)

        def send() -> None:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(server.getsockname(), _DIAL_SECONDS) as out,
            ):
                for _ in range(_LOOPBACK_BYTES // len(data)):
                    out.sendall(data)

        sender = threading.Thread(target=send, daemon=True)
        began = time.monotonic()
        sender.start()
        try:
            connection, _ = server.accept()
            with connection, connection.makefile("rb") as stream:
                connection.settimeout(_DIAL_SECONDS * 5)
                parts = [stream.read(len(data)) for _ in range(_LOOPBACK_BYTES // len(data))]
        except OSError as error:
            return CheckOutcome.BAD, f"the node doesn't reach itself over 127.0.0.1: {error}"
    if any(part != data for part in parts):
        return CheckOutcome.BAD, "bytes sent over 127.0.0.1 came back different"
    return CheckOutcome.GOOD, f"{_LOOPBACK_BYTES / (time.monotonic() - began) / 1e9:.1f} GB/s"


def neighbours(peers: Sequence[str]) -> tuple[CheckOutcome, str]:
    """Whether the node reaches others, `HOST:PORT` of a `ReachabilityServer` each.

    One that reaches none of several is cut off; where only some fail, it may be their fault.
    """
    failed = [peer for peer in peers if not _greets(peer)]
    if not failed:
        return CheckOutcome.GOOD, f"reaches {', '.join(peers)}" if peers else "no neighbours"
    text = f"doesn't reach {', '.join(failed)}"
    return (CheckOutcome.BAD if len(failed) == len(peers) > 1 else CheckOutcome.UNKNOWN), text


def _greets(peer: str) -> bool:
    host, _, port = peer.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), _DIAL_SECONDS) as line:
            return line.recv(len(_GREETING)) == _GREETING
    except (OSError, ValueError, OverflowError):
        return False


class ReachabilityServer:
    """Answers neighbours that look whether this node can be reached."""

    def __init__(self) -> None:
        self._closing = False
        self._server = socket.create_server(("", 0), backlog=64)
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._serve, name="beacon", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._server.accept()
            except OSError:
                if self._closing:
                    return
                # Out of file descriptors for a moment: neighbours would take this node for cut off.
                time.sleep(0.1)
                continue
            with contextlib.suppress(OSError), line:
                line.settimeout(_DIAL_SECONDS)
                line.sendall(_GREETING)

    def close(self) -> None:
        """Answer no more."""
        self._closing = True
        with contextlib.suppress(OSError):  # wakes the thread that waits in it
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
