"""All checks of a node in one call."""

from __future__ import annotations

from collections.abc import Sequence

from faulttol.preflight import host
from faulttol.preflight.result import Preflight


def preflight(peers: Sequence[str] = (), arithmetic: bool = True) -> Preflight:
    """Look at this node.

    Args:
        peers: `HOST:PORT` of neighbours' beacons.
        arithmetic: also at its devices with torch: some seconds.
    """
    checks = [
        *host.quick_checks(),
        host.run_check("versions", host.versions_check),
        host.run_check("device tool", host.device_tool),
        host.run_check("loopback", host.loopback),
        host.run_check("neighbours", lambda: host.neighbours(peers)),
    ]
    if arithmetic:
        from faulttol.preflight import device  # torch loads here alone

        checks += device.checks()
    return Preflight(tuple(checks))
