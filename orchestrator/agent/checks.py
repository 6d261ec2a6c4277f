"""Is this node fit to serve: looked at before it is given ranks, again and again while it waits, and before each gang."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from configs.errors import from_json
from faulttol.preflight import host
from faulttol.preflight.result import Check, CheckOutcome, Preflight
from faulttol.proc import run_bounded
from orchestrator.agent.environment import DEVICES

log = logging.getLogger("megaray.agent")

_FULL_SECONDS = 150.0
_RETRY_SECONDS = 300.0
"""Between two full looks at a node that failed one."""
MODES = ("auto", "full", "quick", "off")


@dataclass(frozen=True)
class NodeHealth:
    """What is known of a node now."""

    checked: bool
    """It has been looked at."""
    problem: str
    """Why it can't serve; empty where it can."""
    port: int
    """Where neighbours reach it."""


def preflight() -> str:
    """Why this node can't take ranks now; empty where it can. Takes no time that anybody would notice."""
    return Preflight(tuple(host.quick_checks())).why


class NodeHealthCheck:
    """Looks in a thread of its own; the answer is what is known.

    A node of cores is looked at without torch. One with devices also proves their memory and arithmetic, in a process of
    its own, before it serves. `MEGARAY_PREFLIGHT` says otherwise: `full` for both, `quick`, or `off`.
    """

    def __init__(self, mode: str = "") -> None:
        self._mode = mode or os.environ.get("MEGARAY_PREFLIGHT", "auto")
        if self._mode not in MODES:
            log.error("MEGARAY_PREFLIGHT=%s is none of %s; auto is taken", self._mode, ", ".join(MODES))
            self._mode = "auto"
        self._beacon = host.ReachabilityServer()
        self._health = NodeHealth(self._mode == "off", "", self._beacon.port)
        self._peers: tuple[str, ...] = ()
        self._idle = True
        self._full: Preflight | None = None
        self._full_due = 0.0
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="agent-check", daemon=True)
        self._thread.start()

    def poll(self, peers: Sequence[str] = (), idle: bool = True) -> NodeHealth:
        """What is known; a new look begins. Never waits.

        Args:
            peers: `HOST:PORT` of other nodes' beacons.
            idle: no rank runs here, so that devices may be used.
        """
        self._peers, self._idle = tuple(peers), idle
        self._wake.set()
        return self._health

    def close(self) -> None:
        """Answer neighbours no more, and look no more."""
        self._beacon.close()
        self._closed = True
        self._wake.set()
        self._thread.join()

    def _work(self) -> None:
        while self._mode != "off":
            self._wake.wait()
            self._wake.clear()
            if self._closed:
                return
            try:
                results = [
                    *host.quick_checks(),
                    host.run_check("neighbours", lambda: host.neighbours(self._peers)),
                ]
                results += self._check_fully()
                self._health = NodeHealth(True, Preflight(tuple(results)).why, self._beacon.port)
            except Exception:  # an instrument that breaks must not bar a node
                log.exception("the check of this node")
                self._health = NodeHealth(True, "", self._beacon.port)

    def _check_fully(self) -> tuple[Check, ...]:
        """The full look, made once, and again later where it failed."""
        has_devices = host.device_tool_name() is not None
        if self._mode == "quick" or (self._mode == "auto" and not has_devices):
            return ()
        if self._full is None or (self._full.why and self._idle and time.monotonic() > self._full_due):
            self._full = run_full_check(self._peers)
            self._full_due = time.monotonic() + _RETRY_SECONDS
        return self._full.checks


def run_full_check(peers: Sequence[str]) -> Preflight:
    """All checks, in a process of its own that a driver may hang."""
    # Ray hides them from an agent.
    env = {name: value for name, value in os.environ.items() if name not in DEVICES}
    env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONSAFEPATH": "1"}
    words = [sys.executable, "-m", "faulttol", "preflight", "--json"]
    words += [f"--peers={','.join(peers)}"] if peers else []
    try:
        done = run_bounded(words, _FULL_SECONDS, env)
    except subprocess.TimeoutExpired:
        return _alone(CheckOutcome.BAD, f"didn't end in {_FULL_SECONDS:.0f} s")
    try:
        return Preflight.from_json(from_json(done.stdout))
    except ValueError:
        if done.returncode < 0:
            return _alone(CheckOutcome.BAD, f"was ended by signal {-done.returncode}")
        return _alone(CheckOutcome.UNKNOWN, (done.stderr.strip().splitlines() or ["no answer"])[-1])


def _alone(outcome: CheckOutcome, text: str) -> Preflight:
    return Preflight((Check("preflight", outcome, text),))
